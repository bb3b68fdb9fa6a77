"""Zero-shot classification and the comparison of checkpoints, on real shards, folders and small encoders."""

from __future__ import annotations

import json
import os

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification as peer

from data.shards import Sample, ShardWriter
from pairstream.cli import main as pairstream
from pretrain.encoder import Encoder
from pretrain.towers import instantiate
from retrieval.cache import cache_key
from retrieval.classifier import Classifier, build_classifier
from retrieval.classify import classify
from retrieval.labelled import class_numbers
from retrieval.prompts import named_classes, named_templates, prompts_of, templates_hash

CLASSES = ["dog", "sea snake", "boat", "hill", "red bus", "cat"]
TEMPLATES = ["a photo of a {}.", "the {}", "many {}s in one long sentence about nothing at all"]
PICTURES = 24


@pytest.fixture(scope="module")
def encoder(small_encoder):
    return small_encoder(0)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(0).permutation(np.arange(PICTURES) % len(CLASSES)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_picture, labels):
    root = tmp_path_factory.mktemp("folder")
    for number, label in enumerate(labels):
        # Sorted folder names are in the order of CLASSES.
        place = root / f"{label}_{CLASSES[label].replace(' ', '_')}"
        place.mkdir(exist_ok=True)
        (place / f"{number:03d}.jpg").write_bytes(make_picture(number))
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_picture, labels):
    root = tmp_path_factory.mktemp("shards")
    with ShardWriter(root, samples_per_shard=10) as writer:
        for number, label in enumerate(labels):
            meta = {"label": label if number % 2 else CLASSES[label]}  # by number, or by name
            writer.write(Sample(f"{number:03d}", make_picture(number), "jpg", ["a text"], meta))
    return str(root)


def test_the_classifier_is_clip_benchmarks(encoder):
    peer.tqdm = lambda items: items
    marked = [template.replace("{}", "{c}") for template in TEMPLATES]
    theirs = peer.zero_shot_classifier(encoder.model, encoder.tokenizer, CLASSES, marked, "cpu", amp=False)
    for batch_size in (1, 4, 256):
        ours = build_classifier(encoder, CLASSES, TEMPLATES, batch_size=batch_size)
        np.testing.assert_allclose(ours.weights, theirs.T.numpy(), atol=1e-6)
    own = {name: [f"a {name}", f"{name} seen from above"] for name in CLASSES}
    theirs = peer.zero_shot_classifier(encoder.model, encoder.tokenizer, CLASSES, own, "cpu", amp=False)
    np.testing.assert_allclose(build_classifier(encoder, CLASSES, own).weights, theirs.T.numpy(), atol=1e-6)


def test_numbers_are_clip_benchmarks_on_shards_and_folders(encoder, shards, folder, labels, make_picture):
    result = classify(encoder, shards, classes=CLASSES, templates=TEMPLATES, batch_size=7)
    rows = encoder.encode_images([make_picture(number) for number in range(PICTURES)])
    logits = 100 * rows @ torch.from_numpy(result.classifier.weights).T
    target = torch.tensor(labels)
    # The peer's own `accuracy` breaks on this NumPy; this is what it computes.
    acc1, acc5 = ((logits.topk(k).indices == target[:, None]).any(1).double().mean().item() for k in (1, 5))
    numbers = result.metrics["classification"]
    assert numbers["acc1"] == pytest.approx(acc1)
    assert numbers["acc5"] == pytest.approx(acc5)
    recall = peer.balanced_accuracy_score(target, logits.argmax(1))
    assert numbers["mean_per_class_recall"] == pytest.approx(recall)
    assert sum(each["pictures"] for each in numbers["confusions"]) == round(PICTURES * (1 - acc1))
    from_folder = classify(encoder, folder, classes=CLASSES, templates=TEMPLATES, batch_size=5, workers=1)
    for name in ("acc1", "acc5", "mean_per_class_recall"):
        assert from_folder.metrics["classification"][name] == pytest.approx(numbers[name])
    assert from_folder.metrics["templates_hash"] == result.metrics["templates_hash"]
    few = classify(encoder, shards, classes=CLASSES, limit=9, batch_size=4).metrics
    assert few["classification"]["pictures"] == 9


