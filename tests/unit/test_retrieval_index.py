"""The FAISS side: agreement with exact ranks, and refusal of everything that would search wrongly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from retrieval.artifact import new_artifact, read_artifact, refuse_to_replace
from retrieval.embed import Embeddings
from retrieval.index import Index, flat_index, top_k
from retrieval.metrics import retrieval_ranks
from retrieval.side import Segment, Side


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def made(seed=0, images=120, captions=3, dim=24, fingerprint="aaaa") -> Embeddings:
    rng = np.random.default_rng(seed)
    image = unit(rng.standard_normal((images, dim)))
    owner = np.arange(images).repeat(captions)
    text = unit(0.5 * image[owner] + 0.2 * rng.standard_normal((len(owner), dim)))
    return Embeddings(
        images=image,
        texts=text,
        image_of_text=owner,
        keys=[f"{number:05d}" for number in range(images)],
        samples=np.arange(images),
        captions=[f"text {number}" for number in range(len(owner))],
        model="small",
        fingerprint=fingerprint,
        shards=["set"],
        faults={"undecodable_image": 2},
    )


def test_faiss_and_the_exact_ranks_agree():
    found = made(images=400)
    rankings = retrieval_ranks(found.images, found.texts, found.image_of_text, block=128)
    by_image, by_text = (ranking.best() for ranking in rankings)
    index = Index.build(found)
    _, rows = top_k(index.texts, found.images, len(found.texts))
    first_right = (found.image_of_text[rows] == np.arange(400)[:, None]).argmax(1)
    assert by_image.above.tolist() == first_right.tolist()
    _, rows = top_k(index.images, found.texts, 400)
    assert by_text.above.tolist() == (rows == found.image_of_text[:, None]).argmax(1).tolist()
    assert 0.1 < float((by_text.above == 0).double().mean()) < 0.9  # neither trivial nor hopeless


def test_top_k_is_the_inner_product_order():
    found = made()
    scores, rows = top_k(flat_index(found.images), found.texts[:7], 5)
    products = found.texts[:7].astype(np.float64) @ found.images.T.astype(np.float64)
    assert rows.tolist() == np.argsort(-products, axis=1)[:, :5].tolist()
    assert scores == pytest.approx(-np.sort(-products, axis=1)[:, :5], abs=1e-6)


def test_k_above_the_gallery_gives_all_and_no_padding():
    scores, rows = top_k(flat_index(made(images=3).images), made(images=3).texts, 10)
    assert rows.shape == scores.shape == (9, 3)
    assert sorted(rows[0].tolist()) == [0, 1, 2]


def test_a_filter_finds_nothing_that_was_deleted_and_no_more_than_is_left():
    found = made(images=30)
    deleted, allowed = np.arange(30) < 10, np.arange(30) < 14
    side = Side([Segment(flat_index(found.images[:20])), Segment(flat_index(found.images[20:]))], [], deleted)
    scores, rows = top_k(side, found.texts[:4], 10, allowed=allowed)
    assert scores.shape == rows.shape == (4, 4)
    assert all(sorted(row) == [10, 11, 12, 13] for row in rows.tolist())
    assert np.isfinite(scores).all()
    _, rows = top_k(side, found.texts[:4], 30)
    assert all(sorted(row) == list(range(10, 30)) for row in rows.tolist())


def test_wrong_queries_and_galleries_are_refused():
    found = made()
    index = flat_index(found.images)
    with pytest.raises(ValueError, match="queries have 23 dimensions, the index 24"):
        top_k(index, found.texts[:, :23], 5)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k(index, found.texts, 0)
    broken = found.texts.copy()
    broken[5, 3] = np.nan
    with pytest.raises(ValueError, match=r"queries: row 5 has NaN or infinite values \(1 such rows\)"):
        top_k(index, broken, 5)
    with pytest.raises(ValueError, match="text embeddings: row 5 has NaN"):
        flat_index(broken, "text embeddings")
    with pytest.raises(ValueError, match="images: the gallery is empty"):
        flat_index(found.images[:0], "images")
    with pytest.raises(ValueError, match=r"expected \(rows, dimensions\), got shape \(24,\)"):
        flat_index(found.images[0])


def test_an_index_of_another_model_is_refused():
    index = Index.build(made(fingerprint="aaaa"))
    index.check_model("aaaa", "small")
    with pytest.raises(
        ValueError, match=r"embeddings of small \(fingerprint aaaa\), the queries are from other"
    ):
        index.check_model("bbbb", "other")


def test_embeddings_and_index_come_back_as_they_were(tmp_path):
    found = made()
    found.save(tmp_path / "e")
    again = Embeddings.load(tmp_path / "e")
    for name in ("images", "texts", "image_of_text", "samples"):
        assert np.array_equal(getattr(found, name), getattr(again, name))
    for name in ("keys", "captions", "model", "fingerprint", "shards", "faults"):
        assert getattr(found, name) == getattr(again, name)
    Index.build(again).save(tmp_path / "i")
    loaded = Index.load(tmp_path / "i")
    assert top_k(loaded.texts, found.images, 4)[1].tolist() == (
        top_k(flat_index(found.texts), found.images, 4)[1].tolist()
    )
    assert (loaded.model, loaded.fingerprint) == ("small", "aaaa")
    assert loaded.text_records[4] == {"text": "text 4", "key": "00001"}
    assert loaded.image_records[-1] == {"key": "00119", "sample": 119}


@pytest.mark.parametrize("name", ["images-0.faiss", "texts-0.faiss", "images-0.jsonl", "texts-0.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_index_is_refused(tmp_path, name, damage):
    folder = Index.build(made()).save(tmp_path / "index")
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[len(content) // 2 :]
    file.write_bytes(content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(ValueError, match=f"{name} is (damaged|missing)"):
        Index.load(folder)


def test_parts_that_do_not_fit_are_refused(tmp_path):
    first, second = Index.build(made()), Index.build(made(images=50))
    assert first.images is not None
    assert second.images is not None
    images = Side(second.images.segments, first.images.records)
    Index(images, first.texts, first.model, first.fingerprint).save(tmp_path / "index")
    with pytest.raises(
        ValueError, match=r"the images are \(50, 120, 24, 0\).* the manifest says \(50, 50, 24, 0\)"
    ):
        Index.load(tmp_path / "index")


def test_folders_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of pairstream-index"):
        Index.load(tmp_path)
    made().save(tmp_path / "e")
    with pytest.raises(
        ValueError, match="expected a folder of pairstream-index, found 'pairstream-embeddings'"
    ):
        Index.load(tmp_path / "e")
    (tmp_path / "e" / "manifest.json").write_text('{"format": "pairstream-emb')
    with pytest.raises(ValueError, match=r"manifest.json is damaged .* write the folder again"):
        Embeddings.load(tmp_path / "e")
    (tmp_path / "e" / "manifest.json").write_text(json.dumps({"format": "pairstream-embeddings"}))
    with pytest.raises(ValueError, match=r"damaged \(KeyError\('files'\)\)"):
        Embeddings.load(tmp_path / "e")


def test_only_a_folder_of_its_kind_is_ever_replaced(tmp_path):
    refuse_to_replace(tmp_path / "new", "pairstream-index", overwrite=False)
    (tmp_path / "home").mkdir()
    refuse_to_replace(tmp_path / "home", "pairstream-index", overwrite=False)
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and holds no pairstream-index"):
        refuse_to_replace(tmp_path / "home", "pairstream-index", overwrite=True)
    Index.build(made()).save(tmp_path / "index")
    with pytest.raises(FileExistsError, match=r"already holds pairstream-index.*--overwrite"):
        refuse_to_replace(tmp_path / "index", "pairstream-index", overwrite=False)
    refuse_to_replace(tmp_path / "index", "pairstream-index", overwrite=True)


def test_an_unfinished_folder_never_appears(tmp_path):
    def cut(folder):
        (folder / "part").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), new_artifact(tmp_path / "a", "kind", {}) as folder:
        cut(folder)
    assert list(tmp_path.iterdir()) == []
    with new_artifact(tmp_path / "a", "kind", {"extra": 1}) as folder:
        (folder / "part").write_text("whole")
    assert read_artifact(tmp_path / "a", "kind")["extra"] == 1
