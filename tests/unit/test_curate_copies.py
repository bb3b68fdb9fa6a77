"""Copies, leaks, the best share and the balance, against searches that compare everything with everything."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.curate import lists
from data.curate.balance import Entries, keep_probabilities, uniform
from data.curate.decide import not_among_best
from data.curate.duplicates import components, exact_pairs, keepers, perceptual_pairs, semantic_pairs
from data.curate.hashes import close_pairs, distances, grey_of, hash_greys
from data.curate.plant import KINDS, plant
from data.curate.records import Records, blank, join, load, save
from data.pictures import Picture


def hashes_of(*images: bytes):
    return hash_greys([grey_of(Picture(image)) for image in images])


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def test_the_hash_is_that_of_its_definition(make_picture) -> None:
    """Against the DCT written out, as the library ImageHash defines its `phash`."""
    image = Image.open(io.BytesIO(make_picture(5, (64, 64))))
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    low = np.zeros((8, 8))
    place = np.arange(32)
    for down in range(8):
        for across in range(8):
            waves = np.outer(
                np.cos(np.pi * down * (2 * place + 1) / 64), np.cos(np.pi * across * (2 * place + 1) / 64)
            )
            low[down, across] = (grey * waves).sum()
    bits = "".join("1" if number > np.median(low) else "0" for number in low.ravel())
    assert int(hashes_of(encoded(image, format="PNG")).hashes[0]) == int(bits, 2)


def test_the_mirrored_hash_needs_no_mirrored_picture(make_picture) -> None:
    image = Image.open(io.BytesIO(make_picture(6, (80, 64))))
    found = hashes_of(encoded(image, format="PNG"), encoded(ImageOps.mirror(image), format="PNG"))
    assert distances(found.mirrored[0], found.hashes[1]) <= 2
    assert distances(found.hashes[0], found.hashes[1]) > 8


def detailed(seed: int) -> bytes:
    """A picture with as much going on as a photograph has; the smooth ones of `make_picture` have few frequencies."""
    grid = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return encoded(
        Image.fromarray(grid).resize((120, 96), Image.Resampling.BICUBIC), format="JPEG", quality=90
    )


def test_changed_copies_stay_close_and_others_do_not() -> None:
    images = [detailed(seed) for seed in range(30)]
    for image in images[:10]:
        _, again, smaller, _, mirrored = plant(image, 10**6)
        found = hashes_of(image, again, smaller, mirrored)
        assert (distances(found.hashes[0], found.hashes[1:3]) <= 4).all()
        assert distances(found.mirrored[0], found.hashes[3]) <= 4
    found = hashes_of(*images)
    between = distances(found.hashes[:, None], found.hashes[None])
    assert (between[~np.eye(len(images), dtype=bool)] > 4).all()


def test_pictures_of_one_colour_have_no_hash(make_picture) -> None:
    flat = encoded(Image.new("RGB", (50, 50), (200, 30, 30)), format="PNG")
    assert hashes_of(flat, make_picture(0)).valid.tolist() == [False, True]


@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 7, 10, 16])
def test_no_close_pair_is_missed(max_distance: int) -> None:
    rng = np.random.default_rng(max_distance)
    base = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for copy in range(100, 200):  # some that differ in few bits
        flips = rng.choice(64, rng.integers(0, 20), replace=False)
        base[copy] = base[copy - 100] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    queries = base[:150]
    asked, found, apart = close_pairs(base, queries, max_distance)
    true = distances(queries[:, None], base[None])
    expected = {(int(a), int(b)) for a, b in np.argwhere(true <= max_distance)}
    assert {(int(a), int(b)) for a, b in zip(asked, found, strict=True)} == expected
    assert (apart == true[asked, found]).all()
    assert len(expected) > 150 or max_distance == 0


def test_nothing_to_search() -> None:
    none = np.zeros(0, dtype=np.uint64)
    assert [len(part) for part in close_pairs(none, none, 4)] == [0, 0, 0]
    assert len(semantic_pairs(np.zeros((1, 4)), np.array([0]), np.array([0]), 0.9)[0]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_union_find(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 200, (2, rng.integers(0, 200)))
    parent = list(range(200))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    assert components(200, (one, other)).tolist() == [root(node) for node in range(200)]


def test_a_long_chain_is_one_group() -> None:
    order = np.random.default_rng(0).permutation(3000)
    assert (components(3000, (order[:-1], order[1:])) == 0).all()


def described(n: int, seed: int = 0) -> Records:
    """Records of `n` samples with random numbers."""
    rng = np.random.default_rng(seed)
    rows = blank(np.array([b"%06d" % number for number in rng.permutation(n)]), "a.tar")
    rows.width[:], rows.height[:] = rng.integers(1, 4, (2, n))
    rows.bytes[:] = rng.integers(1, 3, n)
    rows.text[:] = rng.integers(0, 2**63, n, dtype=np.uint64)
    return rows


def take(rows: Records, order: np.ndarray) -> Records:
    made = blank(rows.keys[order], "a.tar")
    for name in ("width", "height", "bytes", "text", "hashes", "mirrored", "hashed", "sha256"):
        setattr(made, name, getattr(rows, name)[order])
    return made


def test_the_best_copy_stays_whatever_the_order() -> None:
    rows = described(300)
    labels = np.random.default_rng(1).integers(0, 60, 300)
    stays = keepers(rows, labels)
    for label in range(60):
        members = np.flatnonzero(labels == label)
        best = min(members, key=lambda row: (-rows.pixels[row], -rows.bytes[row], rows.keys[row]))
        assert (stays[members] == best).all()
    order = np.random.default_rng(2).permutation(300)
    again = keepers(take(rows, order), labels[order])
    assert (order[again] == stays[order]).all()


def test_equal_bytes_are_paired() -> None:
    digests = np.array([b"a" * 16, b"b" * 16, b"a" * 16, b"c" * 16, b"a" * 16, b"b" * 16], dtype="V16")
    labels = components(6, exact_pairs(digests, np.arange(6)))
    assert labels.tolist() == [0, 1, 0, 3, 0, 1]
    assert components(6, exact_pairs(digests, np.array([0, 1, 3]))).tolist() == [0, 1, 2, 3, 4, 5]


def test_perceptual_groups_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    rows = described(200)
    rows.hashes[:] = rng.integers(0, 2**63, 200, dtype=np.uint64)
    rows.mirrored[:] = rng.integers(0, 2**63, 200, dtype=np.uint64)
    rows.hashes[50:100] = rows.hashes[:50] ^ np.uint64(0b101)
    rows.hashes[100:120] = rows.mirrored[:20] ^ np.uint64(1 << 40)
    rows.hashes[120:130], rows.mirrored[120:130] = rows.hashes[7], rows.mirrored[7]
    rows.hashed[:] = True
    rows.hashed[55] = False
    for flips in (True, False):
        near = distances(rows.hashes[:, None], rows.hashes[None]) <= 2
        if flips:
            near |= distances(rows.mirrored[:, None], rows.hashes[None]) <= 2
        near &= rows.hashed[:, None] & rows.hashed[None]
        expected = components(200, tuple(np.argwhere(near).T))
        found = components(200, perceptual_pairs(rows, np.arange(200), 2, flips))
        assert (found == expected).all()
        assert len(np.unique(found)) == (200 - 49 - 10 - (20 if flips else 0))


def vectors_of(n: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 24)).astype(np.float32)
    rows[n // 2 : n // 2 + n // 10] = rows[: n // 10] + 0.05 * rows[n // 2 : n // 2 + n // 10]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_semantic_pairs_are_those_above_the_cosine() -> None:
    vectors = vectors_of(400)
    rows, order = np.arange(1000, 1400), np.random.default_rng(1).permutation(400)
    one, other = semantic_pairs(vectors, rows, order, 0.98)
    expected = np.argwhere((vectors @ vectors.T >= 0.98) & ~np.eye(400, dtype=bool)) + 1000
    assert {tuple(pair) for pair in np.stack([one, other], 1).tolist()} == {
        tuple(pair) for pair in expected.tolist()
    }
    assert len(expected) > 50


@pytest.mark.parametrize("flat", [4096, 8], ids=["centres", "cells"])
def test_the_lists_find_nearly_all_and_do_not_mind_the_order(monkeypatch, flat) -> None:
    vectors, order = vectors_of(3000), np.random.default_rng(1).permutation(3000)
    everything = components(3000, semantic_pairs(vectors, np.arange(3000), order, 0.95))
    for name, value in {"EXHAUSTIVE": 100, "PER_LIST": 100, "FLAT": flat}.items():
        monkeypatch.setattr(lists, name, value)
    assert lists.Lists(vectors).count == 30
    found = components(3000, semantic_pairs(vectors, np.arange(3000), order, 0.95))
    joined = everything != np.arange(3000)
    assert joined.sum() >= 290
    assert (found[joined] == everything[joined]).mean() > 0.95
    shuffled = np.random.default_rng(2).permutation(3000)
    again = components(3000, semantic_pairs(vectors[shuffled], shuffled, order[shuffled], 0.95))
    assert (again == found).all()


def test_the_lists_give_pairs_of_the_exact_search_alone_and_each_once(monkeypatch) -> None:
    vectors, asked = vectors_of(2000), vectors_of(2000)[100:1100:3]
    exact = set(
        zip(*(side.tolist() for side in lists.Lists(vectors, exact=True).search(asked, 0.9)), strict=True)
    )
    by_hand = np.argwhere(asked @ vectors.T >= 0.9)
    assert exact == {tuple(pair) for pair in by_hand.tolist()}
    for name, value in {"EXHAUSTIVE": 100, "PER_LIST": 50, "BLOCK": 128}.items():
        monkeypatch.setattr(lists, name, value)
    found = list(zip(*(side.tolist() for side in lists.Lists(vectors).search(asked, 0.9)), strict=True))
    assert len(found) == len(set(found))
    assert set(found) <= exact
    assert len(found) > 0.95 * len(exact)


def test_the_work_of_a_row_does_not_grow_with_the_set(monkeypatch) -> None:
    """Rows that a row is compared with, counted: as many in a set of four times the size."""
    for name, value in {"EXHAUSTIVE": 100, "PER_LIST": 50}.items():
        monkeypatch.setattr(lists, name, value)

    def compared(n: int) -> float:
        vectors = vectors_of(n)
        made = lists.Lists(vectors)
        return sum(len(members) * len(askers) for members, askers in made._askers(vectors)) / n

    small, large = compared(2000), compared(8000)
    assert small < 8 * 50 * 3  # lists are not equally long, and the long ones are asked more often
    assert large < 1.25 * small


def test_entries_are_whole_words() -> None:
    entries = Entries(["dog", "hot dog", "cat", "New York", "Dog", "--"])
    assert entries.names == ["dog", "hot dog", "cat", "New York"]
    assert entries.find(["A hot-dog stand", "in new york."]) == [0, 1, 3]
    assert entries.find(["dogs and concatenation", ""]) == []


def test_the_balance_follows_the_paper() -> None:
    """Each entry draws for itself with cap / count, and one draw is enough."""
    lists = [[0], [0, 1], [1, 2], [], [0], [0, 2], [0]]
    starts = np.cumsum([0, *map(len, lists)])
    entries = np.array([entry for own in lists for entry in own])
    alive = np.array([True, True, True, True, True, True, False])
    counts = {0: 4, 1: 2, 2: 2}
    expected = [1 - np.prod([1 - min(1, 1 / counts[entry]) for entry in own]) for own in lists]
    found = keep_probabilities(starts, entries, alive, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_draws_are_even_and_differ_by_seed() -> None:
    digests = np.random.default_rng(0).integers(0, 2**63, 100_000, dtype=np.uint64)
    draws = uniform(digests, 0)
    assert abs(draws.mean() - 0.5) < 0.005
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / 5000 - 1).max() < 0.06
    assert abs(np.corrcoef(draws, uniform(digests, 1))[0, 1]) < 0.01
    assert (
        uniform(np.arange(1000, dtype=np.uint64), 3) == uniform(np.arange(1000, dtype=np.uint64), 3)
    ).all()


def test_the_best_share() -> None:
    scores = np.array([0.5, 0.1, np.nan, 0.3, 0.2, 0.9], dtype=np.float32)
    alive = np.array([True, True, True, True, True, False])
    text = np.arange(6, dtype=np.uint64)
    assert sorted(not_among_best(alive, scores, text, 0.5).tolist()) == [1, 4]
    assert not_among_best(alive, scores, text, 1.0).tolist() == []
    ties = np.ones(6, dtype=np.float32)
    assert sorted(not_among_best(np.ones(6, bool), ties, text[::-1], 0.5).tolist()) == [0, 1, 2]


def test_planted_copies_can_be_opened(make_picture) -> None:
    copies = plant(make_picture(0, (100, 60)), 10**6)
    sizes = [(Picture(copy).width, Picture(copy).height) for copy in copies]
    assert sizes == [(100, 60), (100, 60), (50, 30), (80, 48), (100, 60)]
    assert len(copies) == len(KINDS)


def test_records_come_back_as_they_were(tmp_path) -> None:
    one, two = described(5), described(4, seed=1)
    one.captions, two.captions = {2: [0, 3]}, {1: [1]}
    one.embeddings, one.embedded[:] = np.ones((2, 3), np.float16), [-1, 0, -1, 1, -1]
    two.embeddings, two.embedded[:] = np.full((1, 3), 2, np.float16), [-1, -1, 0, -1]
    for number, rows in enumerate((one, two)):
        save(rows, tmp_path / f"{number}.npz")
        save(rows, tmp_path / f"{number}-again.npz")
        assert (tmp_path / f"{number}.npz").read_bytes() == (tmp_path / f"{number}-again.npz").read_bytes()
    both = join([load(tmp_path / "0.npz"), load(tmp_path / "1.npz")])
    assert both.captions == {2: [0, 3], 6: [1]}
    assert both.embeddings[both.embedded[7]].tolist() == [2, 2, 2]
    assert both.embedded.tolist() == [-1, 0, -1, 1, -1, -1, -1, 2, -1]
    assert [both.place(row) for row in (0, 4, 5, 8)] == [(0, 0), (0, 4), (1, 0), (1, 3)]
    assert both.key(5) == two.key(0)
