"""Fine-tuning from shards to report: both tasks, resuming, kept image tokens, recipes, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.shards import Sample, ShardWriter
from finetune.cli import main
from finetune.model import load_task_model
from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import ContinuedLanguageModel, Linear
from pairstream.cli import run_stage
from pairstream.recipe import load_recipe, recipe_names, validate
from pretrain.checkpoint import complete_checkpoints
from pretrain.encoder import load_encoder
from pretrain.recipe_model import OpenClipModel

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, coloured) -> Path:
    """Shards of coloured pictures with captions and questions, and a tiny encoder with random weights."""
    root = tmp_path_factory.mktemp("finetune")
    for split, count in (("train", 32), ("val", 12)):
        with ShardWriter(root / split, samples_per_shard=10) as writer:
            for number in range(count):
                colour = COLOURS[number % 4]
                questions = [
                    {
                        "question_id": 10 * number,
                        "question": "What colour is it?",
                        "answers": [colour] * 10,
                        "answer_type": "other",
                    },
                    {
                        "question_id": 10 * number + 1,
                        "question": "Is it red?",
                        "answers": ["yes" if colour == "red" else "no"] * 10,
                        "answer_type": "yes/no",
                    },
                ]
                captions = [f"a {colour} picture", f"this is all {colour}"]
                picture = coloured(colour, number + 1000 * (split == "val"))
                writer.write(
                    Sample(f"{split}{number:03d}", picture, "png", captions, {"questions": questions})
                )
    small_encoder(image_size=32, patch_size=16, context=16).save(root / "encoder")
    return root


def recipe(world: Path, run: Path, task: dict, **changes) -> FinetuneRecipe:
    small = {"kind": "config", "width": 32, "layers": 1, "heads": 2, "context": 48, "vocabulary": 300}
    content = {
        "run": str(run),
        "model": {"name": str(world / "encoder")},
        "task": task,
        "data": {"train": str(world / "train"), "val": str(world / "val"), **changes.pop("data", {})},
        "language_model": small | changes.pop("language_model", {}),
        "batch_size": 8,
        "steps": 8,
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "decoding": {"max_new_tokens": 8},
        "log_every": 4,
        **changes,
    }
    return validate(FinetuneRecipe, content, "test")


def finetune(recipe: FinetuneRecipe, **options) -> dict:
    from finetune.trainer import Finetuner

    return Finetuner(recipe, **options).train()


def test_vqa_learns_colours_and_beats_what_never_looks(world, tmp_path, coloured):
    metrics = finetune(recipe(world, tmp_path / "run", {"kind": "vqa"}, steps=60))
    assert metrics["accuracy"] > 0.9
    # Half the questions are "is it red?", "no" three times of four; the other half has four equally likely answers.
    assert metrics["question_only_baseline"] == pytest.approx((0.75 + 0.25) / 2)
    assert metrics["majority_baseline"] == pytest.approx(0.75 / 2)
    assert (metrics["questions"], metrics["mode"], metrics["majority_answer"]) == (24, "fixed", "no")
    assert set(metrics["by_answer_type"]) == {"other", "yes/no"}
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert len(predictions) == 24
    assert set(predictions[0]) == {"question_id", "answer"}
    model = load_task_model(tmp_path / "run", device="cpu")  # a run folder means its newest checkpoint
    assert model.answer([coloured("blue", 9)], ["What colour is it?"]) == ["blue"]
    assert "Questions answered" in (tmp_path / "run" / "report.html").read_text()


def test_captions_are_learnt_from_kept_tokens(world, tmp_path):
    chosen = recipe(
        world,
        tmp_path / "run",
        {"kind": "caption"},
        steps=60,
        data={"cache_image_tokens": True},
        evaluate={"every": 30, "pictures": 8, "batch_size": 5, "wall": 3},
    )
    metrics = finetune(chosen)
    assert metrics["cider"] > 2 * metrics["baseline_cider"]
    assert metrics["images"] == 8
    assert metrics["bleu4"] > metrics["baseline_bleu4"]
    assert (metrics["tokeniser"], metrics["df_source"]) == ("ptb", "references of this evaluation")
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [entry["image_id"] for entry in predictions] == [f"val{number:03d}" for number in range(8)]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "evaluation" in record] == [30, 60]
    assert log[0]["loss"] > 2 * log[-2]["loss"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    walls = [block for block in report["blocks"] if block["kind"] == "cards"]
    assert len(walls[0]["cards"]) == 3


@pytest.mark.parametrize("task", [{"kind": "caption"}, {"kind": "vqa", "questions": 1, "target": "sample"}])
def test_killed_and_resumed_is_bit_equal(world, tmp_path, task, dies_of_saving):
    changes = {
        "freeze_image_tower": False,
        "checkpoint": {"every": 4},
        "language_model": {"dropout": 0.2},
        "data": {"crop_scale": [0.5, 1.0]},
    }
    straight = recipe(world, tmp_path / "straight", task, **changes)
    finetune(straight)

    killed = recipe(world, tmp_path / "killed", task, **changes)
    with dies_of_saving():
        finetune(killed)
    with pytest.raises(FileExistsError, match="--resume"):
        finetune(killed)
    finetune(killed, resume=True)

    files = sorted((tmp_path / "straight" / "checkpoints" / "step-00000008").rglob("*.safetensors"))
    assert {file.name for file in files} >= {
        "connector.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
    }
    for file in files:
        other = Path(str(file).replace("/straight/", "/killed/"))
        ours, theirs = load_file(file), load_file(other)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    for name in ("predictions.json",):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [4, 8, 8]

    with pytest.raises(ValueError, match="cannot resume with another steps"):
        finetune(recipe(world, tmp_path / "killed", task, **{**changes, "steps": 9}), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "local-dir:nowhere"}}, "no folder"),
        ({"data": {"train": "nowhere"}}, "no shards"),
        ({"data": {"val": "nowhere"}}, "no shards"),
        ({"connector": {"kind": "mlp", "merge": 3}}, "merge"),
    ],
    ids=["model", "train", "val", "connector"],
)
def test_an_overwrite_that_cannot_work_leaves_the_old_run(world, tmp_path, changes, message):
    earlier = tmp_path / "run/checkpoints/step-00000007"
    earlier.mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(recipe(world, tmp_path / "run", {"kind": "caption"}, **changes), overwrite=True)
    assert earlier.is_dir()


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(world, tmp_path, capsys):
    chosen = recipe(world, tmp_path / "run", {"kind": "caption"}, steps=4, log_every=2)
    finetune(chosen)
    shutil.rmtree(tmp_path / "run/checkpoints")
    finetune(chosen, resume=True)
    assert "nothing to resume" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4, 4]  # the last is the evaluation


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nothing_is_kept_of_a_run_that_has_diverged(world, tmp_path, monkeypatch, broken):
    """Step 3 breaks, long before the next line of the log; the checkpoint of step 4 would be NaN."""
    from finetune.model import VisionLanguageModel

    exact, calls = VisionLanguageModel.forward, []

    def breaks(self, **inputs):
        calls.append(None)
        loss = exact(self, **inputs)
        if broken == "loss":
            return loss * (math.nan if len(calls) == 3 else 1.0)
        return loss + (torch.sqrt(loss - loss) if len(calls) == 4 else 0)  # sqrt has no slope at 0

    monkeypatch.setattr(VisionLanguageModel, "forward", breaks)
    chosen = recipe(
        world, tmp_path / "run", {"kind": "caption"}, log_every=20, checkpoint={"every": 2, "keep": 9}
    )
    said = {"loss": "the loss is nan", "gradient": r"the loss is \d.* and the gradient norm (nan|inf)"}[
        broken
    ]
    with pytest.raises(ValueError, match=said + ".* at step 4: training has diverged"):
        finetune(chosen)
    kept = complete_checkpoints(tmp_path / "run/checkpoints")
    assert [path.name for path in kept] == ["step-00000002"]
    assert all(
        bool(value.isfinite().all()) for value in load_file(kept[0] / "model/connector.safetensors").values()
    )


def test_fault_counts_are_carried_over_a_resume(world, tmp_path, coloured):
    with ShardWriter(tmp_path / "faulty") as writer:
        for number in range(16):
            picture = b"no picture" if number == 3 else coloured("red", number)
            writer.write(Sample(f"{number}", picture, "png", ["all red"]))
    chosen = recipe(
        world,
        tmp_path / "run",
        {"kind": "caption"},
        steps=6,
        data={"train": str(tmp_path / "faulty"), "max_faults": 0.5},
        checkpoint={"every": 3, "keep": 3},
    )
    assert finetune(chosen)["faults"] == {"undecodable_image": 3}  # once an epoch
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    assert finetune(chosen, resume=True)["faults"] == {"undecodable_image": 3}


def test_the_frozen_tower_leaves_as_it_came(world, tmp_path):
    finetune(recipe(world, tmp_path / "run", {"kind": "caption"}))
    before = load_file(world / "encoder" / "open_clip_model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/step-00000008/model/encoder/open_clip_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_going_on_from_a_captioner(world, tmp_path):
    caption = recipe(world, tmp_path / "caption", {"kind": "caption"}, freeze_image_tower=False, tower_lr=1.0)
    finetune(caption)
    captioner = load_task_model(tmp_path / "caption", device="cpu")
    assert (
        "what" in captioner.tokenizer.tokenize(" what colour is it?")[0]
    )  # its vocabulary knows the questions
    going_on = recipe(
        world,
        tmp_path / "vqa",
        {"kind": "vqa"},
        model={"name": str(tmp_path / "caption")},
        steps=1,
        schedule={"warmup": 0},
        optim={"lr": 1e-12},
    ).model_copy(update={"language_model": ContinuedLanguageModel()})
    finetune(going_on)
    answerer = load_task_model(tmp_path / "vqa", device="cpu")
    assert answerer.task.kind == "vqa"
    before, after = captioner.state_dict(), answerer.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():  # all parts came along, the trained image tower among them
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert load_encoder(tmp_path / "caption", device="cpu").fingerprint == captioner.encoder.fingerprint
    other = going_on.model_copy(update={"run": str(tmp_path / "other"), "connector": Linear()})
    with pytest.raises(
        ValueError, match=r"has the connector .*'mlp'.* the recipe .*'linear'.* keeps its own"
    ):
        finetune(other)
    nothing = going_on.model_copy(update={"model": OpenClipModel(name=str(world / "encoder"))})
    with pytest.raises(FileNotFoundError, match="no task model in"):
        finetune(nothing)


def test_every_recipe_parses():
    assert {"scenes_caption", "scenes_vqa", "easy_vqa", "flickr8k_caption"} <= set(recipe_names("finetune"))
    for name in recipe_names("finetune"):
        load_recipe(FinetuneRecipe, "finetune", name, ["--steps", "3000", "--optim.lr", "1e-4"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "stepz: unknown key; did you mean 'steps'"),
        ({"steps": "many"}, "steps: .*integer"),
        ({"task": {"kind": "vqa", "prompt": "no question"}}, r"exactly one \{question\}"),
        ({"schedule": {"warmup": 8}}, "would never reach its peak"),
        ({"optim": {"layer_decay": 0.5}}, r"optim.layer_decay \(0.5\) is for pretraining; .* tower_lr"),
        ({"data": {"train": "x", "val": []}}, "shard list is empty"),
        (
            {"freeze_image_tower": False, "data": {"train": "x", "val": "x", "cache_image_tokens": True}},
            "that trains",
        ),
        (
            {"data": {"train": "x", "val": "x", "cache_image_tokens": True, "crop_scale": [0.5, 1]}},
            "random crops",
        ),
        ({"language_model": {"kind": "config", "width": 100, "heads": 3}}, "not a multiple of heads"),
    ],
)
def test_bad_recipes(changes, message):
    content = {
        "run": "r",
        "model": {"name": "m"},
        "task": {"kind": "caption"},
        "data": {"train": "x", "val": "x"},
    }
    with pytest.raises(ValueError, match=message):
        validate(FinetuneRecipe, {**content, "steps": 8, "schedule": {"warmup": 2}, **changes}, "test")


def test_bad_shards(world, tmp_path, coloured):
    with pytest.raises(ValueError, match="no shards"):
        finetune(recipe(world, tmp_path / "a", {"kind": "caption"}, data={"train": str(tmp_path / "none")}))
    with ShardWriter(tmp_path / "silent") as writer:
        writer.write(Sample("one", coloured("red", 0), "png"))
    with pytest.raises(ValueError, match="missing_caption: 1"):
        finetune(recipe(world, tmp_path / "b", {"kind": "caption"}, data={"train": str(tmp_path / "silent")}))
    with pytest.raises(ValueError, match="missing_question: 1"):
        finetune(recipe(world, tmp_path / "c", {"kind": "vqa"}, data={"train": str(tmp_path / "silent")}))
    for name, entry in {
        "empty": {"question": " ", "answers": ["x"]},
        "mute": {"question": "x?", "answers": []},
    }.items():
        with ShardWriter(tmp_path / name) as writer:
            writer.write(Sample("one", coloured("red", 0), "png", ["x"], {"questions": [entry]}))
        with pytest.raises(ValueError, match="bad_question: 1"):
            finetune(recipe(world, tmp_path / "d", {"kind": "vqa"}, data={"train": str(tmp_path / name)}))
    with ShardWriter(tmp_path / "long") as writer:
        writer.write(Sample("one", coloured("red", 0), "png", ["word " * 200]))
    with pytest.raises(ValueError, match="text_too_long: 1"):
        finetune(recipe(world, tmp_path / "e", {"kind": "caption"}, data={"train": str(tmp_path / "long")}))


def test_a_held_out_question_that_does_not_fit_is_counted(world, tmp_path, coloured):
    """It is left out, and not the end of a run that has trained."""
    with ShardWriter(tmp_path / "val") as writer:
        for number, question in enumerate(["Is it red?", "why " * 100, "What colour is it?"]):
            entry = {"question": question, "answers": ["red"] * 10}
            writer.write(Sample(f"{number}", coloured("red", number), "png", ["x"], {"questions": [entry]}))
    data = {"val": str(tmp_path / "val"), "max_faults": 0.5}
    metrics = finetune(recipe(world, tmp_path / "run", {"kind": "vqa"}, data=data, steps=3))
    assert (metrics["questions"], metrics["images"]) == (2, 2)


def test_the_command(world, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe(world, tmp_path / "run", {"kind": "caption"}).model_dump(mode="json")))
    assert run_stage(main, [str(file), "--steps", "4"]) == 0
    assert (tmp_path / "run" / "recipe.resolved.yaml").is_file()
    assert run_stage(main, [str(file)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run_stage(main, ["no_such_recipe"]) == 2
    assert "scenes_caption" in capsys.readouterr().err
    assert run_stage(main, ["--help"]) == 0
    assert "scenes_vqa" in capsys.readouterr().out


@pytest.mark.dist
def test_two_processes_train_what_one_trains(world, torchrun, tmp_path):
    """The ranks hold unequal numbers of answer words; the loss is the mean over all of them."""
    one = recipe(
        world,
        tmp_path / "one",
        {"kind": "caption"},
        freeze_image_tower=False,
        language_model={"dropout": 0.0},
    )
    one_metrics = finetune(one)
    two = one.model_copy(update={"run": str(tmp_path / "two"), "processes": 2})
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps(two.model_dump(mode="json")))
    torchrun("-m", "finetune", file)
    ours = load_file(tmp_path / "one/checkpoints/step-00000008/model/connector.safetensors")
    theirs = load_file(tmp_path / "two/checkpoints/step-00000008/model/connector.safetensors")
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=2e-4), name
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-4)
    two_metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two_metrics["images"] == one_metrics["images"] == 12
    assert two_metrics["samples_seen"] == one_metrics["samples_seen"] == 64
