"""Answers from a list, matching, several labels: targets by hand, training to a number, resuming, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.shards import Sample, ShardWriter
from finetune.fusion.answers import Choosing
from finetune.fusion.matching import Matching
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ChooseTask, ClassifyTask, MatchTask
from finetune.fusion.samples import FusionCollate, Text, soft_target, wrong_captions
from finetune.fusion.saved import load_classifier
from finetune.predict import predict
from finetune.recipe import FinetuneRecipe
from finetune.samples import Question
from finetune.trainer import Finetuner
from finetune.vqa_accuracy import question_accuracy
from pairstream.recipe import validate

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, coloured) -> Path:
    """Coloured pictures with a caption, two questions, and labels of which there may be several."""
    root = tmp_path_factory.mktemp("fusion_tasks")
    names = COLOURS
    for split, count in (("train", 48), ("val", 18)):
        with ShardWriter(root / split, samples_per_shard=24) as writer:
            for number in range(count):
                colour, warm = names[number % 3], number % 2 == 0
                answers = [colour] * 8 + ["dark", "The Colour"]
                questions = [
                    {"question": "what colour", "answers": answers},
                    {"question": "is it red", "answers": ["yes" if colour == "red" else "no"] * 10},
                ]
                labels = [colour, *(["warm"] if warm else [])] if number % 8 != 7 else []
                record = {
                    "questions": questions,
                    "tags": labels if number % 4 else "|".join(labels),
                    "text": "so warm" if warm else "so cold",
                }
                picture = coloured(colour, number + 1000 * (split == "val"))
                writer.write(Sample(f"{number:03d}", picture, "png", [f"all {colour}"], record))
    small_encoder(width=16, context=8).save(root / "encoder")
    return root


def recipe(world: Path, run: Path, task: dict, **changes) -> FinetuneRecipe:
    content = {
        "run": str(run),
        "model": {"name": str(world / "encoder")},
        "task": {"fusion": {"kind": "concat", "width": 32}, **task},
        "data": {"train": str(world / "train"), "val": str(world / "val"), **changes.pop("data", {})},
        "batch_size": 16,
        "steps": 8,
        "tower_lr": 1.0,
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "log_every": 4,
        **changes,
    }
    return validate(FinetuneRecipe, content, "test")


def test_soft_targets_are_the_accuracy_of_each_answer():
    answers = ["two"] * 3 + ["2"] + ["a dog"] * 2 + ["cat"] + ["x", "y", "z"]
    place = {"2": 0, "dog": 1, "cat": 2, "bird": 3}
    target = soft_target(answers, place)
    assert target.tolist() == pytest.approx([1.0, 0.6, 0.3, 0.0])
    assert target.tolist() == pytest.approx([question_accuracy(name, answers, "fixed") for name in place])
    assert soft_target(["cat"], place).tolist() == [0, 0, 1, 0]


def test_the_list_has_the_most_frequent_answers_and_says_how_far_they_reach():
    rows = [[Question(n, "q", [name] * 10, {})] for n, name in enumerate(["b", "b", "two", "2", "c", "a"])]
    choosing = Choosing(ChooseTask(answers=3, occurrences=1))
    choosing.learn(rows)
    assert choosing.labels == ("2", "b", "c")  # "a" is nothing once it is normalised
    assert choosing.shares == (2 / 5, 2 / 5, 1 / 5)
    judged = [
        {"judged_by": [Question(0, "q", ["two"] * 10, {})], "written": ["2"], "unseen": ["b"]},
        {"judged_by": [Question(1, "q", ["unheard of"] * 10, {})], "written": ["b"], "unseen": ["b"]},
    ]
    numbers = choosing.score(judged)
    assert (numbers["accuracy"], numbers["reachable"], numbers["text_only"]) == (0.5, 0.5, 0.0)
    with pytest.raises(ValueError, match="1 of 3 training answers are right for at least 3 questions"):
        Choosing(ChooseTask(occurrences=3)).learn([*rows[:2], *rows[:1], rows[2], rows[4]])


def test_answers_begin_as_often_right_as_they_are_in_training(world, tmp_path):
    model = Finetuner(recipe(world, tmp_path / "run", {"kind": "choose"})).model
    begun = dict(zip(model.labels, model.output.bias.sigmoid().tolist(), strict=True))
    shares = {"no": 32 / 96, "yes": 16 / 96, **dict.fromkeys(COLOURS, 16 / 96)}
    assert begun == pytest.approx(shares, abs=1e-6)


def test_what_is_said_of_one_modality_alone_was_trained(world, tmp_path):
    """A model that never trained with one of them missing answers from vectors that are still random."""
    for share in (0.0, 0.1):
        task = {"kind": "choose", "modality_dropout": share}
        metrics = Finetuner(recipe(world, tmp_path / f"choose-{share}", task, steps=3)).train()
        assert ("text_only" in metrics) == bool(share)
        page = (tmp_path / f"choose-{share}/report.html").read_text()
        assert ("The same model without the picture" in page) == bool(share)
    task = {"kind": "classify", "several": True, "label_key": "tags", "modality_dropout": 0.0}
    metrics = Finetuner(recipe(world, tmp_path / "classify", task, steps=3)).train()
    assert not {"image_only", "text_only"} & set(metrics)
    task |= {"text_key": "note"}  # no sample has one: the picture alone is all that was trained
    metrics = Finetuner(recipe(world, tmp_path / "pictures", task, steps=3)).train()
    assert metrics["image_only"] == metrics["macro_f1"]
    assert "text_only" not in metrics


def test_the_loss_of_soft_targets_is_a_plain_loop(make_picture, small_encoder):
    torch.manual_seed(1)
    model = FusionClassifier(
        small_encoder(width=16, context=8), ChooseTask(dropout=0.0), ["x", "y", "z"]
    ).eval()
    images = torch.stack([model.encoder.preprocess(make_picture(seed)) for seed in range(2)])
    text, no = model.encoder.tokenize(["a", "b", "c"]), torch.zeros(3).bool()
    labels = torch.tensor([[0.3, 1.0, 0.0], [-100.0] * 3, [0.0, 0.6, 0.9]])
    owners = torch.tensor([1, 0, 0])
    with torch.no_grad():
        loss = model(text, no, labels, images=images, image_of_text=owners)
        again = model(
            text[[2, 0, 1]], no, labels, images=images, image_of_text=owners, text_of=torch.tensor([1, 2, 0])
        )
        logits = model.logits(model.image_features(images)[owners], text, no, no).double()
    expected = -sum(
        float(y * torch.sigmoid(x).log() + (1 - y) * torch.sigmoid(-x).log())
        for row in (0, 2)
        for x, y in zip(logits[row], labels[row].double(), strict=True)
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert int(model.targets(labels)) == 2
    assert int(model.targets(torch.tensor([1, -100, 0]))) == 2


def test_wrong_captions_are_never_right_ones():
    rows = [("a", frozenset("ab")), ("b", frozenset("b")), ("a", frozenset("a")), ("c", frozenset("c"))]
    assert wrong_captions(rows, 1) == [[3], [2], [3], [0]]
    assert wrong_captions(rows, 3) == [[3], [2, 3, 0], [3, 1], [0, 1, 2]]
    tokens = [torch.tensor([number]) for number in range(4)]
    batch = FusionCollate((2, 2), pictures=False, negatives=1)(
        [(None, [Text(token, False, row)]) for token, row in zip(tokens, rows, strict=True)]
    )
    assert batch["text"][:, 0].tolist() == [0, 1, 2, 3]  # each is read once, however many samples have it
    assert batch["text"][batch["text_of"], 0].tolist() == [0, 3, 1, 2, 2, 3, 3, 0]
    assert batch["image_of_text"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch["labels"].tolist() == [1, 0] * 4
    empty = FusionCollate((2, 2), negatives=1)([])
    assert len(empty["labels"]) == len(empty["text"]) == len(empty["images"]) == 0


def test_answers_are_learnt_resumed_and_predicted(world, tmp_path, dies_of_saving, coloured):
    task = {"kind": "choose", "questions": 2}
    changes = {"steps": 60, "checkpoint": {"every": 30}, "data": {"cache_image_tokens": True}}
    metrics = Finetuner(recipe(world, tmp_path / "run", task, **changes)).train()
    assert metrics["accuracy"] > 0.95
    assert metrics["accuracy"] > metrics["question_only_baseline"] + 0.2
    assert "text_only" not in metrics  # nothing was trained without the picture
    assert (metrics["answers"], metrics["reachable"]) == (5, 1.0)
    model = load_classifier(tmp_path / "run", device="cpu")
    pictures = [coloured("blue", 7), coloured("red", 8)]
    assert model.answer(pictures, ["what colour", "is it red"]) == ["blue", "yes"]
    with pytest.raises(ValueError, match="empty question"):
        model.answer(pictures, ["what colour", " "])
    with pytest.raises(ValueError, match="trained for choose: use classify"):
        model.match(pictures, ["a", "b"])
    predict(
        model=tmp_path / "run",
        images=(str(world / "val"),),
        out=tmp_path / "F.jsonl",
        device="cpu",
        batch_size=5,
    )
    lines = [json.loads(line) for line in (tmp_path / "F.jsonl").read_text().splitlines()]
    kept = json.loads((tmp_path / "run/predictions.json").read_text())
    assert [line["answer"] for line in lines] == [entry["answer"] for entry in kept]

    killed = recipe(world, tmp_path / "killed", task, **changes)
    with dies_of_saving():
        Finetuner(killed).train()
    Finetuner(killed, resume=True).train()
    for name in ("fusion.safetensors", "encoder/open_clip_model.safetensors"):
        straight, resumed = (
            (tmp_path / folder / "checkpoints/step-00000060/model" / name).read_bytes()
            for folder in ("run", "killed")
        )
        assert straight == resumed, name


def test_matching_is_learnt(world, tmp_path, coloured):
    task = {"kind": "match", "negatives": 2, "fusion": {"kind": "product", "width": 32}}
    metrics = Finetuner(recipe(world, tmp_path / "run", task, steps=60)).train()
    assert metrics["accuracy"] > 0.9
    assert metrics["majority_baseline"] == pytest.approx(0.5)
    assert metrics["samples"] == 36
    model = load_classifier(tmp_path / "run", device="cpu")
    right, wrong = model.match([coloured("red", 1), coloured("red", 1)], ["all red", "all blue"])
    assert wrong < 0.5 < right
    with pytest.raises(ValueError, match="tells whether texts match"):
        predict(model=tmp_path / "run", images=(str(world / "val"),), out=tmp_path / "F.jsonl")
    with pytest.raises(ValueError, match="trained for match: use classify"):
        model.answer([coloured("red", 1)], ["what"])
    with pytest.raises(ValueError, match="all training captions are the same"):
        Matching(MatchTask()).learn([["x"], ["x"]])


def test_several_labels_are_learnt(world, tmp_path, coloured):
    task = {"kind": "classify", "several": True, "label_key": "tags", "class_weights": "balanced"}
    metrics = Finetuner(recipe(world, tmp_path / "run", task, steps=80)).train()
    assert metrics["macro_f1"] > 0.8
    assert metrics["macro_f1"] > metrics["majority_baseline"] + 0.3
    assert set(metrics["labels"]) == {*COLOURS, "warm"}
    assert metrics["images"] == 18
    kept = json.loads((tmp_path / "run/predictions.json").read_text())
    assert set(kept[0]) == {"image_id", "labels", "probabilities"}
    model = load_classifier(tmp_path / "run", device="cpu")
    [found] = model.classify([coloured("green", 3)], ["so warm"])
    assert {name for name, value in found.items() if value > 0.5} == {"green", "warm"}
    page = (tmp_path / "run/report.html").read_text()
    assert "average precision" in page
    assert "Calibration" in page


def test_labels_that_are_none(world, tmp_path, make_picture):
    task = {"kind": "classify", "several": True, "label_key": "tags"}
    with ShardWriter(tmp_path / "bad") as writer:
        writer.write(Sample("k", make_picture(0), "jpg", ["x"], {"tags": ["red", 3.5]}))
    with pytest.raises(ValueError, match="bad_label"):
        Finetuner(recipe(world, tmp_path / "r", task, data={"train": str(tmp_path / "bad")}))
    assert ClassifyTask(several=True, labels=("one",)).labels == ("one",)
    with pytest.raises(ValueError, match="two or more different names"):
        recipe(world, tmp_path / "r", {"kind": "classify", "labels": ["one"]})
