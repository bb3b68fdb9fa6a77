"""What a user can give wrong, and what a full disk does: one clear message, and nothing lost."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import pretrain.checkpoint
import pretrain.encoder
from pairstream.cli import run_stage
from pretrain.checkpoint import complete_checkpoints, read_training_state
from pretrain.cli import main
from pretrain.encoder import build_encoder, load_encoder
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def command(tiny_recipe, tmp_path, capsys, fresh_accelerate):
    """`command(*words, **recipe_keys) -> (exit code, what it said)` of `pairstream pretrain`."""

    def run(*words: str, **keys) -> tuple[int, str]:
        fresh_accelerate()
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(**keys)))
        code = run_stage(main, [str(path), *words])
        return code, capsys.readouterr().err

    return run


def refused(outcome: tuple[int, str]) -> str:
    """The one message of a command that ended with exit code 2."""
    code, said = outcome
    assert code == 2
    assert "Traceback" not in said
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return message


def test_what_does_not_fit_is_refused_before_any_work(command, tmp_path):
    assert "did you mean 'batch_size'?" in refused(command(batchsize=8))
    said = refused(command(batch_size=41))
    assert "batch_size 41 is larger than the whole set (40 samples in " in said
    assert "the recipe asks for 2 processes, 1 started" in refused(command(processes=2))
    data = {"train": str(tmp_path / "nowhere")}
    assert "no shards at " in refused(command(data=data))
    named = {"kind": "open_clip", "name": "local-dir:" + str(tmp_path / "nowhere")}
    assert "no folder" in refused(command(model=named))
    named = {"kind": "open_clip", "name": str(tmp_path)}
    assert "no checkpoint there: expected open_clip_config.json" in refused(command(model=named))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("nowhere.at_all:Thing", "No module named 'nowhere'"),
        ("collections:Nothing", "no attribute 'Nothing'"),
        ("collections:Counter", "has no run(encoder)"),
        ("fractions:Fraction", "unexpected keyword argument 'k'"),
    ],
)
def test_an_evaluator_that_cannot_be_made(command, use, said):
    options = {"k": 1} if "Fraction" in use else {}
    message = refused(command(evaluate=[{"use": use, "options": options}]))
    assert f"evaluate.use {use!r}: " in message
    assert said in message


def test_resume_and_overwrite_and_a_folder_that_holds_a_run(command, tmp_path):
    assert command(steps=3)[0] == 0
    assert "already holds a run. Continue it with --resume" in refused(command(steps=3))
    assert "--overwrite replaces it: give one of them" in refused(command("--resume", "--overwrite", steps=3))
    assert "cannot resume with another batch_size" in refused(command("--resume", steps=3, batch_size=4))
    assert command("--overwrite", steps=3)[0] == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model/open_clip_model.safetensors", "not a whole safetensors file"),
        ("model/open_clip_config.json", "expected open_clip's configuration with 'model_cfg'"),
        ("training/optimizer.safetensors", "the training state is damaged"),
        ("training/state.json", "the training state is damaged"),
    ],
)
def test_a_checkpoint_cut_in_half(command, tmp_path, file, said):
    """The one before is taken, with a word about it; when that is damaged too, the run refuses to begin anew."""
    command(steps=3)
    newest, before = complete_checkpoints(tmp_path / "run/checkpoints")
    cut(newest / file)
    if file.startswith("model"):
        with pytest.raises(ValueError, match=said):
            load_encoder(newest / "model")
    whole = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    code, message = command("--resume", steps=3)
    assert code == 0
    assert f"damaged, so the one before is taken: {newest}" in message
    assert said in message
    assert "resuming at step 2 from" in message
    assert_untouched(tmp_path / "run", 3)  # step 3 was trained and written again
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == whole
    for checkpoint in (newest, before):
        cut(checkpoint / file)
    message = refused(command("--resume", steps=3))
    assert "none of its 2 checkpoints can be read; the newest: " in message
    assert said in message


def test_weights_of_another_architecture(tmp_path, tiny_models):
    for kind, model in tiny_models.items():
        build_encoder(TowersModel.model_validate(model), device="cpu").save(tmp_path / kind)
    weights = "open_clip_model.safetensors"
    (tmp_path / "vit" / weights).write_bytes((tmp_path / "resnet" / weights).read_bytes())
    with pytest.raises(ValueError, match=r"the weights do not fit open_clip_config\.json"):
        load_encoder(tmp_path / "vit")
    (tmp_path / "vit" / weights).unlink()
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_encoder(tmp_path / "vit")


# A disk that is full


def assert_untouched(run: Path, step: int) -> None:
    """The checkpoint of a step is whole and the newest, and nothing half-written lies beside it."""
    newest = complete_checkpoints(run / "checkpoints")[0]
    assert newest.name == f"step-{step:08d}"
    assert read_training_state(newest)[0]["step"] == step
    load_encoder(run)
    assert list((run / "checkpoints").rglob(".tmp*")) == []


@pytest.mark.parametrize("full", ["model", "optimizer"])
def test_a_disk_that_fills_up_while_saving(tiny_recipe, command, tmp_path, monkeypatch, full):
    """The system's own limit on file sizes stands for the full disk: real failing writes, by safetensors."""
    module = {"model": pretrain.encoder, "optimizer": pretrain.checkpoint}[full]
    save, calls = module.save_tensors, []

    def limited(tensors, path):
        calls.append(path)
        if len(calls) < 2:
            return save(tensors, path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            return save(tensors, path)
        except OSError as error:
            number = errno.ENOSPC if error.errno == errno.EFBIG else error.errno  # what a disk says
            raise OSError(number, error.strerror, error.filename) from error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(module, "save_tensors", limited)
    message = refused(command())
    assert "the disk is full while writing" in message
    assert "--resume" in message
    assert_untouched(tmp_path / "run", 2)
    monkeypatch.undo()
    assert command("--resume")[0] == 0
    assert_untouched(tmp_path / "run", 6)


def test_a_file_system_without_space(tmp_path, tiny_models):
    """A file system of one megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        encoder = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
        with pytest.raises(OSError, match="No space left on device") as caught:
            encoder.save(disk / "saved")
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_that_fails_keeps_its_log(tiny_recipe, tmp_path, monkeypatch):
    """An evaluator that breaks at step 4 leaves checkpoint and log of the steps before."""
    calls = []

    class Breaks:
        def run(self, encoder):
            calls.append(None)
            if len(calls) == 3:  # after steps 0 and 2
                raise ValueError("the evaluation set is gone")
            return {"x": 1.0}

    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Breaks())
    recipe = PretrainRecipe.model_validate(tiny_recipe(evaluate=[{"use": "a:B", "every": 2}]))
    with pytest.raises(ValueError, match="the evaluation set is gone"):
        Trainer(recipe).train()
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "loss" in record] == [1, 2, 3, 4]
    assert_untouched(tmp_path / "run", 2)


def test_a_faulty_set_stops_the_run(command, tmp_path):
    from data.shards import Sample, ShardWriter

    with ShardWriter(tmp_path / "faulty") as writer:
        for number in range(16):
            writer.write(Sample(f"{number}", b"no picture", "jpg", ("a thing",)))
    code, said = command(data={"train": str(tmp_path / "faulty"), "workers": 0})
    assert code == 2
    assert "undecodable_image: " in said
    assert torch.is_grad_enabled()
