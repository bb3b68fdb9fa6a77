"""Two processes are one process with the same global batch: loss, gradients, batch statistics, trained weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.encoder import build_encoder
from pretrain.locks import set_training_mode
from pretrain.losses import info_nce
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.trainer import DualEncoder, Trainer

pytestmark = pytest.mark.dist
WORKER = Path(__file__).with_name("two_process_worker.py")
TOWERS = ("vit", "resnet", "timm")
SPLITS = {"even": [4, 4], "uneven": [5, 3]}
DTYPES = {
    "float64": 1e-6,
    "float32": 2e-5,
}  # largest relative difference; sums of float32 round as threads divide them
NAMES = ("vit", "phases", "sigmoid", "global", "terms")
# ZeRO's first stage is the second's but for one share of the gradients; test_zero.py has more of it.
ZERO = {"zero1 ": ("vit", "phases"), "zero2 ": NAMES} if find_spec("deepspeed") else {}
TRAINED = [(way, name) for way, names in {"": NAMES, "sharded ": NAMES, **ZERO}.items() for name in names]
OPEN_CLIP = {"default": {}, "gathered": {"local_loss": True, "gather_with_grad": True}}


@pytest.fixture(scope="module")
def models(tiny_models) -> dict[str, dict]:
    """Three image towers: layer norm, torch's batch norm, timm's batch norm with activation."""
    timm = {"kind": "timm", "name": "test_efficientnet", "image_size": 64}
    # At 32 px the last stage normalises over eight values, and a float32 rounding error can grow a thousandfold.
    resnet = {
        **tiny_models["resnet"],
        "image_tower": {**tiny_models["resnet"]["image_tower"], "image_size": 64},
    }
    return {**tiny_models, "resnet": resnet, "timm": {**tiny_models["vit"], "image_tower": timm}}


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (8, 8), generator=generator)
    tokens[:, -1] = 49407  # the end of a text, where its feature is taken
    return {
        size: {
            "images": torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=generator),
            "tokens": tokens,
        }
        for size in (32, 64)
    }


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory, make_picture) -> Path:
    """29 pairs: the last batch of an epoch has 5, so one rank has 3 rows and the other 2."""
    from data.shards import Sample, ShardWriter

    folder = tmp_path_factory.mktemp("odd_shards")
    with ShardWriter(folder, samples_per_shard=10) as writer:
        for number in range(29):
            writer.write(Sample(f"{number}", make_picture(number), "jpg", (f"thing {number}", "a thing")))
    return folder


@pytest.fixture(scope="module")
def trainings(models, odd_shards) -> Callable[[Path], dict[str, dict]]:
    """Recipes by name for a folder of runs; the phases of `phases` wrap the model anew."""

    def make(folder: Path) -> dict[str, dict]:
        base = {
            "data": {"train": str(odd_shards), "workers": 0, "hflip": 0.5, "color_jitter": 0.2},
            "batch_size": 8,
            "steps": 6,
            "schedule": {"warmup": 1},
            "optim": {"lr": 1e-3},
            "log_every": 1,
        }
        phases = [{"image_groups": 0, "text_groups": 0}, {"step": 3, "image_groups": 2, "text_groups": "all"}]
        return {
            "vit": {**base, "run": str(folder / "vit"), "model": models["vit"]},
            # Two processes in parts of two rows and round a ring; one process with the whole batch.
            "sigmoid": {
                **base,
                "run": str(folder / "sigmoid"),
                "model": models["vit"],
                "loss": {"kind": "sigmoid", "tile": 2},
                "micro_batch": 2,
            },
            # What each rank found of its samples in the first epoch is there in the second, wherever they come.
            "global": {
                **base,
                "run": str(folder / "global"),
                "model": models["vit"],
                "loss": {"kind": "global_contrast", "gamma": 0.5},
            },
            # A critic, further views of the pictures and a decoder, also in parts.
            "terms": {
                **base,
                "run": str(folder / "terms"),
                "model": models["coca"],
                "loss": {"kind": "sigmoid"},
                "terms": {"alignment": {}, "self_supervision": {"hidden": 32}, "captioning": {}},
                "micro_batch": 2,
            },
            "phases": {**base, "run": str(folder / "phases"), "model": models["resnet"], "phases": phases},
        }

    return make


@pytest.fixture(scope="module")
def sharded(trainings) -> Callable[[Path], dict[str, dict]]:
    """The same under FSDP2, two of them with activations that are recomputed."""

    def make(folder: Path) -> dict[str, dict]:
        found = {
            f"sharded {name}": {**recipe, "run": str(folder / f"sharded {name}")}
            for name, recipe in trainings(folder).items()
        }
        for name in ("sharded vit", "sharded terms"):
            found[name] |= {"checkpoint": {"every": 3}, "checkpoint_activations": True}
        return found

    return make


@pytest.fixture(scope="module")
def zero(trainings) -> Callable[[Path], dict[str, dict]]:
    """The same under DeepSpeed's ZeRO, where it is installed; stage 1 with activations that are recomputed."""

    def make(folder: Path) -> dict[str, dict]:
        recipes = trainings(folder)
        return {
            f"{way}{name}": {
                **recipes[name],
                "run": str(folder / f"{way}{name}"),
                "checkpoint_activations": (way, name) == ("zero1 ", "vit"),
            }
            for way, names in ZERO.items()
            for name in names
        }

    return make


