"""Image-text classification: heads by hand, missing modalities, training, resuming, saving, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.shards import Sample, ShardWriter
from finetune.cli import main
from finetune.fusion.heads import build_head
from finetune.fusion.inputs import token_grid, waves
from finetune.fusion.looking import LookingLayer
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ClassifyTask, CoAttention, CrossAttention, Pooled, SingleStream
from finetune.fusion.saved import load_classifier
from finetune.fusion.task import Classification
from finetune.predict import predict
from finetune.recipe import FinetuneRecipe
from pairstream.cli import run_stage
from pairstream.recipe import validate

FUSIONS = [
    {"kind": "tanh", "width": 16},
    {"kind": "concat", "width": 16},
    {"kind": "gated", "width": 16},
    {"kind": "product", "width": 16},
    {"kind": "product", "width": 16, "picture": "tokens"},
    {"kind": "product", "width": 16, "picture": "mean_max"},
    {"kind": "single_stream", "width": 16, "layers": 1, "heads": 2},
    {"kind": "co_attention", "width": 16, "layers": 1, "heads": 2},
    {"kind": "cross_attention", "width": 16, "layers": 1, "heads": 2},
]
MOODS = ("bad", "fine", "good")


@pytest.fixture(scope="module")
def make_model(small_encoder):
    def make(fusion: dict, **options) -> FusionClassifier:
        torch.manual_seed(1)
        task = ClassifyTask.model_validate({"fusion": fusion, "labels": MOODS, **options})
        return FusionClassifier(small_encoder(width=16, context=8), task, MOODS).eval()

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, coloured) -> Path:
    """Posts whose words tell the mood in one half, and whose picture does in the other; some have no label."""
    root = tmp_path_factory.mktemp("fusion")
    colours = {"bad": "red", "fine": "grey", "good": "green"}
    for split, count in (("train", 60), ("val", 24)):
        with ShardWriter(root / split, samples_per_shard=30) as writer:
            for number in range(count):
                mood = MOODS[number % 3]
                told = (number // 3) % 2 == 0
                text = f"this is {mood}" if told else "look at this"
                colour = "grey" if told else colours[mood]
                record = {} if number % 10 == 9 else {"text": text, "label": mood}
                picture = coloured(colour, number + 1000 * (split == "val"))
                writer.write(Sample(f"{number:03d}", picture, "png", ["x"], record))
    small_encoder(width=16, context=8).save(root / "encoder")
    return root


def recipe(world: Path, run: Path, task: dict | None = None, **changes) -> FinetuneRecipe:
    content = {
        "run": str(run),
        "model": {"name": str(world / "encoder")},
        "task": {"kind": "classify", "fusion": {"kind": "gated", "width": 32}, **(task or {})},
        "data": {"train": str(world / "train"), "val": str(world / "val"), **changes.pop("data", {})},
        "batch_size": 20,
        "steps": 8,
        "tower_lr": 1.0,
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "log_every": 4,
        **changes,
    }
    return validate(FinetuneRecipe, content, "test")


def train(recipe: FinetuneRecipe, **options) -> dict:
    from finetune.trainer import Finetuner

    return Finetuner(recipe, **options).train()


def test_pooled_heads_are_their_formulas():
    torch.manual_seed(0)
    image, text, seen = torch.randn(2, 1, 5), torch.randn(3, 1, 7), torch.ones(3, 1).bool()
    own = torch.tensor([1, 0, 1])
    x = torch.nn.functional.layer_norm(image[own, 0], (5,))
    y = torch.nn.functional.layer_norm(text[:, 0], (7,))
    head = build_head(Pooled(kind="tanh", width=4), image_dim=5, text_dim=7)
    expected = torch.tanh(x @ head.image.weight.T + head.image.bias + y @ head.text.weight.T)
    assert torch.allclose(head(image, text, seen, own), expected, atol=1e-6)
    head = build_head(Pooled(kind="concat", width=4), image_dim=5, text_dim=7)
    expected = torch.nn.functional.gelu(torch.cat([x, y], 1) @ head.both.weight.T + head.both.bias)
    assert torch.allclose(head(image, text, seen, own), expected, atol=1e-6)
    head = build_head(Pooled(kind="product", width=4), image_dim=5, text_dim=7)
    expected = torch.tanh(head.image(x)) * torch.tanh(head.text(y))
    assert torch.allclose(head(image, text, seen, own), expected, atol=1e-6)
    head = build_head(Pooled(kind="product", width=4), image_dim=5, text_dim=7, norm_image=False)
    expected = torch.tanh(head.image(image[own, 0])) * torch.tanh(head.text(y))
    assert torch.allclose(head(image, text, seen, own), expected, atol=1e-6)
    head = build_head(Pooled(kind="gated", width=4), image_dim=5, text_dim=7)
    gate = torch.sigmoid(torch.cat([x, y], 1) @ head.gate.weight.T + head.gate.bias)
    expected = gate * torch.tanh(head.image(x)) + (1 - gate) * torch.tanh(head.text(y))
    assert torch.allclose(head(image, text, seen, own), expected, atol=1e-6)


TOKEN_HEADS = [
    SingleStream(width=8, heads=2),
    CoAttention(width=8, heads=2),
    CrossAttention(width=8, layers=2, heads=2),
]


@pytest.mark.parametrize("config", TOKEN_HEADS, ids=lambda config: config.kind)
def test_token_heads_do_not_see_padding(config):
    torch.manual_seed(0)
    head = build_head(config, image_dim=5, text_dim=7, grid=(2, 2)).eval()
    image, text, seen = torch.randn(2, 4, 5), torch.randn(2, 6, 7), torch.ones(2, 6).bool()
    seen[1, 3:] = False
    own = torch.arange(2)
    before = head(image, text, seen, own)
    text[1, 3:] = 9.0
    assert torch.allclose(head(image, text, seen, own), before, atol=1e-6)
    alone = head(image[1:], text[1:, :3], seen[1:, :3], own[:1])
    assert torch.allclose(alone, before[1:], atol=1e-5)
    text[1, 0] = 9.0
    assert not torch.allclose(head(image, text, seen, own), before, atol=1e-3)


@pytest.mark.parametrize("config", TOKEN_HEADS, ids=lambda config: config.kind)
def test_token_heads_know_places_and_share_pictures(config):
    torch.manual_seed(0)
    head = build_head(config, image_dim=5, text_dim=7, grid=(2, 3)).eval()
    image, text, seen = torch.randn(2, 6, 5), torch.randn(4, 3, 7), torch.ones(4, 3).bool()
    own = torch.tensor([1, 0, 1, 1])
    found = head(image, text, seen, own)
    assert torch.allclose(head(image[own], text, seen, torch.arange(4)), found, atol=1e-5)
    turned = image.view(2, 2, 3, 5).flip(2).flatten(1, 2)  # the same tokens, left and right swapped
    assert not torch.allclose(head(turned, text, seen, own), found, atol=1e-3)


def test_many_texts_of_a_picture_are_each_read_as_if_alone():
    torch.manual_seed(0)
    head = build_head(CrossAttention(width=8, layers=2, heads=2), image_dim=5, text_dim=7, grid=(2, 2)).eval()
    image, text, lengths = torch.randn(3, 4, 5), torch.randn(100, 6, 7), torch.randint(1, 7, (100,))
    seen, own = torch.arange(6) < lengths[:, None], torch.randint(0, 3, (100,))
    found = head(image, text, seen, own)
    for number, length in enumerate(lengths.tolist()):
        row = slice(number, number + 1)
        alone = head(image, text[row, :length], seen[row, :length], own[row])
        assert torch.allclose(alone[0], found[number], atol=1e-5), number


def test_the_looking_layer_is_its_formula():
    torch.manual_seed(0)
    step = LookingLayer(8, 2)
    torch.nn.init.normal_(step.look.empty)
    text, picture, own = torch.randn(3, 4, 8), torch.randn(2, 5, 8), torch.tensor([1, 0, 1])
    seen = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    found = step(text, seen[:, None, None], step.look.keys(picture), own, only_first=False)
    first = step(text, seen[:, None, None], step.look.keys(picture), own, only_first=True)
    assert torch.allclose(first, found[:, :1], atol=1e-6)

    def attend(part, queries, keys, values):
        rows = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (part.query(queries)[:, head] @ keys[:, head].T / 2).softmax(-1)
            rows.append(weights @ values[:, head])
        return part.out(torch.cat(rows, 1))

    for number in range(3):
        x = step.norm(text[number])
        known = x[seen[number]]
        part = step.attention
        y = text[number] + attend(part, x, part.key(known), part.value(known))
        part, cells = step.look, picture[own[number]]
        keys = torch.cat([part.key(cells), part.empty[0]])
        values = torch.cat([part.value(cells), torch.zeros(1, 8)])
        y = y + attend(part, step.look_norm(y), keys, values)
        gate, content = step.wide(step.gated_norm(y)).split(24, dim=1)
        y = y + step.narrow(torch.nn.functional.gelu(gate) * content)
        assert torch.allclose(found[number], y, atol=1e-5)


def test_places_of_a_grid_are_waves_of_row_and_column():
    found = waves((2, 3), 10)
    assert found.shape == (6, 10)
    for place in range(6):
        row, column = divmod(place, 3)
        angles = [rate * at for at in (row, column) for rate in (1.0, 0.1)]
        expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
        assert found[place].tolist() == pytest.approx([*expected, 0.0, 0.0], abs=1e-6)
    assert token_grid(36, (96, 96)) == (6, 6)
    assert token_grid(18, (48, 96)) == (3, 6)
    assert token_grid(197, (224, 224)) == (1, 197)  # 14 x 14 with a class token in front


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "-".join(map(str, fusion.values())))
def test_every_head_answers_with_a_modality_missing_and_comes_back_from_disk(
    fusion, tmp_path, make_picture, make_model
):
    model = make_model(fusion)
    files = [make_picture(seed) for seed in range(3)]
    found = model.classify([files[0], None, files[2]], ["a day", "bad day", None])
    assert all(sum(row.values()) == pytest.approx(1) and list(row) == list(MOODS) for row in found)
    alone = [
        model.classify([files[0]], ["a day"]),
        model.classify([None], ["bad day"]),
        model.classify([files[2]], [" "]),
    ]
    for row, one in zip(found, alone, strict=True):  # neighbours in the batch do not matter
        assert row == pytest.approx(one[0], abs=1e-6)
    # What a missing modality would have been does not matter either.
    images = torch.stack([model.encoder.preprocess(file) for file in files])
    text, no = model.encoder.tokenize(["a day"] * 3), torch.ones(3).bool()
    with torch.no_grad():
        rows = model.logits(model.image_features(images), text, no, ~no)
    assert torch.allclose(rows[0], rows[1], atol=1e-6)
    model.save(tmp_path / "model")
    again = load_classifier(tmp_path / "model", device="cpu")
    assert again.classify([files[0], None, files[2]], ["a day", "bad day", None]) == found
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {"encoder", "fusion.safetensors", "task.json"}


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "-".join(map(str, fusion.values())))
def test_the_loss_is_a_weighted_sum_and_every_parameter_that_trains_has_a_gradient(
    fusion, make_picture, make_model
):
    model = make_model(fusion, modality_dropout=0.0, dropout=0.0)
    model.class_weights.copy_(torch.tensor([2.0, 1.0, 0.5]))
    images = torch.stack([model.encoder.preprocess(make_picture(seed)) for seed in range(4)])
    text = model.encoder.tokenize(["a b", "c d", "e f", "g h"])
    labels, missing = torch.tensor([0, 2, -100, 1]), torch.tensor([False, False, False, True])
    loss = model(text, missing, labels, images=images)
    with torch.no_grad():
        logits = model.logits(model.image_features(images), text, torch.zeros(4).bool(), missing).double()
    expected = -sum(
        weight * logits[row].log_softmax(0)[label]
        for row, label, weight in [(0, 0, 2.0), (1, 2, 0.5), (3, 1, 1.0)]
    )
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    kept = model(text, missing, labels, tokens=model.image_tokens(images))
    assert torch.equal(kept, loss)
    loss.backward()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("towers.visual") for name in names)
    assert any(name.startswith("towers.") for name in names)
    dead = {name for name in names if model.get_parameter(name).grad is None}
    assert dead == set()
    model.zero_grad()
    model.train()
    assert not model.towers.training


def test_modality_dropout_takes_one_or_the_other_but_never_both(monkeypatch, make_model):
    model = make_model(FUSIONS[0], modality_dropout=0.3).train()
    seen = []

    def record(image, text, no_image, no_text, text_of, image_of_text):
        seen.append((no_image, no_text))
        return torch.zeros(len(text), 3, requires_grad=True)

    monkeypatch.setattr(model, "logits", record)
    missing = torch.arange(4000) % 4 == 0
    model(torch.zeros(4000, 8).long(), missing, torch.zeros(4000).long(), tokens=torch.zeros(4000, 1, 16))
    no_image, no_text = seen[0]
    assert not (no_image & no_text).any()
    assert (no_text >= missing).all()
    assert no_image[~missing].float().mean() == pytest.approx(0.3, abs=0.04)
    assert no_text[~missing].float().mean() == pytest.approx(0.3, abs=0.04)


def test_it_learns_what_neither_modality_tells_alone(world, tmp_path):
    chosen = recipe(
        world, tmp_path / "run", {"modality_dropout": 0.1}, steps=60, evaluate={"every": 30, "wall": 6}
    )
    metrics = train(chosen)
    assert metrics["accuracy"] > 0.9
    assert metrics["image_only"] < 0.8
    assert metrics["text_only"] < 0.8
    assert metrics["majority_baseline"] < 0.5
    assert (metrics["images"], metrics["unlabelled"], metrics["labels"]) == (22, 2, list(MOODS))
    assert metrics["faults"] == {}
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    assert len(predictions) == 24
    assert set(predictions[0]) == {"image_id", "label", "probabilities"}
    assert "Confusion" in (tmp_path / "run/report.html").read_text()
    predict(model=tmp_path / "run", images=(str(world / "val"),), out=tmp_path / "F.jsonl", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "F.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [entry["label"] for entry in predictions]


def test_killed_and_resumed_is_bit_equal(world, tmp_path, dies_of_saving):

    changes = {"checkpoint": {"every": 4}, "task": {"class_weights": "balanced"}, "freeze_image_tower": False}
    train(recipe(world, tmp_path / "straight", **changes))
    with dies_of_saving():
        train(recipe(world, tmp_path / "killed", **changes))
    train(recipe(world, tmp_path / "killed", **changes), resume=True)
    files = sorted((tmp_path / "straight/checkpoints/step-00000008").rglob("*.safetensors"))
    assert {file.name for file in files} >= {"fusion.safetensors", "open_clip_model.safetensors"}
    for file in files:
        ours, theirs = load_file(file), load_file(Path(str(file).replace("/straight/", "/killed/")))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


def test_kept_features_train_what_pictures_train(world, tmp_path):
    """A frozen tower's features may be kept: the same run, apart from the order of roundings."""
    for name, kept in (("pictures", False), ("kept", True)):
        train(recipe(world, tmp_path / name, {"modality_dropout": 0.0}, data={"cache_image_tokens": kept}))
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints/step-00000008/model/fusion.safetensors")
        for name in ("pictures", "kept")
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_standardised_channels_have_mean_0_and_deviation_1(make_model):
    model = make_model({"kind": "tanh", "width": 16, "picture": "tokens"}, standardise=True)
    dim = len(model.missing_image)
    torch.manual_seed(0)
    features = torch.randn(1500, 3, dim) * torch.logspace(-3, 3, dim) + 5.0
    features[:, :, 0] = 2.0  # never changes
    features[7] = 1e6  # left out
    rows = [row for row in range(1500) if row != 7]
    model.learn_scale(features, rows)
    seen = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][inputs[3]]))
    text = model.encoder.tokenize(["a day"] * len(rows))
    no = torch.zeros(len(rows)).bool()
    with torch.no_grad():
        model.logits(features[rows], text, no, no)
        model.logits(features[rows] + 3.0, text, ~no, no)
    hook.remove()
    given = seen[0].double().flatten(0, 1)
    assert given[:, 0].abs().max() == 0
    assert torch.allclose(given.mean(dim=0), torch.zeros(dim).double(), atol=1e-4)
    expected = torch.ones(dim).double() * torch.arange(dim).ne(0)
    assert torch.allclose(given.std(dim=0, correction=0), expected, atol=1e-4)
    assert torch.equal(seen[1], model.missing_image.expand_as(seen[1]))  # learnt, and not standardised