def test_a_limit_takes_pictures_of_all_class_folders(encoder, folder):
    found = classify(encoder, folder, limit=6, batch_size=4).metrics["classification"]
    assert (found["pictures"], found["classes_without_pictures"]) == (6, 0)
    assert classify(encoder, folder, limit=500).metrics["classification"]["pictures"] == PICTURES


def test_names_that_are_no_utf8_and_folders_in_folders(encoder, make_picture, tmp_path):
    try:
        odd = tmp_path / os.fsdecode(b"caf\xe9_{}")
        (odd / "deeper").mkdir(parents=True)
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    (tmp_path / "d\u00f3g, \u201ebig\u201c & 犬").mkdir()
    for number, place in enumerate((odd, odd / "deeper", next(tmp_path.glob("d*")))):
        (place / "same.jpg").write_bytes(make_picture(number))
    found = classify(encoder, tmp_path, templates=["a {} in a {}", "{}"])
    assert found.metrics["class_names"] == ["caf\ufffd {}", "d\u00f3g, \u201ebig\u201c & 犬"]
    assert found.metrics["classification"]["pictures"] == 3
    json.dumps(found.metrics, ensure_ascii=False).encode()  # it can be written
    assert cache_key(encoder, str(tmp_path), limit=None)


def test_names_and_numbers_as_labels():
    assert class_numbers("2", CLASSES, "k") == [2]
    assert class_numbers(["sea snake", 0], CLASSES, "k") == [1, 0]
    assert class_numbers("7", ["7", "8"], "k") == [0]  # a class called 7
    with pytest.raises(ValueError, match=r"sample 'k': label 6 is outside the list of 6 classes \(0 to 5\)"):
        class_numbers(6, CLASSES, "k")
    with pytest.raises(ValueError, match="label 'bots' is not in the list of 6 classes; did you mean 'boat'"):
        class_numbers("bots", CLASSES, "k")
    with pytest.raises(ValueError, match="label 'a' is twice in the list"):
        class_numbers("a", ["a", "b", "a"], "k")