@pytest.fixture(scope="module")
def one(trainings, tmp_path_factory):
    """`one(name) -> run, state at the start, state at the end`: a training in this process, in whole batches."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def train(name: str) -> tuple[Path, dict, dict]:
        if name not in made:
            recipe = {**trainings(folder)[name], "micro_batch": None}
            trainer = Trainer(PretrainRecipe.model_validate(recipe))
            parts = [trainer.model, trainer.terms]
            start = {key: value.clone() for part in parts for key, value in part.state_dict().items()}
            trainer.train()
            ended = {key: value for part in parts for key, value in part.state_dict().items()}
            made[name] = folder / name, start, ended
        return made[name]

    return train


@pytest.fixture(scope="module")
def two(tmp_path_factory, models, batches, trainings, sharded, zero, torchrun) -> Path:
    """What two processes left: one start of torchrun for the whole module."""
    folder = tmp_path_factory.mktemp("two")
    cases = [
        {
            "name": f"{tower}-{split}-{dtype}",
            "model": models[tower],
            "rows": rows,
            "dtype": dtype,
            "loss": "ours",
        }
        for tower in TOWERS
        for split, rows in SPLITS.items()
        for dtype in DTYPES
    ]
    cases += [
        {"name": name, "model": models["vit"], "rows": [4, 4], "dtype": "float64", "loss": options}
        for name, options in OPEN_CLIP.items()
    ]
    for case in cases:
        case["images"] = case["model"]["image_tower"]["image_size"]
    recipe = trainings(folder)["vit"]
    refused = {
        "odd batch": {**recipe, "run": str(folder / "no"), "batch_size": 7},
        "other processes": {**recipe, "run": str(folder / "no"), "processes": 3},
    }
    checked = {**trainings(folder)["terms"], "run": str(folder / "checked")}
    alone = {**recipe, "run": str(folder / "no")}
    sharded_refusals = {
        "first version": alone,
        "whole weights": {**alone, "ema": {}, "optim": {"kind": "lion"}},
        "check": {**alone, "run": str(folder / "unchecked")},
    }
    job = {"cases": cases, "refused": refused, "checked": checked, "sharded refusals": sharded_refusals}
    job["trainings"] = {**trainings(folder), **sharded(folder), **zero(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    for size, batch in batches.items():
        save_file(batch, folder / f"batch-{size}.safetensors")
    torchrun(WORKER, folder)
    return folder


def one_process(model: dict, batch: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """The same batch in this process, without a process group."""
    torch.manual_seed(0)
    encoder = build_encoder(TowersModel.model_validate(model), device="cpu")
    network = DualEncoder(encoder).to(getattr(torch, dtype))
    set_training_mode(encoder.model)
    loss = info_nce(*network(batch["images"], batch["tokens"]))
    loss.backward()
    found = {"loss": loss.detach().reshape(1)}
    found |= {f"gradient|{name}": value.grad for name, value in encoder.model.named_parameters()}
    return found | {
        f"buffer|{name}": value for name, value in encoder.model.named_buffers() if "running" in name
    }


def compare(came: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every tensor by its own norm, or by a scale of its kind where its true value is zero.

    That is a hundredth of the whole gradient, and for a mean over the batch the deviation there.
    """
    assert came.keys() == expected.keys()
    gradients = [value.double().norm() for name, value in expected.items() if name.startswith("gradient")]
    whole = float(torch.stack(gradients).norm())
    assert whole > 1e-3
    wrong = {}
    for name, value in expected.items():
        size = float(value.double().norm())
        floor = 1e-2 * whole if name.startswith("gradient") else 0.0
        if name.endswith("running_mean"):
            floor = float(expected[name.replace("_mean", "_var")].double().sum().sqrt())
        difference = float((came[name].double() - value.double()).norm()) / max(size, floor)
        if not difference <= tolerance:
            wrong[name] = difference
    assert wrong == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tower", TOWERS)
def test_loss_gradients_and_statistics_are_those_of_one_process(two, models, batches, tower, split, dtype):
    size = models[tower]["image_tower"]["image_size"]
    expected = one_process(models[tower], batches[size], dtype)
    assert any(name.startswith("buffer") for name in expected) == (tower != "vit")
    compare(load_file(two / f"{tower}-{split}-{dtype}.safetensors"), expected, DTYPES[dtype])


