"""The retrieval stage on real shards and a real, small encoder: embed, index, search, evaluate, report."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from data.shards import Sample, ShardWriter
from pairstream.cli import main as pairstream
from pretrain.encoder import load_encoder
from pretrain.evaluator import load_evaluator
from pretrain.recipe import Evaluation
from retrieval.diagnostics import diagnostics
from retrieval.embed import embed_shards
from retrieval.evaluate import evaluate
from retrieval.evaluator import RetrievalEvaluator
from retrieval.index import Index
from retrieval.metrics import retrieval_metrics
from retrieval.page import spaced
from retrieval.search import search

SAMPLES = 23


def captions_of(number: int) -> list[str]:
    return [f"picture {number} of {word}" for word in ("dogs", "boats & <b>", "hills")[: 1 + number % 3]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_picture):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for number in range(SAMPLES):
            writer.write(Sample(f"{number:05d}", make_picture(number), "jpg", captions_of(number)))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_encoder):
    return str(small_encoder(0).save(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def encoder(model):
    return load_encoder(model, device="cpu")


@pytest.fixture(scope="module")
def found(encoder, shards):
    return embed_shards(encoder, shards, batch_size=7)


def test_rows_are_those_of_the_encoder(found, encoder, make_picture):
    assert found.keys == [f"{number:05d}" for number in range(SAMPLES)]
    assert found.captions == [text for number in range(SAMPLES) for text in captions_of(number)]
    assert found.image_of_text.tolist() == [n for n in range(SAMPLES) for _ in captions_of(n)]
    one_by_one = torch.cat([encoder.encode_images([make_picture(number)]) for number in range(SAMPLES)])
    np.testing.assert_allclose(found.images, one_by_one.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.texts, encoder.encode_texts(found.captions).numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.images, axis=1), 1, atol=1e-6)
    assert found.images.dtype == found.texts.dtype == np.float32
    assert found.fingerprint == encoder.fingerprint
    assert found.faults == {}


@pytest.mark.parametrize(("batch_size", "limit"), [(4, 10), (5, 10), (64, 10), (10, 10), (3, 1), (8, 1000)])
def test_limit_takes_the_first_samples_at_any_batch_size(found, encoder, shards, batch_size, limit):
    part = embed_shards(encoder, [shards], batch_size=batch_size, limit=limit)
    images, texts = min(limit, SAMPLES), int((found.image_of_text < limit).sum())
    assert part.keys == found.keys[:images]
    assert part.captions == found.captions[:texts]
    assert part.image_of_text.tolist() == found.image_of_text[:texts].tolist()
    np.testing.assert_allclose(part.images, found.images[:images], atol=1e-5)
    np.testing.assert_allclose(part.texts, found.texts[:texts], atol=1e-5)


def test_loader_processes_change_nothing(found, encoder, shards):
    part = embed_shards(encoder, shards, batch_size=7, workers=2)
    assert part.keys == found.keys
    assert np.array_equal(part.images, found.images)
    assert np.array_equal(part.texts, found.texts)


def test_bad_samples_are_left_out_and_the_pairs_stay_together(encoder, make_picture, tmp_path):
    good = [0, 2, 4, 5]
    with ShardWriter(tmp_path) as writer:
        for number in range(6):
            image = b"no picture" if number == 1 else make_picture(number)
            writer.write(Sample(f"{number}", image, "jpg", [] if number == 3 else captions_of(number)))
    part = embed_shards(encoder, str(tmp_path), batch_size=2, max_faults=0.5)
    assert part.keys == [str(number) for number in good]
    assert part.samples.tolist() == good
    assert part.faults == {"undecodable_image": 1, "missing_caption": 1}
    assert part.captions == [text for number in good for text in captions_of(number)]
    assert part.image_of_text.tolist() == [row for row, n in enumerate(good) for _ in captions_of(n)]
    page = evaluate(encoder, str(tmp_path), batch_size=4, max_faults=0.5)
    assert page.metrics["faults"] == part.faults
    assert page.metrics["images"] == 4


def test_embedding_refuses_what_it_cannot_do(encoder, shards, make_picture, tmp_path, small_encoder):
    with pytest.raises(ValueError, match="limit must be at least 1 sample, got 0"):
        embed_shards(encoder, shards, limit=0)
    with ShardWriter(tmp_path) as writer:
        for number in range(3):
            writer.write(Sample(f"{number}", make_picture(number) if number else b"none", "jpg", ["text"]))
    with pytest.raises(ValueError, match=r"none of the first 1 samples of .* can be used.*undecodable_image"):
        embed_shards(encoder, str(tmp_path), limit=1, batch_size=1, max_faults=0.9)
    broken = small_encoder(0)
    with torch.no_grad():
        broken.model.text_projection.fill_(float("nan"))
    with pytest.raises(ValueError, match="embedding of a text of sample '00000' is NaN"):
        embed_shards(broken, shards)
    zero = small_encoder(0)
    with torch.no_grad():
        zero.model.visual.proj.zero_()
    with pytest.raises(ValueError, match="embedding of a picture of sample '00000' is NaN, infinite or zero"):
        embed_shards(zero, shards)


def test_search_finds_what_was_indexed(found, encoder, make_picture, tmp_path):
    index = Index.build(found)
    (hits,) = search(index, encoder, texts=[found.captions[9]], among="texts", k=3)
    assert (hits[0].rank, hits[0].text, hits[0].key) == (
        1,
        found.captions[9],
        found.keys[found.image_of_text[9]],
    )
    assert hits[0].score == pytest.approx(1, abs=1e-4)
    assert len(hits) == 3
    path = tmp_path / "query.jpg"
    path.write_bytes(make_picture(17))
    (hits,) = search(index, encoder, images=[path], among="images")
    assert hits[0].key == "00017"
    assert hits[0].text is None
    by_text = search(index, encoder, texts=["dogs", "hills"], k=SAMPLES)
    assert [len(hits) for hits in by_text] == [SAMPLES, SAMPLES]
    assert [hit.score for hit in by_text[0]] == sorted((hit.score for hit in by_text[0]), reverse=True)
    scores = encoder.encode_texts(["dogs", "hills"]).numpy() @ found.images.T
    assert [hit.key for hit in by_text[1]] == [found.keys[row] for row in np.argsort(-scores[1])]


def test_a_query_of_both_lies_between_them(found, encoder, make_picture, tmp_path):
    index = Index.build(found)
    path = tmp_path / "query.jpg"
    path.write_bytes(make_picture(17))
    both = {"texts": ["dogs"], "images": [path]}

    def keys(**more):
        return [
            (hit.key, round(hit.score, 4)) for hit in search(index, encoder, among="images", k=5, **more)[0]
        ]

    assert keys(**both, image_weight=1) == keys(images=[path])
    assert keys(**both, image_weight=0) == keys(texts=["dogs"])
    text, image = encoder.encode_texts(["dogs"]).numpy(), encoder.encode_images([make_picture(17)]).numpy()
    assert keys(**both, image_weight=0.3) == keys(vectors=0.7 * text + 0.3 * image)
    with pytest.raises(ValueError, match="expected as many of each, got 2 and 1"):
        search(index, encoder, texts=["a", "b"], images=[path])
    with pytest.raises(ValueError, match=r"image_weight is a share in \[0, 1\], got 2"):
        search(index, encoder, **both, image_weight=2)


def test_search_refuses_wrong_questions(found, encoder, tmp_path, small_encoder):
    index = Index.build(found)
    with pytest.raises(ValueError, match=r"index holds embeddings of .* their scores would mean nothing"):
        search(index, small_encoder(1), texts=["a dog"])
    with pytest.raises(ValueError, match="expected texts, images or vectors as queries, got none"):
        search(index, encoder)
    with pytest.raises(ValueError, match=f"k is 1,000, but the index holds {SAMPLES} images"):
        search(index, encoder, texts=["a"], k=1000)
    with pytest.raises(ValueError, match="among: 'videos', expected images or texts"):
        search(index, encoder, texts=["a"], among="videos")
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.jpg: expected a picture file: undecodable_image"):
        search(index, encoder, images=[tmp_path / "notes.jpg"])
    with pytest.raises(FileNotFoundError, match="absent"):
        search(index, encoder, images=[tmp_path / "absent.jpg"])


def test_the_evaluator_leaves_training_untouched(shards, found, small_encoder):
    encoder = small_encoder(0)
    encoder.model.train()
    encoder.model.visual.eval()  # a locked tower
    modes = [module.training for module in encoder.model.modules()]
    state, before = torch.get_rng_state(), encoder.fingerprint
    numpy_state = repr(np.random.get_state())  # noqa: NPY002 - the global one is what must not move
    evaluator = load_evaluator(
        Evaluation(
            use="retrieval.evaluator:RetrievalEvaluator",
            options={"shards": shards, "limit": 20, "batch_size": 6},
        )
    )
    numbers = evaluator.run(encoder)
    assert [module.training for module in encoder.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002
    assert encoder.fingerprint == before
    few = found.image_of_text < 20
    exact = retrieval_metrics(found.images[:20], found.texts[few], found.image_of_text[few])
    shape = diagnostics(found.images[:20], found.texts[few], found.image_of_text[few])
    assert {"alignment", "modality_gap", "effective_rank_images"} < set(shape)
    exact["diagnostics"] = shape
    assert set(numbers) == {f"diagnostics/{name}" for name in shape} | {
        f"{direction}/{name}"
        for direction in ("image_to_text", "text_to_image")
        for name in ("recall@1", "recall@5", "recall@10", "median_rank", "mean_rank")
    }
    for name, value in numbers.items():
        direction, metric = name.split("/")
        assert value == pytest.approx(exact[direction][metric], rel=1e-6, abs=1e-9)


def test_the_evaluator_checks_its_options_when_it_is_made(shards):
    with pytest.raises(ValueError, match="limit must be at least 1 sample"):
        RetrievalEvaluator(shards, limit=0)
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        RetrievalEvaluator(shards, ks=[0])


def test_eval_command_writes_numbers_and_a_page(found, model, shards, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {
            "step": step,
            "samples_seen": 64 * step,
            "loss": 3 / step,
            "lr": 1e-3,
            "samples_per_s": 100.0,
            "grad_norm": 1.0,
            "logit_scale": 14.3,
        }
        for step in range(1, 5)
    ]
    lines.append({"step": 4, "samples_seen": 256, "evaluation": {"image_to_text/recall@1": 0.25}})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["retrieval", "eval", "--model", model, "--data", shards, "--batch-size", "7"]
    out = tmp_path / "out"
    assert pairstream([*words, "--json", str(tmp_path / "m.json"), "--out", str(out), "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "image to text" in printed
    assert "by chance" in printed
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics == json.loads((out / "metrics.json").read_text())
    expected = retrieval_metrics(found.images, found.texts, found.image_of_text)
    assert {name: metrics["retrieval"][name] for name in expected} == expected
    assert f"{expected['text_to_image']['recall@5']:.4f}" in printed
    assert metrics["retrieval"]["chance"]["text_to_image"]["recall@1"] == pytest.approx(1 / SAMPLES)
    assert (metrics["images"], metrics["texts"]) == (SAMPLES, len(found.texts))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Training" in page
    assert "<b>" not in page
    blocks = json.loads((out / "report.json").read_text(encoding="utf-8"))["blocks"]
    text_wall, image_wall = [block for block in blocks if block["kind"] == "results"]
    for entry in text_wall["entries"]:
        row = found.captions.index(entry["query"]["title"])
        order = np.argsort(-(found.images @ found.texts[row]))
        place = int(np.flatnonzero(order == found.image_of_text[row])[0])
        marks = [card["mark"] for card in entry["results"]]
        assert marks == ["right" if rank == place else None for rank in range(5)]
        assert entry["query"]["lines"] == [f"its picture: rank {place + 1} of {SAMPLES}"]
    for entry, row in zip(image_wall["entries"], spaced(SAMPLES, 10), strict=True):
        order = np.argsort(-(found.texts @ found.images[row]))[:5]
        assert [card["title"] for card in entry["results"]] == [found.captions[text] for text in order]
        right = [card["title"] for card in entry["results"] if card["mark"] == "right"]
        assert right == [found.captions[text] for text in order if found.image_of_text[text] == row]


def test_embed_index_and_search_commands(model, shards, found, make_picture, tmp_path, capsys, small_encoder):
    rows, index = str(tmp_path / "rows"), str(tmp_path / "index")
    embed = ["retrieval", "embed", "--model", model, "--data", shards, "--out", rows, "--dtype", "float32"]
    assert pairstream(embed) == 0
    assert pairstream(["retrieval", "index", "--embeddings", rows, "--out", index]) == 0
    find = ["retrieval", "search", "--index", index, "--model", model]
    capsys.readouterr()
    assert pairstream([*find, "--text", found.captions[30], "--among", "texts", "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[:2] == ["1", "1.0000"]
    assert lines[0].endswith(found.captions[30])
    (tmp_path / "query.jpg").write_bytes(make_picture(5))
    assert pairstream([*find, "--image", str(tmp_path / "query.jpg"), "--among", "images", "--k", "1"]) == 0
    assert capsys.readouterr().out.split() == ["1", "1.0000", "00005"]
    other = str(small_encoder(1).save(tmp_path / "other"))
    for words, message in (
        (find, "give --text, --image, both, or --vector"),
        (["retrieval", "search", "--index", index, "--text", "a dog"], "--text and --image need --model"),
        (["retrieval", "update", "--index", index], "give one of --add, --delete, --merge and --compact"),
        ([*find[:-1], other, "--text", "a dog"], "their scores would mean nothing"),
        ([*find, "--text", "a dog", "--k", "0"], "k must be at least 1, got 0"),
        (["retrieval", "index", "--embeddings", rows, "--out", index], "already holds pairstream-index"),
        (["retrieval", "embed", "--model", other, "--data", shards, "--out", rows], "--overwrite"),
        (["retrieval", "index", "--embeddings", str(tmp_path / "no"), "--out", "x"], "does not exist"),
    ):
        assert pairstream(words) == 2
        assert message in capsys.readouterr().err
    np.save(tmp_path / "several.npy", found.images[:3])
    several = ["retrieval", "search", "--index", index, "--vector", str(tmp_path / "several.npy")]
    assert pairstream(several) == 2
    assert "expected one vector, got an array of shape (3," in capsys.readouterr().err
    np.save(tmp_path / "vector.npy", found.images[5])
    ask = ["retrieval", "search", "--index", index, "--vector", str(tmp_path / "vector.npy"), "--k", "1"]
    assert pairstream(ask) == 0
    assert capsys.readouterr().out.split() == ["1", "1.0000", "00005"]
    (tmp_path / "keys.txt").write_text("00005\n")
    assert pairstream(["retrieval", "update", "--index", index, "--delete", str(tmp_path / "keys.txt")]) == 0
    assert f"{SAMPLES - 1} images in 1 segments" in capsys.readouterr().out
    assert pairstream(ask) == 0
    assert "00005" not in capsys.readouterr().out
    assert pairstream(["retrieval", "update", "--index", index, "--add", rows]) == 2
    assert "the index already holds the key '00000'" in capsys.readouterr().err


def test_eval_command_never_overwrites_a_training_run(model, shards, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("")
    words = ["retrieval", "eval", "--model", model, "--data", shards]
    assert pairstream([*words, "--out", str(tmp_path)]) == 2
    assert "holds a training run, whose report would be lost" in capsys.readouterr().err
    assert pairstream([*words, "--run", str(tmp_path)]) == 2
    assert "give --out for the report, too" in capsys.readouterr().err
    assert pairstream([*words, "--run", str(tmp_path), "--out", str(tmp_path / "page")]) == 2
    assert "no log there; expected a pretraining run folder" in capsys.readouterr().err


def test_wall_queries_are_spread_over_the_set():
    assert spaced(1000, 3) == [0, 500, 999]
    assert spaced(2, 10) == [0, 1]
    assert spaced(1, 10) == [0]
