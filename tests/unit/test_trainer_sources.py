"""A pretraining run on a mixture: what its log says of each source, and what a resume refuses."""

import json

import pytest
import torch

from pairstream.recipe import load_recipe, validate
from pretrain.losses import info_nce
from pretrain.recipe import PretrainRecipe
from pretrain.source_losses import source_losses
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def mixed(tiny_shards) -> dict:
    """The tiny set's shards (15, 15 and 10 pictures) as two sources."""
    train = [
        {"shards": [str(tiny_shards / f"0000{n}.tar") for n in (0, 1)], "name": "many", "weight": 3},
        {"shards": str(tiny_shards / "00002.tar"), "name": "few", "weight": 1, "captions": "longest"},
    ]
    return {"train": train, "workers": 0}


def log_of(path) -> list[dict]:
    return [json.loads(line) for line in (path / "run/log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("keys", [{}, {"micro_batch": 3}, {"data": {"mix": "batches"}}])
def test_the_log_tells_of_each_source(tiny_recipe, mixed, tmp_path, keys):
    data = {**mixed, **keys.get("data", {})}
    Trainer(PretrainRecipe.model_validate(tiny_recipe(**{**keys, "data": data}))).train()
    log = log_of(tmp_path)
    assert [record["samples_seen"] for record in log] == [8, 16, 24, 32, 40, 48]
    for record in log:
        few, many = record["sources"]["few"], record["sources"]["many"]
        assert few["samples"] + many["samples"] == record["samples_seen"]
        assert few["epochs"] == few["samples"] / 10
        assert many["epochs"] == many["samples"] / 30
        rate = (few["samples_per_s"], many["samples_per_s"])
        assert sum(rate) == pytest.approx(record["samples_per_s"])
        if "data" in keys:
            (own,) = [source for source in (few, many) if source["loss"] is not None]
            assert own["loss"] == pytest.approx(record["loss"], rel=1e-5)
        else:
            assert record["loss"] == pytest.approx(0.75 * many["loss"] + 0.25 * few["loss"], rel=1e-5)
            assert rate[1] == pytest.approx(3 * rate[0])


def test_a_run_of_one_source_has_no_such_part(tiny_recipe, tmp_path):
    Trainer(PretrainRecipe.model_validate(tiny_recipe(steps=3))).train()
    assert all("sources" not in record for record in log_of(tmp_path))


def test_resuming_a_mixture_refuses_other_weights(tiny_recipe, mixed, fresh_accelerate):
    Trainer(PretrainRecipe.model_validate(tiny_recipe(data=mixed, steps=4))).train()
    fresh_accelerate()
    assert Trainer(PretrainRecipe.model_validate(tiny_recipe(data=mixed, steps=4)), resume=True).step == 4
    fresh_accelerate()
    mixed["train"][0]["weight"] = 2
    with pytest.raises(ValueError, match="state of another stream cannot be taken up: it has sources"):
        Trainer(PretrainRecipe.model_validate(tiny_recipe(data=mixed, steps=4)), resume=True)


def test_losses_of_sources_are_rows_of_info_nce():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(1300, 8), dim=1) for _ in range(2))
    sources, scale = torch.arange(1300) % 3, torch.tensor(5.0)
    found = source_losses(images, texts, scale, sources, 4)
    counts = sources.bincount(minlength=4)
    assert torch.isnan(found[3])
    mean = (found[:3] * counts[:3]).sum() / 1300
    assert float(mean) == pytest.approx(float(info_nce(images, texts, scale)), rel=1e-5)
    logits = (
        (5 * images.double() @ texts.double().T).softmax(1),
        (5 * texts.double() @ images.double().T).softmax(1),
    )
    rows = -(logits[0].diagonal().log() + logits[1].diagonal().log()) / 2
    assert float(found[1]) == pytest.approx(float(rows[sources == 1].mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "the shard list is empty"),
        (
            [{"shards": "a", "rewritten_key": "new"}],
            "rewritten captions need both rewritten_key and rewritten_share",
        ),
        ([{"shards": "a", "weihgt": 1}], "unknown key; did you mean 'weight'"),
        ([{"shards": "a", "weight": 0}], r"data.train.0.weight: Input should be greater than 0 \(got 0\)"),
        (["a", {"shards": "b"}], r"a.yaml: data.train.0: Input should be a valid dictionary .*got 'a'"),
        (7, r"a.yaml: data.train: Input should be a valid string \(got 7\)"),
    ],
)
def test_sources_that_a_recipe_cannot_have(train, words):
    with pytest.raises(ValueError, match=words):
        validate(
            PretrainRecipe,
            {"run": "r", "steps": 9, "schedule": {"warmup": 1}, "data": {"train": train}},
            "a.yaml",
        )


def test_a_recipe_with_sources_and_the_command_line(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(
        "run: r\nsteps: 9\nschedule: {warmup: 1}\ndata:\n  train:\n"
        "    - {shards: a, weight: 2}\n    - {shards: [b, c], weight: 1}\n"
    )
    recipe = load_recipe(PretrainRecipe, "pretrain", str(path), ["--optim.lr", "1e-4"])
    assert recipe.data.names == "a, ('b', 'c')"
    assert recipe.data.train[1].weight == 1
    other = load_recipe(PretrainRecipe, "pretrain", str(path), ["--data.train.0.weight", "5"])
    assert [source.weight for source in other.data.train] == [5, 1]
    path.write_text("run: r\nsteps: 9\nschedule: {warmup: 1}\ndata: {train: a}\n")
    for words, train in ((["b"], "b"), (["b", "c"], ("b", "c"))):
        plain = load_recipe(PretrainRecipe, "pretrain", str(path), ["--data.train", *words])
        assert plain.data.train == train
