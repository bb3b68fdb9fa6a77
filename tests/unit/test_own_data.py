"""A table of one's own to a task model in one command, with bad rows named by line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from data.adapters.common import Row
from finetune.cli import main
from finetune.own_data import OwnData
from finetune.own_table import class_names, classes_of, read_table, split
from pairstream.cli import run_stage
from pretrain.encoder import load_encoder


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, coloured) -> Path:
    root = tmp_path_factory.mktemp("own")
    (root / "pictures").mkdir()
    rows = ["image,caption,label,question,answer"]
    for number in range(20):
        colour = ("red", "blue")[number % 2]
        (root / f"pictures/{number}.png").write_bytes(coloured(colour, number))
        rows.append(f"{number}.png,all {colour} é,{colour},what colour?,{colour}")
    rows.insert(5, "3.png,too,few")
    rows.insert(9, "missing.png,a text,red,what?,x")
    rows.append("4.png,  ,,,")
    (root / "broken.png").write_bytes(b"x")
    (root / "my.csv").write_text("\n".join(rows), encoding="utf-8")
    small_encoder(width=16, context=8).save(root / "encoder")
    return root


def words(world: Path, kind: str, out: Path, *more: str) -> list[str]:
    table, pictures, model = world / "my.csv", world / "pictures", world / "encoder"
    base = [kind, "--data", str(table), "--images", str(pictures), "--model", str(model), "--out", str(out)]
    return [*base, "--max-faults", "0.2", *more]


SMALL = ["--language-model.width", "32", "--language-model.layers", "1", "--language-model.heads", "2"]


def test_captions_in_one_command(world, tmp_path, capsys):
    more = [*SMALL, "--epochs", "3", "--val-share", "0.2", "--decoding.num-beams", "1"]
    assert run_stage(main, words(world, "caption", tmp_path / "run", *more)) == 0
    said = capsys.readouterr().err
    assert "my.csv:6: expected 5 values, got 3" in said
    assert "my.csv:10: no picture" in said
    assert "my.csv:24: nothing in the column 'caption'" in said
    found = re.search(r"(\d+) pictures to train on, (\d+) to measure on, 3 bad rows", said)
    assert found is not None
    train, val = map(int, found.groups())
    assert (train + val, val in (3, 4)) == (20, True)  # the missing one may have been to measure on
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["steps"], metrics["images"]) == (3, val)  # all pictures are one batch
    assert run_stage(main, words(world, "caption", tmp_path / "run", *more)) == 2
    assert "an earlier run made it" in capsys.readouterr().err


def test_labels_in_one_command(world, tmp_path, capsys):
    more = [
        "--label-column",
        "label",
        "--text-column",
        "caption",
        "--steps",
        "2",
        "--batch-size=8",
        "--schedule.warmup",
        "1",
    ]
    assert run_stage(main, words(world, "classify", tmp_path / "run", *more)) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["task"], metrics["labels"]) == ("classify", ["blue", "red"])
    assert metrics["images"] in (1, 2)  # a tenth, of which the missing picture may be one
    capsys.readouterr()
    assert run_stage(main, words(world, "classify", tmp_path / "other", "--label-column", "lable")) == 2
    assert "did you mean 'label'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_stage(main, words(world, "classify", tmp_path / "other", "--stepz", "3"))
    assert "--steps" in capsys.readouterr().err
    assert run_stage(main, words(world, "classify", tmp_path / "other")[:-2]) == 2
    assert "3 of 23 rows are bad, more than --max-faults 0.05 allows" in capsys.readouterr().err
    assert not (tmp_path / "other-shards").exists()


def test_nothing_to_measure_on_and_no_epochs_are_told(world, tmp_path, capsys):
    other = tmp_path / "val.csv"
    other.write_text("image,caption\nbroken.png,a text\n")
    (world / "pictures/broken.png").write_bytes(b"x")
    more = ["--val-data", str(other), "--max-faults", "0.9"]
    assert run_stage(main, words(world, "caption", tmp_path / "run", *more)) == 2
    assert f"{other}: no picture to measure on" in capsys.readouterr().err
    assert run_stage(main, words(world, "caption", tmp_path / "run", "--epochs", "0")) == 2
    assert "--epochs 0: expected a number above 0" in capsys.readouterr().err


def test_tables_are_read_by_kind(world, tmp_path):
    faults = []
    own = OwnData(data=world / "my.csv", model="m", images=world / "pictures")
    rows = read_table("vqa", own, own.data, faults)
    assert rows[0].meta == {"questions": [{"question": "what colour?", "answers": ["red"] * 10}]}
    table = tmp_path / "rows.jsonl"
    lines = [
        {"path": "1.png", "question": "a?", "answers": ["x", "y"]},
        {"path": "1.png", "question": "b?", "answers": "z"},
        {"path": "2.png", "question": "", "answers": "z"},
        {"path": "2.png", "question": 3, "answers": "z"},
        {"path": "", "question": "c?", "answers": "z"},
    ]
    table.write_text("\n".join(map(json.dumps, lines)))
    faults = []
    [row] = read_table("vqa", OwnData(data=table, model="m"), table, faults)
    assert [len(entry["answers"]) for entry in row.meta["questions"]] == [2, 10]
    assert [fault.where for fault in faults] == ["rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5"]
    bare = tmp_path / "bare.csv"
    bare.write_text("image,label\n1.png,red\n1.png,blue\n")
    rows = read_table("classify", OwnData(data=bare, model="m"), bare, [])
    assert [row.meta for row in rows] == [{"label": "red"}, {"label": "blue"}]  # two samples of one picture
    with pytest.raises(ValueError, match="1 good pictures: expected at least two"):
        split(rows, 0.5)
    with pytest.raises(FileNotFoundError, match="no table"):
        read_table("vqa", own, tmp_path / "none.csv", [])
    with pytest.raises(FileNotFoundError, match="expected --images to be where"):
        read_table("vqa", OwnData(data=table, model="m", images=tmp_path / "none"), table, [])


def test_answers_of_a_table_are_texts(tmp_path):
    table, faults = tmp_path / "rows.jsonl", []
    answers = [[2, 2, 3], ["a", " "], [{"answer": "a"}], 4]
    lines = [
        {"path": f"{number}.png", "question": "a?", "answers": each} for number, each in enumerate(answers)
    ]
    table.write_text("\n".join(map(json.dumps, lines)))
    rows = read_table("vqa", OwnData(data=table, model="m"), table, faults)
    assert [row.meta["questions"][0]["answers"] for row in rows] == [["2", "2", "3"], ["4"] * 10]
    assert [fault.where for fault in faults] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert "expected answers in the column 'answers', got ['a', ' ']" in faults[0].why


def test_no_picture_is_on_both_sides(world):
    own = OwnData(data=world / "my.csv", model="m", images=world / "pictures")
    rows = read_table("classify", own, own.data, [])
    train, val = split([*rows, *rows], 0.25)
    assert not {row.name for row in train} & {row.name for row in val}
    assert len(train) + len(val) == 2 * len(rows)
    assert split(list(reversed(rows)), 0.25)[1] == list(reversed(split(rows, 0.25)[1]))


def test_towers_for_retrieval_in_one_command(world, tmp_path, fresh_accelerate, capsys):
    more = ["--steps", "2", "--val-share", "0.2", "--data.workers", "0"]
    assert run_stage(main, words(world, "retrieval", tmp_path / "run", *more)) == 0
    assert re.search(r"1[567] pictures to train on, [345] to measure on", capsys.readouterr().err)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 < metrics["evaluation"]["text_to_image/recall@10"] <= 1
    before, after = load_encoder(world / "encoder"), load_encoder(tmp_path / "run")
    assert before.fingerprint != after.fingerprint


def test_towers_for_zero_shot_classes_in_one_command(world, tmp_path, fresh_accelerate):
    """FLYP: prompts of the labels are learnt, and pictures kept apart are judged by the same prompts."""
    more = ["--steps", "40", "--optim.lr", "3e-3", "--val-share", "0.3", "--data.workers", "0"]
    more += ["--data.labels.templates", "the colour {}", "all of it {}"]
    assert run_stage(main, words(world, "flyp", tmp_path / "run", *more)) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["evaluation"]["classification/acc1"] == 1.0
    recipe = yaml.safe_load((tmp_path / "run/recipe.resolved.yaml").read_text())
    assert recipe["data"]["labels"] == {
        "key": "label",
        "templates": ["the colour {}", "all of it {}"],
        "classes": ["blue", "red"],
    }
    assert (tmp_path / "run-shards/templates.txt").read_text() == "the colour {}\nall of it {}\n"
    one = tmp_path / "one.csv"
    one.write_text("image,label\n1.png,blue\n3.png,blue\n5.png,blue")
    again = words(world, "flyp", tmp_path / "other", "--data", str(one))
    assert run_stage(main, again) == 2


def test_classes_are_names_on_one_line():
    assert class_names(["a\n b", 3]) == ["a b", "3"]
    with pytest.raises(ValueError, match="expected class names, got"):
        class_names(["a", " "])
    row = Row("1.png", "1.png", "t:1", meta={"label": "a"})
    with pytest.raises(ValueError, match="1 different labels: expected at least two classes"):
        classes_of([row])
