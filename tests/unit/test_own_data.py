"""A table of one's own to a task model in one command, with bad rows named by line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data.adapters.common import Row
from finetune.cli import main
from finetune.own_data import OwnData, write_shards
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
    resolved = yaml.safe_load((tmp_path / "run/recipe.resolved.yaml").read_text())
    assert resolved["data"]["max_faults"] == 0.2
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


def test_a_model_that_is_not_there_is_told_before_the_pictures_are_read(world, tmp_path, capsys):
    for model, message in ((str(world / "none"), "no folder"), ("ViT-B-33", "did you mean 'ViT-B-32'")):
        line = words(world, "caption", tmp_path / "run")
        line[line.index("--model") + 1] = model
        assert run_stage(main, line) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run-shards").exists()


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


def write(world: Path, tmp_path: Path, kind: str, content: str | bytes, **options) -> Path:
    """Shards of a table that has this content."""
    table, shards = tmp_path / "t.csv", tmp_path / "t-shards"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = {"images": world / "pictures", "max_faults": 0.5, **options}
    write_shards(kind, OwnData(data=table, model="m", **options), shards)
    return shards


LABELLED = "image,label\n" + "".join(f"{n}.png,{('red', 'blue')[n % 2]}\n" for n in range(12))


def test_labels_that_cannot_be_learnt_are_named_by_line(world, tmp_path, capsys):
    val = tmp_path / "val.csv"
    val.write_text("image,label\n13.png,red\n14.png,bleu\n15.png,blue\n16.png,blue\n")
    write(world, tmp_path, "classify", LABELLED, val_data=val)
    said = capsys.readouterr().err
    assert "val.csv:3: the label 'bleu' is none of the labels of the pictures to train on (blue, red)" in said
    assert "did you mean 'blue'?" in said
    assert "12 pictures to train on, 3 to measure on, 1 bad rows" in said


def test_a_label_of_one_row_is_trained_on_and_pointed_out(world, tmp_path, capsys):
    """Wherever it stands: held out, it would be unknown at the end of training."""
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        content = LABELLED + "".join(f"1{n}.png,grey\n" for n in range(3, 8))
        content = content.replace(f"\n{number}.png,{('red', 'blue')[number % 2]}", f"\n{number}.png,rad")
        write(world, tmp_path / str(number), "classify", content, val_share=0.5)
        said = capsys.readouterr().err
        assert f"labels of one row alone, a typo? 'rad' (t.csv:{number + 2})" in said
        assert "0 bad rows" in said


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            "classify",
            "image,label\n0.png,red\n1.png,red\n",
            r"t\.csv: expected at least two labels .*found red",
        ),
        ("flyp", "image,label\n0.png,red\n1.png,red\n", r"t\.csv: the table has 1 different labels"),
        (
            "classify",
            "image,label\n0.png,red\n1.png,blue\n",
            r"t\.csv: each label has one picture alone.*--val-data",
        ),
        ("caption", "", r"t\.csv is empty: expected a line of column names"),
        ("caption", "image,caption\n", r"t\.csv: 0 good pictures: expected at least two"),
        (
            "caption",
            "image,caption\n,a\nb.png,\n",
            r"(?s)t\.csv: 0 good pictures.*t\.csv:2: no picture.*t\.csv:3: noth",
        ),
        (
            "caption",
            "image,caption,caption\n1.png,a,b\n",
            r"2 columns are called 'caption': rename all but one",
        ),
        (
            "caption",
            b"image,caption\n1.png,a\n2.png,caf\xe9\n",
            r"t\.csv, line 3: .*byte 0xe9: save the file as UTF-8",
        ),
        (
            "caption",
            "image,caption\n1.png,a\n".encode("utf-16"),
            r"t\.csv, line 1: .*byte 0xff: save the file as",
        ),
    ],
)
def test_bad_tables_say_where_and_what_to_do(world, tmp_path, kind, content, message):
    with pytest.raises(ValueError, match=message):
        write(world, tmp_path, kind, content)
    assert not (tmp_path / "t-shards").exists()


def test_rows_of_unreadable_names_and_strange_labels_are_left_out(world, tmp_path, capsys):
    table = tmp_path / "t.jsonl"
    names = [f"{n}.png" for n in range(8)] + ["x" * 300 + ".png", "a\0b.png", "8.png", "9.png"]
    labels: list = ["red", "blue"] * 5 + [{"a": 1}, 0.5]
    lines = [{"image": name, "label": label} for name, label in zip(names, labels, strict=True)]
    table.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    own = OwnData(data=table, model="m", images=world / "pictures", max_faults=0.5, val_share=0.3)
    write_shards("classify", own, tmp_path / "shards")
    said = capsys.readouterr().err
    assert "4 bad rows" in said
    assert re.search(r"t\.jsonl:9: 'xxx.*cannot be read", said)
    assert re.search(r"t\.jsonl:10: 'a.*cannot be read", said)
    assert "t.jsonl:11: expected a label in the column 'label', got {'a': 1}" in said
    assert "t.jsonl:12: expected a label in the column 'label', got 0.5" in said
    with pytest.raises(ValueError, match="--epochs inf: expected a number"):
        write_shards("classify", replace(own, epochs=float("inf")), tmp_path / "other")


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