@pytest.mark.parity
def test_open_clip_by_default_is_off_by_the_number_of_processes(two, models, batches):
    """Its towers get half of the gradient and logit_scale all of it: the comparison above can fail."""
    expected = one_process(models["vit"], batches[32], "float64")
    came = load_file(two / "default.safetensors")
    assert float(came["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-9)
    with pytest.raises(AssertionError):
        compare(came, expected, 1e-6)
    halved = {
        name: value / 2 if name.startswith("gradient") and not name.endswith("logit_scale") else value
        for name, value in expected.items()
    }
    compare(came, halved, 1e-6)


@pytest.mark.parity
def test_open_clip_with_gathered_gradients_is_what_we_do_by_default(two, models, batches):
    expected = one_process(models["vit"], batches[32], "float64")
    compare(load_file(two / "gathered.safetensors"), expected, 1e-6)


@pytest.mark.parametrize(("way", "name"), TRAINED)
@pytest.mark.usefixtures("fresh_accelerate")
def test_trained_weights_are_those_of_one_process(two, one, way, name):
    """Six real steps over an epoch's end with uneven ranks, augmentation on; within 1e-4 of the distance trained.

    AdamW divides by the gradient's own size, so that rounding of small gradients is not small in its steps.
    """
    folder, start, expected = one(name)
    ended = two / f"{way}{name}" / "checkpoints/step-00000006"
    came = load_file(ended / "model/open_clip_model.safetensors")
    if name == "terms":
        came |= load_file(ended / "training/terms.safetensors")
    assert came.keys() == expected.keys()
    moved = torch.cat([(expected[key] - start[key]).flatten().double() for key in expected]).norm()
    apart = torch.cat([(expected[key] - came[key]).flatten().double() for key in expected]).norm()
    assert float(moved) > 0.01
    assert float(apart / moved) < 1e-4
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (two / f"{way}{name}", folder)
    ]
    assert [record["samples_seen"] for record in logs[0]] == [8, 16, 24, 29, 37, 45]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["samples_seen"] == theirs["samples_seen"]
        told = {
            key for key in theirs if "caption" in key or "critic" in key or "gap" in key or "super" in key
        }
        assert len(told) == (5 if name == "terms" else 0)
        for key in told:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


def test_what_does_not_fit_the_number_of_processes_is_refused(two):
    refused = json.loads((two / "refusals.json").read_text())
    assert (
        "batch_size 7 (over all ranks) cannot be split over 2 processes: take a multiple of 2"
        in refused["odd batch"]
    )
    assert "the recipe asks for 3 processes, 2 started" in refused["other processes"]
    assert "FSDP's first version flattens parameters" in refused["first version"]
    assert "FSDP2 here does not go with optim.kind: lion, ema: they need whole" in refused["whole weights"]
    assert "--check-gradients wraps the model for replicas" in refused["check"]
    for part in ("image tower", "text tower", "logit_scale", "logit_bias", "decoder", "terms"):
        assert f"{part}: cosine 1.0000, length x 0.5000" in refused["halved gradients"]


def test_the_check_names_what_others_get_wrong(two):
    """open_clip's default flags and Inf-CLIP's temperature: what is wrong, and nothing else; and a wrong direction."""
    wrong = {
        name: {
            part: numbers
            for part, *numbers in re.findall(r"(\w[\w ]+): cosine (\S+), length x (\d\.\d+)", said)
        }
        for name, said in json.loads((two / "refusals.json").read_text()).items()
    }
    halved = ["1.0000", "0.5000"]
    assert wrong["no gradient through the gather"] == {"text tower": halved, "image tower": halved}
    assert wrong["temperature summed"] == {"logit_scale": ["1.0000", "2.0000"]}
    towers = wrong["local loss alone"]
    for tower in ("image tower", "text tower"):
        assert float(towers[tower][0]) < 0.999


@pytest.mark.parametrize("name", ["sharded vit", "sharded terms"])
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_sharded_checkpoint_opens_in_open_clip_and_goes_on_in_one_process(two, sharded, tmp_path, name):
    """Two processes of shards to step 3, one process without from there: the weights of the two at step 6."""
    ended = two / name / "checkpoints/step-00000006"
    run = tmp_path / "run"
    shutil.copytree(two / name, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    trainer = Trainer(PretrainRecipe.model_validate({**sharded(two)[name], "run": str(run)}), resume=True)
    parts = [trainer.model, trainer.terms]
    start = {key: value.clone() for part in parts for key, value in part.state_dict().items()}
    assert trainer.step == 3
    trainer.train()
    expected = open_clip.create_model(f"local-dir:{ended / 'model'}").state_dict()
    if name == "sharded terms":
        expected |= load_file(ended / "training/terms.safetensors")
    assert expected.keys() == start.keys()
    assert all(expected[key].shape == value.shape for key, value in start.items())
    moved, apart = (
        torch.cat([(value - expected[key]).flatten() for key, value in weights.items()]).norm()
        for weights in (start, {key: value for part in parts for key, value in part.state_dict().items()})
    )
    assert float(moved) > 0.01
    assert float(apart / moved) < 1e-4
