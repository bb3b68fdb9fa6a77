"""The suite: a table for several models, a cache that never answers for something else, a page to look at."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.shards import Sample, ShardWriter
from pairstream.cli import main as pairstream
from pairstream.recipe import dump_recipe, load_recipe
from pretrain.encoder import Encoder, Normalize, load_encoder
from pretrain.evaluator import load_evaluator
from pretrain.recipe import Evaluation
from retrieval.cache import cache_key
from retrieval.evaluator import RetrievalEvaluator, SuiteEvaluator
from retrieval.labelled import LabelledPictures
from retrieval.probes import image_features, knn_probe
from retrieval.queries import compare_results
from retrieval.recipe import SuiteRecipe
from retrieval.suite import chances, folder_names, headline, run_task
from retrieval.suite_page import suite_report

CLASSES = ("dog", "hill", "red_bus")


@pytest.fixture
def sets(tmp_path, make_picture):
    """A recipe over a retrieval, a classification and a compositional set."""
    with ShardWriter(tmp_path / "pairs", samples_per_shard=7) as writer:
        for number in range(15):
            texts = [f"text {number}", f"another one of {number}"]
            writer.write(Sample(f"{number:03d}", make_picture(number), "jpg", texts))
    for number in range(12):
        place = tmp_path / "classes" / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(make_picture(100 + number))
    images = tmp_path / "crepe" / "images"
    images.mkdir(parents=True)
    (images / "a.jpg").write_bytes(make_picture(7))
    record = {"0": {"filename": "a.jpg", "caption": "a dog", "negative_caption": "a cat"}}
    (tmp_path / "crepe" / "swap_obj.json").write_text(json.dumps(record))
    content = {
        "out": str(tmp_path / "out"),
        "cache": str(tmp_path / "cache"),
        "batch_size": 4,
        "quick_limit": 6,
        "tasks": [
            {"kind": "retrieval", "name": "pairs", "data": str(tmp_path / "pairs"), "folds": 3},
            {"kind": "classification", "name": "classes", "data": str(tmp_path / "classes")},
            {
                "kind": "compositional",
                "name": "crepe",
                "set": "sugarcrepe",
                "folder": str(tmp_path / "crepe"),
            },
        ],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def forwards(monkeypatch):
    """How many pictures each task embeds."""
    counts = {"pictures": 0}
    real = Encoder.encode_images

    def counted(self, images):
        counts["pictures"] += len(images)
        return real(self, images)

    monkeypatch.setattr(Encoder, "encode_images", counted)
    return counts


def test_two_models_a_second_run_and_the_page(sets, tmp_path, forwards, capsys, small_encoder):
    models = [str(small_encoder(seed).save(tmp_path / f"m{seed}")) for seed in (0, 1)]
    words = ["retrieval", "suite", str(sets), "--model", models[0], "--model", models[1]]
    assert pairstream(words) == 0
    assert forwards["pictures"] == 2 * (15 + 12 + 1)
    printed = capsys.readouterr().out
    assert "from the cache" not in printed
    names = folder_names(models)
    first = {}
    for name in names:
        for task in ("pairs", "classes", "crepe"):
            metrics = json.loads((tmp_path / "out" / name / f"{task}.json").read_text())
            first[name, task] = metrics
            for key in ("fingerprint", "tokenizer", "dtype", "versions", "ties", "recipe_hash", "transform"):
                assert metrics[key], (task, key)
        assert first[name, "pairs"]["folds"]["images"] == 5
        assert first[name, "pairs"]["intervals"]["text_to_image"]["recall@1"]
    assert first[names[0], "pairs"]["fingerprint"] != first[names[1], "pairs"]["fingerprint"]
    assert first[names[0], "pairs"]["data_hash"] == first[names[1], "pairs"]["data_hash"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (
        "All numbers",
        "worst texts",
        "best texts",
        "recall against k",
        "confused most often",
        "pictures behind the confusions",
        "classes and what they were taken for",
        "Paired bootstrap and sign-flip test",
        *(f"{name}: worst texts" for name in names),
        "0.5000",
    ):
        assert text in page
    blocks = json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]
    table = next(block for block in blocks if block["kind"] == "table")
    assert table["header"] == ["task", "number", "chance", *names]
    row = next(row for row in table["rows"] if row[0] == "pairs" and row[1].startswith("text"))
    value = first[names[0], "pairs"]["retrieval"]["text_to_image"]["recall@1"]
    low, high = first[names[0], "pairs"]["intervals"]["text_to_image"]["recall@1"]
    assert row[3] == f"{value:.4f} ({low:.3f}–{high:.3f})"
    tested = next(block for block in blocks if block["kind"] == "table" and "p" in block["header"])
    paired = compare_results(*[tmp_path / "out" / name / "pairs.json" for name in names], resamples=2000)
    found = paired["text_to_image"]["recall@10"]
    shown = next(row for row in tested["rows"] if row[1] == "text to image recall@10")
    assert shown == [
        names[1],
        "text to image recall@10",
        f"{found['difference']:+.4f}",
        f"{found['low']:+.4f} to {found['high']:+.4f}",
        f"{found['p']:.4f}",
    ]
    numbers = first[names[0], "classes"]["classification"]
    wrong = [key for each in numbers["confusions"] for key in each["examples"]]
    assert all((tmp_path / "classes" / key).is_file() for key in wrong)
    assert sum(map(sum, numbers["confusion"])) == 12
    assert sum(numbers["confusion"][n][n] for n in range(3)) == round(12 * numbers["acc1"])
    results = [str(tmp_path / "out" / name / "pairs.json") for name in names]
    assert pairstream(["retrieval", "compare", *results, "--resamples", "200"]) == 0

    forwards["pictures"] = 0
    capsys.readouterr()
    assert pairstream(words) == 0
    assert forwards["pictures"] == 2  # the compositional set alone is embedded again
    assert capsys.readouterr().out.count("from the cache") == 4
    for (name, task), metrics in first.items():
        again = json.loads((tmp_path / "out" / name / f"{task}.json").read_text())
        assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


def test_quick_is_another_entry_and_runs_in_training(sets, forwards, small_encoder):
    recipe, encoder = load_recipe(SuiteRecipe, "retrieval", str(sets)), small_encoder(0)
    evaluator = load_evaluator(
        Evaluation(use="retrieval.evaluator:SuiteEvaluator", options={"recipe": str(sets)})
    )
    numbers = evaluator.run(encoder)
    assert forwards["pictures"] == 6 + 6 + 1
    assert {"pairs/text_to_image_recall@1", "classes/acc1", "crepe/accuracy"} <= set(numbers)
    quick = run_task(encoder, recipe.tasks[0], recipe, quick=True)
    assert quick.metrics["images"] == 6
    assert quick.metrics["quick"] is True


def test_no_key_answers_for_something_else(sets, tmp_path, make_picture, small_encoder):
    encoder, pairs = small_encoder(0), str(tmp_path / "pairs")
    base = cache_key(encoder, pairs, limit=None, kind="retrieval")
    assert cache_key(encoder, pairs, limit=None, kind="retrieval") == base
    moved = load_encoder(str(encoder.save(tmp_path / "copy")), device="cpu")
    assert cache_key(moved, pairs, limit=None, kind="retrieval") == base  # equal models, wherever they lie
    keys = {
        "weights": cache_key(small_encoder(1), pairs, limit=None, kind="retrieval"),
        "limit": cache_key(encoder, pairs, limit=5, kind="retrieval"),
        "data": cache_key(encoder, str(tmp_path / "classes"), limit=None, kind="retrieval"),
    }
    other = small_encoder(0)
    other.preprocess_cfg = {**other.preprocess_cfg, "resize_mode": "squash"}
    keys["transform"] = cache_key(other, pairs, limit=None, kind="retrieval")
    other = small_encoder(0)
    plain = other.tokenizer
    other.tokenizer = lambda texts: plain([text.upper() + "!" for text in texts])
    keys["tokenizer"] = cache_key(other, pairs, limit=None, kind="retrieval")
    other = small_encoder(0)
    other.tokenizer = copy.deepcopy(plain)
    first, second = (
        next(word for word in plain.encoder if word == f"{name}</w>") for name in ("zebra", "quilt")
    )
    ids = other.tokenizer.encoder
    ids[first], ids[second] = ids[second], ids[first]  # two words that no probe has
    keys["vocabulary"] = cache_key(other, pairs, limit=None, kind="retrieval")
    other = small_encoder(0)
    other.transform = replace(other.transform, resize_mode="squash")  # behind the configuration's back
    keys["applied transform"] = cache_key(other, pairs, limit=None, kind="retrieval")
    other = small_encoder(0)
    other.normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    keys["applied constants"] = cache_key(other, pairs, limit=None, kind="retrieval")
    other = small_encoder(0)
    other.model.bfloat16()
    keys["precision"] = cache_key(other, pairs, limit=None, kind="retrieval")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys["autocast"] = cache_key(encoder, pairs, limit=None, kind="retrieval")
    with torch.no_grad():
        encoder.model.logit_scale.add_(1e-6)
    keys["one changed bit"] = cache_key(encoder, pairs, limit=None, kind="retrieval")
    assert len({base, *keys.values()}) == len(keys) + 1, keys


def test_changed_data_and_damaged_entries_are_embedded_again(
    sets, tmp_path, forwards, make_picture, small_encoder
):
    recipe, encoder, cache = (
        load_recipe(SuiteRecipe, "retrieval", str(sets)),
        small_encoder(0),
        tmp_path / "cache",
    )

    def both():
        forwards["pictures"] = 0
        results = [run_task(encoder, task, recipe, cache=cache) for task in recipe.tasks[:2]]
        return forwards["pictures"], [result.from_cache for result in results]

    assert both() == (27, [False, False])
    assert both() == (0, [True, True])
    # One picture of each set is another one; names, sizes on disk and the manifest are as before.
    shard = tmp_path / "pairs" / "00000.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"text 0")
    content[place : place + 6] = b"text 9"
    shard.write_bytes(content)
    picture = tmp_path / "classes" / "dog" / "0.jpg"
    picture.write_bytes(make_picture(55))
    assert both() == (27, [False, False])
    entries = sorted(cache.iterdir())
    for entry in entries:
        for file in entry.rglob("*.npy"):
            rows = bytearray(file.read_bytes())
            rows[-1] ^= 1
            file.write_bytes(rows)
    assert both() == (27, [False, False])  # a checksum each: damaged entries are never used
    assert both() == (0, [True, True])


def test_data_that_moved_is_found_in_the_cache_and_shown_from_its_new_place(
    sets, tmp_path, forwards, small_encoder
):
    recipe, encoder, cache = (
        load_recipe(SuiteRecipe, "retrieval", str(sets)),
        small_encoder(0),
        tmp_path / "cache",
    )
    run_task(encoder, recipe.tasks[0], recipe, cache=cache)
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    task = recipe.tasks[0].model_copy(update={"data": str(tmp_path / "elsewhere")})
    forwards["pictures"] = 0
    again = run_task(encoder, task, recipe, cache=cache)
    assert (again.from_cache, forwards["pictures"]) == (True, 0)
    assert again.metrics["data"] == [str(tmp_path / "elsewhere")]
    assert "worst texts" in suite_report(["m"], [[again]]).html()  # its pictures are read again


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_probes_are_tasks_and_embed_once(tmp_path, forwards, make_picture, small_encoder, form):
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 12)):
        pictures = [(number % 3, make_picture(int(rng.integers(1000)))) for number in range(count)]
        if form == "shards":
            with ShardWriter(tmp_path / split) as writer:
                for number, (label, content) in enumerate(pictures):
                    writer.write(Sample(f"{number:03d}", content, "jpg", ["x"], {"label": label}))
            continue
        for number, (label, content) in enumerate(pictures):
            place = tmp_path / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03d}.jpg").write_bytes(content)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    classes = str(tmp_path / "names.txt") if form == "shards" else None
    tasks = [
        {
            "kind": "probe",
            "name": name,
            "probe": name,
            "train": str(tmp_path / "train"),
            "test": str(tmp_path / "test"),
            "classes": classes,
        }
        for name in ("linear", "knn", "few_shot")
    ]
    recipe = SuiteRecipe.model_validate({"out": str(tmp_path / "out"), "tasks": tasks})
    encoder, cache = small_encoder(0), tmp_path / "cache"
    found = [run_task(encoder, task, recipe, cache=cache) for task in recipe.tasks]
    assert [each.from_cache for each in found] == [False, True, True]
    numbers = {each.task.name: each.metrics["probe"] for each in found}
    for each in numbers.values():
        assert (each["train_pictures"], each["test_pictures"], each["chance"]) == (30, 12, 1 / 3)
        assert 0 <= each["accuracy"] <= 1
    assert list(numbers["few_shot"]["shots"]) == ["1", "2", "4", "8"]  # ten pictures of each class
    assert found[0].metrics["features"] == "before_projection"
    loaded = LabelledPictures(str(tmp_path / "train"), encoder.transform)
    rows = torch.cat([image_features(encoder, batch.images) for batch in loaded.batches()])
    labels = [label for batch in loaded.batches() for label in batch.labels]
    other = LabelledPictures(str(tmp_path / "test"), encoder.transform)
    test = torch.cat([image_features(encoder, batch.images) for batch in other.batches()])
    target = [label for batch in other.batches() for label in batch.labels]
    expected = knn_probe(rows, labels, test, target, 3, k=20)
    assert numbers["knn"]["accuracy"] == pytest.approx(expected["accuracy"])
    page = suite_report(["m"], [found]).html()
    for words in ("weight of the L2 term", "accuracy by pictures of each class", "30 pictures to fit on"):
        assert words in page
    assert headline(found[0].metrics).keys() <= chances(found[0].metrics).keys()
    if form == "shards":
        unnamed = recipe.tasks[0].model_copy(update={"classes": None})
        with pytest.raises(ValueError, match="task linear: shards do not name their classes: give `classes`"):
            run_task(encoder, unnamed, recipe)
        return
    (tmp_path / "test" / CLASSES[0]).rename(tmp_path / "test" / "zebra")
    with pytest.raises(ValueError, match=r"train and test have other class folders: .*zebra"):
        run_task(encoder, recipe.tasks[0], recipe)


def test_several_labels_show_the_precision_of_classes(tmp_path, make_picture, small_encoder):
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(8):
            labels = [number % 3, *([3] if number % 2 else [])]
            writer.write(Sample(f"{number:03d}", make_picture(number), "jpg", ["x"], {"label": labels}))
    (tmp_path / "names.json").write_text(json.dumps(["one", "two", "three", "four", "never"]))
    task = {
        "kind": "classification",
        "name": "voc",
        "data": str(tmp_path / "set"),
        "classes": str(tmp_path / "names.json"),
    }
    recipe = SuiteRecipe.model_validate({"out": str(tmp_path / "out"), "tasks": [task]})
    result = run_task(small_encoder(0), recipe.tasks[0], recipe)
    blocks = suite_report(["m"], [[result]]).blocks
    (table,) = [b for b in blocks if b["kind"] == "table" and b["header"] == ["class", "average precision"]]
    assert {row[0] for row in table["rows"]} == {"one", "two", "three", "four"}
    values = [float(row[1]) for row in table["rows"]]
    assert values == sorted(values, reverse=True)
    probe = {
        "kind": "probe",
        "name": "p",
        "train": task["data"],
        "test": task["data"],
        "classes": task["classes"],
    }
    recipe = SuiteRecipe.model_validate({"out": str(tmp_path / "out"), "tasks": [probe]})
    with pytest.raises(ValueError, match="sample '001' has 2 labels, a probe needs exactly one"):
        run_task(small_encoder(0), recipe.tasks[0], recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "at least 1 item"),
        ({"tasks": [{"kind": "retrieval", "name": "a/b", "data": "x"}]}, "task name 'a/b'"),
        ({"tasks": [{"kind": "retrieval", "name": "a", "data": "x"}] * 2}, "'a' is given twice"),
        ({"tasks": [{"kind": "retrieval", "name": "a", "data": "x", "limits": 3}]}, "did you mean 'limit'"),
        ({"quick_limit": 0}, "quick_limit"),
    ],
)
def test_bad_recipes_are_refused(sets, change, message):
    content = {**yaml.safe_load(sets.read_text()), **change}
    sets.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_recipe(SuiteRecipe, "retrieval", str(sets))


def test_carried_recipe_and_names_of_folders(tmp_path, capsys):
    recipe = load_recipe(SuiteRecipe, "retrieval", "zero_shot")
    assert [task.kind for task in recipe.tasks] == ["retrieval", "classification", "compositional"]
    dump_recipe(recipe, tmp_path / "recipe.resolved.yaml")
    assert load_recipe(SuiteRecipe, "retrieval", str(tmp_path / "recipe.resolved.yaml")) == recipe
    assert folder_names(["runs/a/model", "runs/b/model", "runs/a/model"]) == [
        "a-model",
        "b-model",
        "a-model-2",
    ]
    assert folder_names(["hf-hub:org/repo", "ViT-B-32", "../x"]) == ["org-repo", "ViT-B-32", "x"]
    assert pairstream(["retrieval", "suite", "zero_shoot", "--model", "m"]) == 2
    assert "did you mean 'zero_shot'" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("")
    assert pairstream(["retrieval", "suite", "zero_shot", "--model", "m", "--out", str(tmp_path)]) == 2
    assert "holds a training run" in capsys.readouterr().err


def test_rows_from_the_cache_are_those_of_the_encoder(sets, tmp_path, make_picture, small_encoder):
    recipe, encoder, cache = (
        load_recipe(SuiteRecipe, "retrieval", str(sets)),
        small_encoder(0),
        tmp_path / "cache",
    )
    fresh = [run_task(encoder, recipe.tasks[0], recipe, cache=cache) for _ in range(2)]
    assert [each.from_cache for each in fresh] == [False, True]
    rows = [np.asarray(each.evaluation.embeddings.images) for each in fresh]
    assert np.array_equal(*rows)
    direct = encoder.encode_images([make_picture(number) for number in range(15)]).numpy()
    np.testing.assert_allclose(rows[0], direct, atol=1e-5)


@pytest.mark.dist
def test_processes_share_the_work_and_all_get_the_numbers_of_one(sets, tmp_path, small_encoder, run_ranks):
    encoder = load_encoder(small_encoder(0).save(tmp_path / "model"), device="cpu")
    alone = {
        "pairs": RetrievalEvaluator(str(tmp_path / "pairs"), batch_size=4).run(encoder),
        "suite": SuiteEvaluator(str(sets), quick=False).run(encoder),
    }
    run_ranks(Path(__file__).with_name("suite_worker.py"), tmp_path, 2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["suite"] for rank in ranks] == [alone["suite"]] * 2
    assert ranks[0]["pairs"] == ranks[1]["pairs"]
    assert ranks[0]["pairs"] == pytest.approx(alone["pairs"], rel=1e-5)  # float32 rows of other batches
    # 15 pictures in three shards, by fours: batches of 4, 3, 4, 3 and 1.
    assert [rank["encoded_of_pairs"]["images"] for rank in ranks] == [7, 8]
    assert sum(rank["encoded_of_pairs"]["texts"] for rank in ranks) == 30
    # And in the suite 15, 12 and 1 of its three tasks; prompts and captions are few and belong to one of the two.
    assert sum(rank["encoded"]["images"] for rank in ranks) == 15 + 28
    # One of twelve bad pictures is too many. The process that meets it says so, and the other does not wait for it.
    told, met = sorted(rank["error"] for rank in ranks)
    assert re.match(
        r"RuntimeError: process [01] of 2 failed in its share of an evaluation: ValueError: ", told
    )
    assert met.startswith("ValueError: ")
    assert told.endswith(met)