def test_webdataset_cls_members_are_labels(encoder, make_picture, tmp_path, labels):
    import webdataset

    with (tmp_path / "0.tar").open("wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for number, label in enumerate(labels):
            tar.write({"__key__": f"{number}", "jpg": make_picture(number), "cls": str(label).encode()})
    found = classify(encoder, str(tmp_path), classes=CLASSES)
    assert found.metrics["classification"]["pictures"] == PICTURES


def test_several_labels_give_mean_average_precision(encoder, make_picture, tmp_path):
    rng = np.random.default_rng(1)
    target = rng.random((PICTURES, len(CLASSES))) < 0.3
    target[:, 5] = False  # a class without pictures is left out of the mean
    with ShardWriter(tmp_path) as writer:
        for number in range(PICTURES):
            meta = {"label": np.flatnonzero(target[number]).tolist()}
            writer.write(Sample(f"{number:03d}", make_picture(number), "jpg", ["x"], meta))
    found = classify(encoder, str(tmp_path), classes=CLASSES, batch_size=5)
    rows = encoder.encode_images([make_picture(number) for number in range(PICTURES)])
    scores = rows @ torch.from_numpy(found.classifier.weights).T
    theirs = peer.average_precision_per_class(scores, torch.from_numpy(target))
    numbers = found.metrics["classification"]
    assert numbers["average_precision"][:5] == pytest.approx(theirs[:5].tolist(), abs=1e-6)
    assert numbers["average_precision"][5] is None
    assert numbers["mean_average_precision"] == pytest.approx(theirs[:5].mean().item(), abs=1e-6)


def test_tokeniser_and_resize_come_from_the_models_own_configuration(make_picture, tmp_path):
    # SigLIP's ways: every text padded to the full length with the pad token and seen whole (no causal mask),
    # lower case, no punctuation, pictures squashed.
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}
    siglip = {
        **text,
        "no_causal_mask": True,
        "pool_type": "last",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    torch.manual_seed(0)
    models = {}
    for name, text_cfg, preprocess in (
        ("siglip", siglip, {"resize_mode": "squash", "interpolation": "bicubic"}),
        ("clip", text, {}),
    ):
        config = {
            "embed_dim": 16,
            "vision_cfg": vision,
            "text_cfg": text_cfg,
            "custom_text": name == "siglip",
        }
        models[name] = Encoder(instantiate(config, preprocess), name, "cpu")
    names = ["Red Bus", "red bus!", "cat"]
    weights = {name: build_classifier(each, names, ["{}"]).weights for name, each in models.items()}
    assert np.array_equal(weights["siglip"][0], weights["siglip"][1])  # canonical text
    assert not np.allclose(weights["clip"][0], weights["clip"][1])
    seen = []
    models["siglip"].model.text.transformer.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    build_classifier(models["siglip"], names, ["{}"])
    assert seen == [16]  # the padding is part of the text
    stock = open_clip.get_tokenizer(f"local-dir:{models['siglip'].save(tmp_path / 'model')}")
    assert torch.equal(stock(names), models["siglip"].tokenize(names))
    wide = make_picture(3, size=(64, 16))
    squashed, cropped = (models[name].preprocess(wide) for name in ("siglip", "clip"))
    assert not torch.equal(squashed, cropped)


def test_a_saved_classifier_is_used_again_and_only_with_its_model(encoder, shards, tmp_path, small_encoder):
    first = classify(encoder, shards, classes=CLASSES, templates=TEMPLATES)
    path = first.classifier.save(tmp_path / "classes.safetensors")
    loaded = Classifier.load(path)
    assert np.array_equal(loaded.weights, first.classifier.weights)
    again = classify(encoder, shards, classifier=loaded)
    assert again.metrics["classification"] == first.metrics["classification"]
    assert again.metrics["templates_hash"] == first.metrics["templates_hash"]
    with pytest.raises(ValueError, match=r"classifier is of .* their scores would mean nothing"):
        classify(small_encoder(1), shards, classifier=loaded)
    with pytest.raises(ValueError, match="has its classes and templates: give either it or them"):
        classify(encoder, shards, classifier=loaded, classes=CLASSES)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        Classifier.load(path)
    with pytest.raises(FileNotFoundError, match="expected a classifier that --save wrote"):
        Classifier.load(tmp_path / "absent")


def test_known_names_and_templates(encoder):
    assert {name: len(each) for name, each in named_classes().items()} == {
        "imagenet": 1000,
        "cifar10": 10,
        "cifar100": 100,
    }
    templates = named_templates()
    assert {name: len(each) for name, each in templates.items()} == {
        "imagenet": 80,
        "simple": 7,
        "cifar": 18,
        "plain": 1,
    }
    for ours, theirs in zip(templates["imagenet"], open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert prompts_of("dog", [ours]) == [theirs("dog")]
    assert templates_hash(CLASSES, TEMPLATES) != templates_hash(CLASSES, TEMPLATES[:2])


def test_classify_and_compare_commands(encoder, folder, tmp_path, make_picture, capsys, small_encoder):
    models = [str(small_encoder(seed).save(tmp_path / f"model{seed}")) for seed in (0, 1)]
    words = ["retrieval", "classify", "--model", models[0], "--data", str(folder)]
    saved, out = tmp_path / "c.safetensors", tmp_path / "c.json"
    assert pairstream([*words, "--templates", "simple", "--save", str(saved), "--json", str(out)]) == 0
    metrics = json.loads(out.read_text())
    assert metrics["prompts"] == 7 * len(CLASSES)
    assert metrics["tokenizer"]["context_length"] == 32
    assert f"{metrics['classification']['acc1']:.4f}" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("\n".join(CLASSES[:4]))
    for extra, message in (
        (["--classes", str(tmp_path / "names.txt")], "6 class folders, but 4 classes"),
        (["--classes", "imagnet"], "did you mean 'imagenet'"),
        (["--classifier", str(out)], "is damaged or no safetensors file"),
    ):
        assert pairstream([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    with ShardWriter(tmp_path / "pairs") as writer:
        for number in range(12):
            texts = [f"text {number}", f"another one of {number}"]
            writer.write(Sample(f"{number:03d}", make_picture(number), "jpg", texts))
    results = []
    for number, model in enumerate(models):
        results.append(str(tmp_path / f"r{number}.json"))
        evaluate = ["retrieval", "eval", "--model", model, "--data", str(tmp_path / "pairs"), "--folds", "3"]
        assert pairstream([*evaluate, "--json", results[-1]]) == 0
    assert json.loads((tmp_path / "r0.json").read_text())["folds"]["images"] == 4
    compare = ["retrieval", "compare", *results, "--resamples", "500", "--json", str(tmp_path / "d.json")]
    capsys.readouterr()
    assert pairstream(compare) == 0
    found = json.loads((tmp_path / "d.json").read_text())
    first, second = (json.loads((tmp_path / f"r{number}.json").read_text()) for number in (0, 1))
    for direction in ("image_to_text", "text_to_image"):
        for name in ("recall@5", "mrr", "mean_rank"):
            each = found[direction][name]
            assert each["first"] == pytest.approx(first["retrieval"][direction][name])
            assert each["second"] == pytest.approx(second["retrieval"][direction][name])
            assert 0 < each["p"] <= 1
            low, high = first["intervals"][direction][name]
            assert low <= first["retrieval"][direction][name] <= high
    assert "recall@5" in capsys.readouterr().out
    beside = tmp_path / "r1.queries.safetensors"
    other = ["retrieval", "eval", "--model", models[1], "--data", str(tmp_path / "pairs"), "--limit", "9"]
    assert pairstream([*other, "--json", str(tmp_path / "few.json")]) == 0
    capsys.readouterr()
    assert pairstream(["retrieval", "compare", results[0], str(tmp_path / "few.json")]) == 2
    assert "were measured on different pairs" in capsys.readouterr().err
    beside.write_bytes((tmp_path / "r0.queries.safetensors").read_bytes())
    assert pairstream(compare) == 2
    assert "is damaged or of another run than r1.json" in capsys.readouterr().err
    beside.unlink()
    assert pairstream(compare) == 2
    assert "is missing: keep it beside r1.json" in capsys.readouterr().err


def test_bad_sets_are_refused(encoder, shards, folder, make_picture, tmp_path):
    with pytest.raises(ValueError, match="shards do not name their classes: give --classes"):
        classify(encoder, shards)
    with pytest.raises(ValueError, match="is not in the list of 2 classes; label with numbers"):
        classify(encoder, shards, classes=["one", "two"])
    with pytest.raises(ValueError, match="limit must be at least 1 picture, got 0"):
        classify(encoder, folder, limit=0)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.jpg").write_bytes(make_picture(0))
    with pytest.raises(ValueError, match="two or more folders of pictures named as their classes, found 1"):
        classify(encoder, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pictures there"):
        classify(encoder, tmp_path)
    (tmp_path / "empty" / "b.jpg").write_bytes(b"no picture")
    found = classify(encoder, tmp_path, max_faults=0.6)
    assert found.metrics["faults"] == {"undecodable_image": 1}
    with pytest.raises(ValueError, match="undecodable_image"):
        classify(encoder, tmp_path)
    with ShardWriter(tmp_path / "bare") as writer:
        writer.write(Sample("0", make_picture(0), "jpg", ["x"]))
    with pytest.raises(ValueError, match="missing_label"):
        classify(encoder, str(tmp_path / "bare"), classes=CLASSES)
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{\} for the class name"):
        build_classifier(encoder, CLASSES, ["a photo"])
    with pytest.raises(ValueError, match="class 'boat' has None"):
        build_classifier(encoder, ["dog", "boat"], {"dog": ["a dog"]})
    with pytest.raises(ValueError, match="two or more class names, got 1"):
        build_classifier(encoder, ["dog"], ["{}"])
