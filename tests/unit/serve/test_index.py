"""Indexes as the retrieval stage writes them: several shards, deleted rows, one side alone; and labels of posts."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from data.shards import Sample, ShardWriter
from retrieval.build import build_index
from retrieval.job import finish_job, make_parts, plan_job, start_job
from retrieval.update import add_to_index, delete_from_index
from serve.app import create_app
from serve.models import load_models


def embed(encoder, shards, folder):
    """What `pairstream retrieval embed` does: one part a shard, samples numbered within it."""
    job = plan_job(encoder, str(shards))
    start_job(folder, job)
    make_parts(folder, job, encoder, range(len(job.shards)), workers=0)
    finish_job(folder, job)
    return folder


@pytest.fixture(scope="module")
def built(folders, models, tmp_path_factory):
    """An index on disk of two shards, from which the picture 00003 was deleted."""
    root = tmp_path_factory.mktemp("built")
    embed(models.encoder, folders["shards"], root / "rows")
    build_index(root / "rows", root / "index")
    delete_from_index(root / "index", ["00003"])
    return root


def test_rows_of_several_shards_are_their_pictures(folders, built, run_app, make_picture, picture_field):
    models = load_models(
        folders["model"], index=built / "index", data=(str(folders["shards"]),), device="cpu"
    )
    assert (models.index[1].images, models.index[1].texts) == (11, 22)
    with run_app(create_app(models)) as live:
        for number in (0, 10):  # of the first shard and of the second
            asked = {"image": picture_field(make_picture(number)), "among": "images", "k": 1}
            (hit,) = live.ask("/v1/search", asked)[1]["hits"]
            assert (hit["key"], hit["row"]) == (f"{number:05d}", number)
            picture = np.asarray(Image.open(io.BytesIO(live.ask(f"/v1/pictures/{number}")[1])), int)
            right = np.asarray(Image.open(io.BytesIO(make_picture(number))), int)
            assert np.abs(picture - right).mean() < 5
        assert live.ask("/v1/pictures/3")[0] == 404  # deleted
        hits = live.ask("/v1/search", {"text": "thing", "k": 100})[1]["hits"]
        assert len(hits) == 11
        assert 3 not in [hit["row"] for hit in hits]
        hits = live.ask("/v1/search", {"text": "thing 10", "among": "texts", "k": 100})[1]["hits"]
        assert len(hits) == 22
        assert all(hit["row"] == int(hit["key"]) for hit in hits)


def test_a_key_that_came_back_is_the_new_row(folders, built, models, tmp_path, make_picture):
    index = shutil.copytree(built / "index", tmp_path / "index")
    with ShardWriter(tmp_path / "more") as writer:
        writer.write(Sample("00003", make_picture(77), "jpg", ["thing 3 again"]))
    add_to_index(index, embed(models.encoder, tmp_path / "more", tmp_path / "rows"))
    found = load_models(folders["model"], index=index, device="cpu")
    assert found.picture_rows.row("00003") == 12
    assert found.picture_rows.row("nobody") is None


@pytest.mark.parametrize(("side", "other"), [("images", "texts"), ("texts", "images")])
def test_an_index_of_one_side(folders, built, tmp_path, run_app, side, other):
    build_index(built / "rows", tmp_path / "index", sides=(side,))
    models = load_models(folders["model"], index=tmp_path / "index", device="cpu")
    with run_app(create_app(models)) as live:
        assert live.ask("/v1/info")[1]["index"][other] == 0
        status, answer, _ = live.ask("/v1/search", {"text": "thing", "among": other})
        assert (status, answer["error"]["code"]) == (422, "not_indexed")
        hits = live.ask("/v1/search", {"text": "thing", "among": side})[1]["hits"]
        assert all((hit["row"] is None) == (side == "texts") for hit in hits)
    if side == "texts":
        with pytest.raises(ValueError, match="this index has texts alone"):
            load_models(
                folders["model"], index=tmp_path / "index", data=(str(folders["shards"]),), device="cpu"
            )


def test_a_key_of_two_samples_is_decided_by_its_number(folders, models, tmp_path, make_picture):
    for name, picture in (("a", 1), ("b", 2)):
        with ShardWriter(tmp_path / name) as writer:
            if name == "b":
                writer.write(Sample("first", make_picture(9), "jpg", ["first"]))
            writer.write(Sample("same", make_picture(picture), "jpg", ["same"]))
    build_index(embed(models.encoder, tmp_path / "b", tmp_path / "rows"), tmp_path / "index")
    both = (str(tmp_path / "a"), str(tmp_path / "b"))
    found = load_models(folders["model"], index=tmp_path / "index", data=both, device="cpu")
    assert found.gallery.samples.tolist() == [
        1,
        2,
    ]  # of `same`, number 0 in the first set and 1 in the second
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    twice = (str(tmp_path / "b"), str(tmp_path / "c"))
    with pytest.raises(
        ValueError, match="row 0 of the index is the sample 'first', of which there are several"
    ):
        load_models(folders["model"], index=tmp_path / "index", data=twice, device="cpu")


def test_posts_are_labelled_as_the_library_does(folders, models, live, make_picture, picture_field):
    classifier, identity = models.classifier
    content = make_picture(1, (50, 40), "PNG")
    posts = [
        {"image": picture_field(content), "text": "a red cat"},
        {"text": "two blue dogs"},
        {"image": picture_field(content)},
        {"image": picture_field(content), "text": " "},
    ]
    status, answer, _ = live.ask("/v1/sentiment", {"posts": posts})
    assert status == 200
    assert answer["model"] == identity.model_dump()
    assert identity.labels == ["negative", "neutral", "positive"]
    expected = classifier.classify(
        [content, None, content, content], ["a red cat", "two blue dogs", None, None]
    )
    for given, right in zip(answer["results"], expected, strict=True):
        assert {entry["label"]: entry["probability"] for entry in given} == pytest.approx(right, abs=1e-5)
        assert [entry["probability"] for entry in given] == sorted(right.values(), reverse=True)
    assert live.ask("/v1/info")[1]["classifier"]["labels"] == identity.labels
    for bad in ({}, {"text": " "}, {"image": None, "text": None}, {"text": 7}):
        status, answer, _ = live.ask("/v1/sentiment", {"posts": [bad]})
        assert (status, answer["error"]["code"]) == (422, "invalid"), bad
    assert live.ask("/v1/sentiment", {"posts": []})[0] == 422
    assert live.ask("/v1/sentiment", {"posts": [{"text": "a"}] * 257})[0] == 413


def test_a_classifier_of_another_kind_is_refused(folders):
    with pytest.raises(ValueError, match="not for classify"):
        load_models(folders["model"], classifier=folders["vqa"], device="cpu")
    with pytest.raises(FileNotFoundError):
        load_models(folders["model"], classifier=folders["shards"], device="cpu")
