"""Indexes chosen, built, tuned, changed and searched on disk, compared with exact search; without a model."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest

import retrieval.fill
import retrieval.side
from retrieval.artifact import read_artifact
from retrieval.build import Options, build_index, build_segment, sample_rows
from retrieval.choose import choose_cells, choose_plans, memory_of
from retrieval.first_pass import refuse_repeated
from retrieval.index import KIND, Index, top_k
from retrieval.measure import ExactTopK
from retrieval.parts import EmbeddingSet, PartRows, part_folder, write_part, write_set
from retrieval.search import search
from retrieval.side import Records, read_condition
from retrieval.update import add_to_index, advice, compact_index, delete_from_index, merge_indexes

DIM, ROWS, TEXTS, PARTS = 32, 3000, 400, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def made(seed: int, rows: int = ROWS, texts: int = TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in clusters and texts in another cone, as `benchmarks/retrieval_index.py` makes them."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    centres, cones = fixed.standard_normal((40, DIM)), 3 * fixed.standard_normal((2, DIM))
    latent = centres[rng.integers(40, size=rows)] + 0.7 * rng.standard_normal((rows, DIM))
    described = latent[rng.integers(rows, size=texts)] + 0.7 * rng.standard_normal((texts, DIM))
    return unit(latent + cones[0]).astype(np.float16), unit(described + cones[1]).astype(np.float16)


def write(
    folder: Path, seed=0, prefix="k", fingerprint="aaaa", dtype="float16", images=None, texts=None
) -> Path:
    if images is None:
        images, texts = made(seed)
    keys = [f"{prefix}{number}" for number in range(len(images))]
    owners = np.arange(len(texts)) % max(len(images), 1)
    places = [np.array_split(np.arange(len(side)), PARTS) for side in (images, texts)]
    for number in range(PARTS):
        picture, text = (side[number] for side in places)
        rows = PartRows(
            images[picture],
            texts[text],
            [
                {"key": keys[row], "sample": row, "width": row % 100, "label": f"l{row % 7}"}
                for row in picture.tolist()
            ],
            [
                {"text": f"text {row}", "key": keys[owners[row]], "image": int(owners[row])}
                for row in text.tolist()
            ],
        )
        write_part(folder, number, rows, dtype=dtype, size=len(picture))
    content = {
        "model": "small",
        "fingerprint": fingerprint,
        "dim": images.shape[1],
        "dtype": dtype,
        "shards": ["s"],
    }
    write_set(folder, content, count=PARTS)
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("embedded") / "rows")


@pytest.fixture(scope="module")
def built(embedded, tmp_path_factory) -> Path:
    """Cells with 4-bit codes on the pictures' side, exact on the texts'."""
    out = tmp_path_factory.mktemp("built") / "index"
    build_index(embedded, out, options=Options(kind="ivf", recall=0.9))
    return out


def copied(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def exact(images: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ images.T.astype(np.float64)), axis=1, kind="stable")[
        :, :k
    ]


def recall(found, right) -> float:
    return float((found[:, :, None] == right[:, None, :]).any(2).mean())


def test_the_choice_follows_rows_memory_and_recall():
    def kinds(*words, **more):
        return [plan.kind for plan in choose_plans(*words, **more)]

    assert kinds(20_000, 512)[0] == "flat"
    assert kinds(10_000_000, 512, recall=1.0) == ["flat"]
    assert kinds(200_000, 512) == ["ivf", "hnsw", "ivf_fp16", "ivf_sq8", "ivf_pq", "ivf_pq", "ivf_pq", "flat"]
    assert kinds(200_000, 33)[0] == "hnsw"  # pairs of dimensions need an even number
    million = 1_000_000
    assert kinds(million, 512, memory=1_300 * million)[0] == "ivf"
    assert kinds(million, 512, memory=1_100 * million, train_flops=1e12)[0] == "ivf_fp16"
    assert kinds(million, 512, memory=600 * million, train_flops=1e12)[0] == "ivf_sq8"
    assert kinds(million, 512, memory=100 * million, train_flops=1e12) == ["ivf_pq", "ivf_pq"]
    assert choose_plans(200_000, 512)[0].factory == "IVF1024,PQ256x4fs"
    assert choose_plans(50_000_000, 512, train_flops=1e16)[0].factory == "IVF262144_HNSW32,PQ256x4fs"
    assert choose_cells(50_000_000, 512, 1e13) < 262_144  # in time
    assert choose_cells(100, 512) == 4
    (plan,) = choose_plans(million, 512, kind="ivf_sq8", train_flops=1e12)
    assert memory_of(plan, million, 512) == million * (512 + 8) + 4 * 512 * plan.cells


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": 0}, "the gallery is empty"),
        ({"recall": 1.5}, r"recall is a share in \(0, 1\], got 1.5"),
        ({"kind": "tree"}, "kind 'tree': expected one of auto, flat"),
        ({"kind": "ivf", "rows": 9}, "kind 'ivf' needs at least 64 rows to be trained on, got 9: take auto"),
        ({"kind": "ivf", "dim": 33}, "kind 'ivf' cannot hold 200,000 rows of 33 dimensions"),
        (
            {"memory": 1_000_000},
            r"200,000 rows of 512 dimensions need at least [\d.]+ MB, the limit is 1.0 MB",
        ),
    ],
)
def test_impossible_wishes_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        choose_plans(**{"rows": 200_000, "dim": 512, **more})
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Options(k=0)
    with pytest.raises(ValueError, match="the time limit must be above 0 seconds, got 0"):
        Options(seconds=0)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivf_fp16", "ivf_sq8"])
def test_every_kind_reaches_its_recall_on_text_queries(embedded, tmp_path, kind):
    images, texts = made(0)
    index = build_index(embedded, tmp_path / "i", options=Options(kind=kind, recall=0.9), sides=["images"])
    (segment,) = index.side("images").segments
    right = exact(images, texts, 10)
    found = recall(index.side("images").search(texts.astype(np.float32), 10)[1], right)
    assert found >= (1.0 if kind == "flat" else 0.9)
    # The report is of the second half of the texts, in the order in which they were drawn.
    asked = sample_rows(EmbeddingSet.open(embedded), "texts", 1000)[TEXTS // 2 :]
    again = recall(segment.search(asked, 10)[1], exact(images, asked, 10))
    assert segment.report["recall"] == pytest.approx(again, abs=2e-3)  # but for ties
    assert segment.report["query_kind"] == "texts"
    assert segment.report["queries"] == TEXTS // 2
    least = {"flat": 4 * DIM, "hnsw": 4 * DIM + 256, "ivf": DIM / 4, "ivf_fp16": 2 * DIM, "ivf_sq8": DIM}[
        kind
    ]
    assert least <= segment.report["bytes_per_vector"] <= least + 80
    assert segment.report["cpu_ms"] > 0
    scores, rows = index.side("images").search(texts[:5].astype(np.float32), 3)
    products = np.take_along_axis(texts[:5].astype(np.float32) @ images.T.astype(np.float32), rows, 1)
    assert scores == pytest.approx(products, abs=1e-3)  # inner products, whatever the codes


@pytest.mark.slow
def test_product_quantisation_in_little_memory(tmp_path):
    images, texts = made(1, rows=10_500, texts=100)
    folder = write(tmp_path / "rows", images=images, texts=texts)
    options = Options(memory=10_500 * 40, recall=0.8, kind="ivf_pq")
    index = build_index(folder, tmp_path / "i", options=options, sides=["images"])
    report = index.side("images").segments[0].report
    assert report["factory"].startswith("OPQ8_32,IVF")
    assert report["bytes_per_vector"] < 40
    assert report["recall"] >= 0.8


def test_many_blocks_on_disk_are_one(embedded, tmp_path, monkeypatch):
    one = build_index(embedded, tmp_path / "one", options=Options(kind="ivf_sq8"), sides=["images"])
    monkeypatch.setattr(retrieval.fill, "BLOCK_ROWS", 900)
    many = build_index(embedded, tmp_path / "many", options=Options(kind="ivf_sq8"), sides=["images"])
    names = [path.name for path in (tmp_path / "many").iterdir()]
    assert sum(name.endswith(".ivfdata") for name in names) == 1
    assert not any("block" in name for name in names)
    _, texts = made(0)
    queries = texts.astype(np.float32)
    for effort in (1, 8):
        a, b = (i.side("images").search(queries, 5, effort=effort, candidates=5) for i in (one, many))
        assert np.array_equal(a[1], b[1])
    (tmp_path / "many").rename(tmp_path / "moved")  # the lists are found beside the index
    again = Index.load(tmp_path / "moved").side("images").search(queries, 5, effort=8, candidates=5)
    assert np.array_equal(again[1], a[1])


def test_a_plan_that_misses_makes_way_for_the_next(embedded, tmp_path, monkeypatch, caplog):
    import retrieval.build as build

    plans = choose_plans(200_000, DIM)[:2]
    poor = [choose_plans(ROWS, DIM, kind=kind)[0] for kind in ("ivf", "flat")]
    assert [plan.kind for plan in plans] == ["ivf", "hnsw"]
    monkeypatch.setattr(build, "choose_plans", lambda *_, **__: poor)
    monkeypatch.setattr(build, "tune", lambda segment, *_: setattr(segment, "effort", 1))
    index = build_index(embedded, tmp_path / "i", sides=["images"])
    report = index.side("images").segments[0].report
    assert report["kind"] == "flat"
    assert report["tried"][0]["result"].startswith("recall 0.")
    assert sorted(path.suffix for path in (tmp_path / "i").iterdir()) == [".faiss", ".json", ".jsonl"]
    monkeypatch.setattr(build, "choose_plans", lambda *_, **__: poor[:1])
    build_index(embedded, tmp_path / "j", sides=["images"])
    assert "below the wanted 0.95" in caplog.text


def test_time_is_kept(embedded, tmp_path):
    with pytest.raises(ValueError, match=r"no index of 3,000 rows could be built within 1e-06 s .*HNSW32"):
        build_index(embedded, tmp_path / "i", options=Options(kind="hnsw", seconds=1e-6), sides=["images"])
    assert not (tmp_path / "i").exists()
    rng = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)
    (plan,) = choose_plans(200_000, 64, kind="ivf_sq8")
    index = faiss.index_factory(64, plan.factory, faiss.METRIC_INNER_PRODUCT)
    from time import perf_counter

    with (
        pytest.raises(retrieval.fill.OutOfTimeError, match="in training"),
        retrieval.fill.time_limit(perf_counter() + 0.02, armed=True),
    ):
        retrieval.fill.train_within_reason(index, plan, rng)
    index.train(rng)  # the limit is gone with its block


def test_searches_at_once_do_not_disturb_each_other(built):
    side = Index.load(built).side("images")
    queries = made(0)[1].astype(np.float32)
    settings = [(1, 2), (4, 5), (16, 20), (1, 20)]
    alone = [
        side.search(queries, 5, effort=effort, candidates=candidates)[1] for effort, candidates in settings
    ]
    assert not np.array_equal(alone[0], alone[2])
    wrong = []

    def ask(number: int) -> None:
        for turn in range(10):
            effort, candidates = settings[(number + turn) % 4]
            found = side.search(queries, 5, effort=effort, candidates=candidates)[1]
            if not np.array_equal(found, alone[(number + turn) % 4]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivf_sq8"])
@pytest.mark.parametrize("exact_rows", [20_000, 10])
def test_filters_find_what_fulfils_them(embedded, tmp_path, monkeypatch, kind, exact_rows):
    monkeypatch.setattr(retrieval.side, "EXACT_ROWS", exact_rows)  # 10: through FAISS's own selector
    index = build_index(embedded, tmp_path / "i", options=Options(kind=kind, recall=0.9), sides=["images"])
    images, texts = made(0)
    hits = search(index, vectors=texts[:60], where=["width>=40", "width<60", "label!=l3"], k=5)
    allowed = [row for row in range(ROWS) if 40 <= row % 100 < 60 and row % 7 != 3]
    right = np.array(allowed)[exact(images[allowed], texts[:60], 5)]
    assert all(hit.row in set(allowed) and hit.meta["label"] != "l3" for one in hits for hit in one)
    found = np.array([[hit.row for hit in one] for one in hits])
    assert recall(found, right) >= (1.0 if exact_rows > 10 or kind == "flat" else 0.9)
    few = search(index, vectors=texts[:1], where=["label=l1", "width=5"], k=1000)[0]
    assert 0 < len(few) == sum(row % 7 == 1 and row % 100 == 5 for row in range(ROWS))


def test_filters_that_cannot_be_are_refused(built):
    index = Index.load(built)
    query = made(0)[1][:1]
    with pytest.raises(ValueError, match="filter 'width': expected KEY=VALUE"):
        search(index, vectors=query, where=["width"])
    with pytest.raises(
        ValueError, match="no record has the key 'height' of the filter; they have key, label"
    ):
        search(index, vectors=query, where=["height>3"])
    with pytest.raises(ValueError, match="no row of the images fulfils width>500 and label=l1"):
        search(index, vectors=query, where=["width>500", "label=l1"])
    key, fulfils = read_condition("a<=5")
    assert (key, fulfils(5), fulfils(6), fulfils(None), fulfils("x")) == ("a", True, False, False, False)
    _, wide = read_condition("width>=512")
    assert [wide(value) for value in ("1024", "640.0", "99", " 512 ", "wide")] == [
        True,
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="allowed: expected one truth value for each of 3000 rows"):
        top_k(index.images, query, 3, allowed=np.ones(4, dtype=bool))


def test_near_duplicates_are_left_out_best_first(tmp_path):
    images, texts = made(2, rows=600)
    images[100:110] = images[100]
    folder = write(tmp_path / "rows", images=images, texts=texts)
    index = build_index(folder, tmp_path / "i")
    query = images[100:101].astype(np.float32)
    assert {hit.row for hit in search(index, vectors=query, k=10)[0]} == set(range(100, 110))
    hits = search(index, vectors=query, k=8, dedup=0.999)[0]
    assert len(hits) == 8
    assert hits[0].row in range(100, 110)
    assert not {hit.row for hit in hits[1:]} & set(range(100, 110))
    assert [hit.rank for hit in hits] == list(range(1, 9))
    # However many there are of one kind, the search goes on until it has as many kinds as were asked for.
    images[:400] = images[100]
    again = build_index(write(tmp_path / "more", images=images, texts=texts), tmp_path / "j")
    hits = search(again, vectors=query, k=8, dedup=0.999)[0]
    assert len(hits) == 8
    assert sum(hit.row < 400 for hit in hits) == 1
    assert len(search(again, vectors=query, k=250, dedup=0.999)[0]) == 201  # there are no more
    with pytest.raises(ValueError, match=r"dedup is a cosine in \(0, 1\], got 1.5"):
        search(index, vectors=query, dedup=1.5)


def test_wrong_vectors_are_refused(built):
    index = Index.load(built)
    query = made(0)[1][:2].astype(np.float32)
    for rows, message in (
        (query[:, :31], "queries have 31 dimensions, the index 32: use the index's model"),
        (np.full((1, DIM), np.nan, np.float32), "query vectors: row 0 has NaN or infinite values"),
        (np.zeros((1, DIM), np.float32), "query vectors: row 0 has length zero and points nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            search(index, vectors=rows)
    for words, message in (
        (
            {"vectors": query, "texts": ["a"]},
            "expected vectors alone, or texts and images, as queries, got both",
        ),
        (
            {"vectors": query, "k": 3001},
            "k is 3,001, but the index holds 3,000 images: ask for at most so many",
        ),
        ({"vectors": query, "k": 0}, "k must be at least 1, got 0"),
        ({"vectors": query, "among": "videos"}, "among: 'videos', expected images or texts"),
        ({"texts": ["a dog"]}, "texts and images need an encoder"),
        ({}, "expected texts, images or vectors as queries, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            search(index, **words)
    one, three = (search(index, vectors=rows)[0] for rows in (query[0], 3 * query))
    assert [hit.row for hit in one] == [hit.row for hit in three]
    assert [hit.score for hit in one] == pytest.approx([hit.score for hit in three], abs=1e-6)  # cosines


def test_added_rows_are_found_and_old_ones_stay(built, tmp_path):
    folder = copied(built, tmp_path / "i")
    more, _ = made(5, rows=500, texts=60)
    added = write(tmp_path / "more", prefix="new", images=more, texts=made(5, rows=500, texts=60)[1])
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    index = add_to_index(folder, added)
    images, texts = made(0)
    assert [len(segment) for segment in index.side("images").segments] == [ROWS, 500]
    both = np.concatenate([images, more])
    assert recall(index.side("images").search(texts.astype(np.float32), 10)[1], exact(both, texts, 10)) > 0.9
    hit = search(index, vectors=more[7:8], k=1)[0][0]
    assert (hit.key, hit.row, hit.meta["width"]) == ("new7", ROWS + 7, 7)
    assert search(index, vectors=more[7:8], k=1, where=["label=l3"])[0][0].meta["label"] == "l3"
    assert index.text_records[TEXTS + 3] == {"text": "text 3", "key": "new3"}
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert all(
        after[name] == inode for name, inode in before.items() if name != "manifest.json"
    )  # nothing rewritten
    with pytest.raises(ValueError, match="the index already holds the key 'new0' of"):
        add_to_index(folder, added)
    with pytest.raises(ValueError, match="their scores would mean nothing"):
        add_to_index(folder, write(tmp_path / "x", prefix="x", fingerprint="bbbb"))
    narrow = write(tmp_path / "n", prefix="n", images=unit(more[:, :8]), texts=unit(more[:9, :8]))
    with pytest.raises(ValueError, match="the embeddings are 8 wide, the index 32"):
        add_to_index(folder, narrow)


def test_deleted_rows_are_never_found_and_compacting_frees_them(built, tmp_path):
    folder = copied(built, tmp_path / "i")
    images, texts = made(0)
    queries = texts.astype(np.float32)
    best = Index.load(folder).side("images").search(queries, 1)[1][:, 0]
    index = delete_from_index(folder, {f"k{row}" for row in best.tolist()})
    found = index.side("images").search(queries, 10)[1]
    left = np.setdiff1d(np.arange(ROWS), best)
    assert index.side("images").alive == len(left)
    assert not set(found.ravel().tolist()) & set(best.tolist())
    right = left[exact(images[left], texts, 10)]
    assert recall(found, right) > 0.9
    gone = [row for row in range(TEXTS) if row in set(best.tolist())]  # a text's key is that of its picture
    assert index.side("texts").alive == TEXTS - len(gone)
    with pytest.raises(ValueError, match=r"1 of 1 keys are not in the index: 'k\d+'"):
        delete_from_index(folder, [f"k{best[0]}"])
    with pytest.raises(ValueError, match="2 of 3 keys are not in the index: 'no', 'none'"):
        delete_from_index(folder, ["no", "none", f"k{left[0]}"])
    with pytest.raises(ValueError, match="all images would be deleted"):
        delete_from_index(folder, [f"k{row}" for row in left])
    compact = compact_index(folder)
    side = compact.side("images")
    assert side.ntotal == side.alive == len(left)
    keys = [[side.records[row]["key"] for row in rows] for rows in side.search(queries, 10)[1].tolist()]
    same = [len({*a} & {f"k{row}" for row in b}) / 10 for a, b in zip(keys, right.tolist(), strict=True)]
    assert np.mean(same) > 0.95
    assert side.segments[0].report["query_kind"] == "texts"
    # What was deleted may come again.
    again = write(tmp_path / "again", images=images[:1], texts=texts[:1], prefix="again")
    assert add_to_index(folder, again).side("images").alive == len(left) + 1


def test_merged_indexes_are_searched_as_one(built, tmp_path):
    folder = copied(built, tmp_path / "i")
    more, words = made(6, rows=800, texts=50)
    other = tmp_path / "other"
    build_index(write(tmp_path / "more", prefix="m", images=more, texts=words), other)
    delete_from_index(other, ["m5"])
    index = merge_indexes(folder, other)
    images, texts = made(0)
    side = index.side("images")
    assert (side.ntotal, side.alive) == (ROWS + 800, ROWS + 799)
    both = np.delete(np.concatenate([images, more]), ROWS + 5, axis=0)
    right = exact(both, texts, 10)
    right[right >= ROWS + 5] += 1
    assert recall(side.search(texts.astype(np.float32), 10)[1], right) > 0.9
    with pytest.raises(ValueError, match="already holds the key 'm0'"):
        merge_indexes(folder, other)
    pictures = tmp_path / "pictures"
    build_index(tmp_path / "more", pictures, sides=["images"])
    with pytest.raises(ValueError, match="only alike indexes can be merged"):
        merge_indexes(folder, pictures)
    assert advice(index) == ""
    delete_from_index(folder, [f"k{row}" for row in range(2000, 2950)])
    assert "2 segments, 25% deleted: --compact" in advice(Index.load(folder))


def test_an_index_of_pictures_alone_says_so(embedded, tmp_path):
    index = build_index(embedded, tmp_path / "i", sides=["images"])
    with pytest.raises(ValueError, match="this index holds no texts: build it with --sides texts"):
        search(index, vectors=made(0)[1][:1], among="texts")
    with pytest.raises(ValueError, match="this side was not indexed"):
        top_k(index.texts, made(0)[1][:1], 3)
    with pytest.raises(ValueError, match="sides: expected some of images, texts, got none"):
        build_index(embedded, tmp_path / "i", sides=[])


def test_bad_embeddings_are_refused(embedded, tmp_path):
    images, texts = made(0)
    empty = write(tmp_path / "empty", images=images[:0], texts=texts[:0])
    with pytest.raises(ValueError, match="images: the gallery is empty, there is nothing to index"):
        build_index(empty, tmp_path / "i")
    broken = images.copy()
    broken[1500, 2] = np.inf
    with pytest.raises(ValueError, match=r"00001: row 500 of images \(key 'k1500'\) has NaN or infinite"):
        build_index(write(tmp_path / "nan", images=broken, texts=texts), tmp_path / "i")
    other = write(tmp_path / "other", seed=4, fingerprint="bbbb")
    with pytest.raises(ValueError, match=r"the queries are of small \(bbbb\), the rows of small \(aaaa\)"):
        build_index(embedded, tmp_path / "i", queries=other)
    repeated = write(tmp_path / "repeated")
    lines = (part_folder(repeated, 2) / "images.jsonl").read_text().replace('"k2500"', '"k3"')
    records = [json.loads(line) for line in lines.splitlines()]
    part = EmbeddingSet.open(repeated).part(2)
    rows = PartRows(np.asarray(part.images), np.asarray(part.texts), records, part.text_records)
    write_part(repeated, 2, rows, dtype="float16", size=len(records))
    write_set(repeated, EmbeddingSet.open(repeated).manifest, count=PARTS)
    with pytest.raises(ValueError, match="the key 'k3' stands for two pictures, rows 3 and 2500"):
        build_index(repeated, tmp_path / "i")
    refuse_repeated(
        np.array([1, 2, 1], dtype=np.uint64), [{"key": "a"}, {"key": "b"}, {"key": "c"}]
    )  # one hash, two keys
    damaged = copied(embedded, tmp_path / "damaged")
    path = part_folder(damaged, 0) / "texts.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"texts\.npy is damaged: its checksum is not the manifest's"):
        build_index(damaged, tmp_path / "i")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("suffix", [".faiss", ".jsonl", ".npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_index_is_refused_before_faiss_reads_it(built, tmp_path, monkeypatch, suffix, damage):
    folder = copied(built, tmp_path / "i")
    (file,) = folder.glob(f"images-*{suffix}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "remove":
        file.unlink()
    monkeypatch.setattr(faiss, "read_index", None)
    with pytest.raises(ValueError, match=rf"{file.name} is (damaged|missing)"):
        Index.load(folder)


def test_a_file_without_a_checksum_is_never_read(built, tmp_path):
    folder = copied(built, tmp_path / "i")
    manifest = read_artifact(folder, KIND)
    manifest["images"][0]["name"] = "stranger"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its manifest has no checksum of stranger\.faiss"):
        Index.load(folder)
    manifest["images"] = 3000  # as the first version of the format had it
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="its manifest names no segments: build the index again"):
        Index.load(folder)


def test_records_are_read_by_number(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"n": n, "text": "ä\u2028" * (n % 4)}) + "\n" for n in range(50)))
    records = Records(path)
    assert len(records) == 50
    assert [record["n"] for record in records] == list(range(50))
    assert records[-1]["n"] == 49
    with pytest.raises(IndexError):
        records[50]
    (tmp_path / "empty").write_text("")
    assert len(Records(tmp_path / "empty")) == 0


def test_exact_search_streams():
    images, texts = made(3, rows=700, texts=20)
    images, texts = images.astype(np.float32), texts.astype(np.float32)
    found = ExactTopK(texts, 10)
    for start in range(0, 700, 123):
        found.add(images[start : start + 123], start)
    assert np.array_equal(found.rows, exact(images, texts, 10))
    assert found.recall(found.scores, found.rows) == 1
    assert found.recall(found.scores - 1, np.full_like(found.rows, -1)) == 0


def test_a_search_looks_further_when_cells_hold_too_few(built):
    side = Index.load(built).side("images")
    queries = made(0)[1].astype(np.float32)
    scores, rows = side.search(queries, 500, effort=1)
    assert (rows >= 0).all()
    assert all(len(set(one)) == 500 for one in rows.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_segment_without_queries_is_not_measured(embedded, tmp_path):
    from retrieval.first_pass import PartsSource

    source = PartsSource(EmbeddingSet.open(embedded), "images")
    none = np.zeros((0, DIM), np.float32)
    options = Options(kind="ivf")
    segment = build_segment(source, tmp_path, "images", options, queries=none, query_kind="texts")
    assert "recall" not in segment.report
    images, texts = made(0)
    assert recall(segment.search(texts.astype(np.float32), 10)[1], exact(images, texts, 10)) > 0.8


def test_export_to_qdrant_finds_the_same(tmp_path, monkeypatch):
    pytest.importorskip("qdrant_client")
    from retrieval import to_qdrant

    images, texts = made(0, rows=300, texts=30)
    folder = tmp_path / "i"
    build_index(write(tmp_path / "rows", images=images, texts=texts), folder, sides=["images"])
    index = delete_from_index(folder, ["k0", "k1"])
    monkeypatch.setattr(to_qdrant, "BATCH", 120)  # three requests
    client = to_qdrant.connect(str(tmp_path / "qdrant"))
    try:
        assert to_qdrant.export_to_qdrant(index, client, "pictures") == 298
        for query in texts[:5].astype(np.float32):
            points = client.query_points("pictures", query=query.tolist(), limit=5, with_payload=True).points
            ours = search(index, vectors=query, k=5)[0]
            assert [(point.payload["key"], point.id) for point in points] == [
                (hit.key, hit.row) for hit in ours
            ]
            assert [point.score for point in points] == pytest.approx([hit.score for hit in ours], abs=1e-3)
            assert points[0].payload["width"] == points[0].id % 100
        info = client.get_collection("pictures")
        assert info.config.metadata == {"model": "small", "fingerprint": "aaaa", "side": "images"}
        with pytest.raises(ValueError, match="the Qdrant collection 'pictures' exists"):
            to_qdrant.export_to_qdrant(index, client, "pictures")
    finally:
        client.close()