@pytest.mark.parametrize("picture", ["tokens", "mean_max"])
def test_pooled_heads_get_one_vector_of_all_tokens(picture, make_picture, make_model):
    model = make_model({"kind": "tanh", "width": 16, "picture": picture})
    images = torch.stack([model.encoder.preprocess(make_picture(seed)) for seed in range(2)])
    with torch.no_grad():
        tokens, found = model.encoder.image_tokens(images), model.image_features(images)
    mean, largest = tokens.sum(dim=1) / tokens.shape[1], tokens.max(dim=1).values
    expected = mean if picture == "tokens" else torch.cat([mean, largest], dim=1)
    assert torch.allclose(found, expected[:, None], atol=1e-6)


def test_mean_and_deviation_are_of_the_training_pictures_and_saved(
    world, tmp_path, monkeypatch, dies_of_saving
):
    from finetune.trainer import Finetuner

    task = {"fusion": {"kind": "product", "width": 16, "picture": "tokens"}, "standardise": True}
    changes = {"checkpoint": {"every": 4}, "data": {"cache_image_tokens": True}}

    def made(name, **options):
        return Finetuner(
            recipe(world, tmp_path / name, task, **{**changes, "data": {**changes["data"]}}), **options
        )

    straight = made("straight")
    assert straight.kept is not None
    kept = straight.kept.double().flatten(0, 1)
    assert torch.allclose(straight.model.image_mean.double(), kept.mean(dim=0), atol=1e-6)
    assert torch.allclose(straight.model.image_scale.double(), 1 / kept.std(dim=0, correction=0), rtol=1e-4)
    straight.train()
    with dies_of_saving():
        made("killed").train()
    with monkeypatch.context() as patch:  # a model that goes on keeps its own
        patch.setattr(FusionClassifier, "learn_scale", None)
        made("killed", resume=True).train()
    place = "checkpoints/step-00000008/model/fusion.safetensors"
    ours, theirs = (load_file(tmp_path / name / place) for name in ("straight", "killed"))
    assert {"image_mean", "image_scale"} < set(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = load_classifier(tmp_path / "straight", device="cpu")
    assert torch.equal(again.image_scale, straight.model.image_scale)
    with pytest.raises(ValueError, match=r"task\.standardise .* set data\.cache_image_tokens"):
        recipe(world, tmp_path / "r", task)


def test_a_frozen_text_tower_reads_each_training_text_once(world, tmp_path, monkeypatch):
    from finetune.trainer import Finetuner

    task = {"freeze_text_tower": True, "modality_dropout": 0.0}
    kept = Finetuner(recipe(world, tmp_path / "kept", task, data={"cache_image_tokens": True}))
    assert len(kept.model.kept_texts) == 5  # three that tell the mood, one that does not, and none
    reads = []
    tower = kept.model.towers.transformer
    hook = tower.register_forward_pre_hook(lambda _, args: reads.append(kept.model.training))
    kept.train()
    hook.remove()
    assert reads
    assert not any(reads)  # in evaluation only
    monkeypatch.setattr(FusionClassifier, "keep_texts", lambda self, texts: None)
    train(recipe(world, tmp_path / "read", task, data={"cache_image_tokens": True}))
    place = "checkpoints/step-00000008/model/fusion.safetensors"
    ours, theirs = (load_file(tmp_path / name / place) for name in ("kept", "read"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_balanced_weights_are_one_on_average():
    from finetune.fusion.samples import Post

    task = Classification(ClassifyTask(class_weights="balanced"))
    task.learn([Post("x", "a")] * 6 + [Post("x", "b")] * 2 + [Post("x", None)])
    assert task.class_weights == [8 / 12, 8 / 4]
    assert (6 * task.class_weights[0] + 2 * task.class_weights[1]) / 8 == pytest.approx(1)


def test_bad_input(world, tmp_path, make_picture, make_model, small_encoder):
    model = make_model(FUSIONS[0])
    with pytest.raises(ValueError, match="neither a picture nor a text"):
        model.classify([None], [" "])
    with pytest.raises(ValueError, match="expected one text"):
        model.classify([None], "a post")
    with pytest.raises(ValueError, match="at least two labels"):
        FusionClassifier(small_encoder(width=16, context=8), ClassifyTask(), ["one"])
    assert model.classify([], []) == []
    for task, message in (
        ({"labels": ["bad", "bad"]}, "two or more different names"),
        ({"fusion": {"kind": "co_attention", "width": 9, "heads": 2}}, "not a multiple of heads"),
        ({"fusion": {"kind": "tahn"}}, "tahn"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(world, tmp_path / "r", task)
    with pytest.raises(ValueError, match="0 different values of 'mood'"):
        train(recipe(world, tmp_path / "a", {"label_key": "mood"}))
    with pytest.raises(ValueError, match="unknown_label"):
        train(recipe(world, tmp_path / "b", {"labels": ["bad", "fine"]}))
    with pytest.raises(ValueError, match="no training sample has the label 'great'"):
        train(recipe(world, tmp_path / "c", {"labels": [*MOODS, "great"]}))
    for name, record in {
        "bad_label": {"text": "x", "label": []},
        "bad_text": {"text": 3, "label": "bad"},
    }.items():
        with ShardWriter(tmp_path / name) as writer:
            writer.write(Sample("k", make_picture(0), "jpg", ["x"], record))
        with pytest.raises(ValueError, match=name):
            train(recipe(world, tmp_path / "d", data={"train": str(tmp_path / name)}))
    with ShardWriter(tmp_path / "other") as writer:
        writer.write(Sample("k", make_picture(0), "jpg", ["x"], {"text": "x", "label": "great"}))
    with pytest.raises(ValueError, match="the validation label 'great' is none of the training's"):
        train(recipe(world, tmp_path / "e", steps=3, data={"val": str(tmp_path / "other")}))
    with ShardWriter(tmp_path / "none") as writer:
        writer.write(Sample("k", make_picture(0), "jpg", ["x"], {"text": "x"}))
    with pytest.raises(ValueError, match="no validation sample has 'label'"):
        train(recipe(world, tmp_path / "f", steps=3, data={"val": str(tmp_path / "none")}))


def test_damaged_models_are_refused(tmp_path, make_model):
    folder = make_model(FUSIONS[0]).save(tmp_path / "model")
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**task, "format": 9}))
    with pytest.raises(ValueError, match="format 9, this version reads 1"):
        load_classifier(folder)
    (folder / "task.json").write_text(json.dumps({**task, "task": {"kind": "caption"}}))
    with pytest.raises(ValueError, match="a model for caption, not for classify"):
        load_classifier(folder)
    (folder / "task.json").write_text(json.dumps({**task, "labels": ["a", "b"]}))
    with pytest.raises(ValueError, match="does not fit"):
        load_classifier(folder)
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "fusion.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged or missing"):
        load_classifier(folder)
    with pytest.raises(FileNotFoundError, match="no task model"):
        load_classifier(tmp_path / "nowhere")


def test_a_text_tower_without_tokens_is_refused_by_name(monkeypatch, small_encoder):
    encoder = small_encoder(width=16, context=8)
    monkeypatch.setattr("pretrain.short_texts.reads_at_the_end", lambda tower: False)
    monkeypatch.setattr(
        type(encoder.model), "forward_intermediates", property(lambda self: self.none), raising=False
    )
    with pytest.raises(TypeError, match=r"gives no tokens: take task\.fusion\.kind tanh"):
        FusionClassifier(encoder, ClassifyTask(fusion=CoAttention(width=8, heads=2)), MOODS)


def test_the_command_trains_a_classifier(world, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe(world, tmp_path / "run", steps=3).model_dump(mode="json")))
    assert run_stage(main, [str(file)]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["task"] == "classify"
