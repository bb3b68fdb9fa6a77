"""A recipe's `terms`, through the network, GradCache and the trainer."""

from __future__ import annotations

import copy
import json
import shutil
import types
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import CoCaLoss
from safetensors.torch import load_file

from data.stream import pair_stream
from data.transforms import TrainTransform
from pretrain.checkpoint import complete_checkpoints
from pretrain.compiled import compile_network, sizes_vary
from pretrain.encoder import build_encoder, load_encoder
from pretrain.gradcache import cached_backward
from pretrain.inputs import input_names, open_stream, random_inputs
from pretrain.losses import info_nce
from pretrain.network import DualEncoder
from pretrain.objectives import build_objective
from pretrain.plan import describe, make_plan, read_fleet
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.resume import require_same_run
from pretrain.terms import Term, build_terms
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SMALL = {"hidden": 24, "embed_dim": 8}
ALL = {"alignment": {"weight": 0.3}, "self_supervision": SMALL, "captioning": {}}


def parts_of(recipe, dtype=torch.float64):
    """Network, objective, terms and eleven rows of noise."""
    torch.manual_seed(0)
    encoder = build_encoder(recipe.model, device="cpu")
    terms = build_terms(recipe.terms, encoder)
    objective = build_objective(recipe.loss, encoder, terms)
    inputs = random_inputs(recipe, encoder, 11, torch.Generator().manual_seed(0), "noise")
    network = DualEncoder(encoder, terms).to(dtype)
    return network, objective, terms, inputs


def gradients_of(network):
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


def test_a_term_that_leaves_part_of_the_contract_out_cannot_be_made():
    class Half(Term):
        def forward(self, seen):
            return (seen.image_features.sum(1),)

    with pytest.raises(TypeError, match=r"abstract class Half .* methods '?loss'?, '?record"):
        Half()  # pyright: ignore[reportAbstractUsage]


@pytest.fixture
def recipe_of(tiny_recipe, tiny_models):
    """`recipe_of(terms, model="coca", **keys)`"""

    def make(terms, model="coca", **keys):
        return PretrainRecipe.model_validate(tiny_recipe(model=tiny_models[model], terms=terms, **keys))

    return make


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize(
    "terms", [{name: ALL[name]} for name in ALL] + [ALL], ids=lambda terms: "-".join(terms)
)
def test_parts_of_a_batch_have_its_gradient(recipe_of, terms, captions):
    """In float64, to rounding; each term's own gradient is a part of it."""
    loss = {"kind": "sigmoid"} if captions == 1 else {"kind": "multi_positive"}
    network, objective, found, inputs = parts_of(recipe_of(terms, loss=loss))
    if captions == 2:
        inputs = inputs[0], torch.stack([inputs[1], inputs[1].flip(0)], 1), *inputs[2:]
    value = objective(network(*inputs), *inputs)
    value.backward()
    whole = gradients_of(network)
    network.zero_grad()
    again = cached_backward(network, inputs, lambda features: objective(features, *inputs), micro_batch=4)
    torch.testing.assert_close(again, value.detach(), rtol=1e-12, atol=0)
    cached = gradients_of(network)
    assert whole.keys() == cached.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(cached[name], expected, rtol=1e-6, atol=1e-9, msg=name)
    own = [name for name in whole if name.startswith("terms.") or "text_decoder" in name]
    assert own
    assert all(float(whole[name].norm()) > 0 for name in own if not name.endswith("in_proj_bias"))
    told = {"alignment": 3, "self_supervision": 1, "captioning": 1}
    assert len(found.record()) == sum(told[name] for name in terms)
    assert found.record() == {}


@pytest.mark.slow
def test_compiled_parts_have_the_eager_gradient(recipe_of):
    """All terms at once; the kernels of the first number of rows serve the others."""
    network, objective, _, inputs = parts_of(recipe_of(ALL), torch.float32)
    names = list(network.state_dict())

    def gradients(rows):
        network.zero_grad()
        some = tuple(column[:rows] for column in inputs)
        sizes_vary(*some)
        objective(network(*some), *some).backward()
        return gradients_of(network)

    eager: dict[Any, dict[str, torch.Tensor]] = {rows: gradients(rows) for rows in (11, 6)}
    compile_network(network, torch.device("cpu"))
    assert list(network.state_dict()) == names
    found: dict[Any, dict[str, torch.Tensor]] = {rows: gradients(rows) for rows in eager}
    frames = torch._dynamo.utils.counters["frames"]["ok"]

    def counted(*part):
        sizes_vary(*part)
        return network(*part)

    network.zero_grad()
    cached_backward(
        counted, inputs, lambda features: objective(features, *inputs), micro_batch=4, compiled=True
    )
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames > 0
    found["in parts"], eager["in parts"] = gradients_of(network), eager[11]
    for way, expected in eager.items():
        assert found[way].keys() == expected.keys()
        for name, value in expected.items():
            apart = float((found[way][name] - value).norm())
            assert apart <= 1e-4 * float(value.norm()) + 1e-6, (way, name)


def test_the_critic_learns_and_the_towers_unlearn(recipe_of):
    """The towers' gradient is InfoNCE's minus weight times the critic's; the critic has all of its own."""
    found = {}
    for weight in (0.0, 0.5, 1.0):
        network, objective, _, inputs = parts_of(recipe_of({"alignment": {"weight": weight}}, model="vit"))
        objective(network(*inputs), *inputs).backward()
        found[weight] = gradients_of(network)
    network, _, _, inputs = parts_of(recipe_of(None, model="vit"))
    info_nce(*network(*inputs)).backward()
    plain = gradients_of(network)
    for name, value in plain.items():
        torch.testing.assert_close(found[0.0][name], value, rtol=1e-9, atol=1e-12)
        half, one = (found[weight][name] - value for weight in (0.5, 1.0))
        torch.testing.assert_close(half * 2, one, rtol=1e-6, atol=1e-9)
    # Down the contrast's gradient and up the critic's loss: a step along the difference makes the critic worse.
    network, objective, terms, inputs = parts_of(recipe_of({"alignment": {"weight": 1.0}}, model="vit"))
    before = objective(network(*inputs), *inputs) - info_nce(*network(*inputs)[:3])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in plain:
                parameter -= 1e-3 * (found[1.0][name] - plain[name])
    after = objective(network(*inputs), *inputs) - info_nce(*network(*inputs)[:3])
    assert float(after.detach()) > float(before.detach())
    own = [name for name in found[1.0] if name.startswith("terms.")]
    assert len(own) == 4
    for name in own:
        assert torch.equal(found[0.0][name], found[1.0][name])
    told = terms.record()
    features = [side.detach().mean(0) for side in network(*inputs)[:2]]
    assert told["modality_gap"] == pytest.approx(float((features[0] - features[1]).norm()), rel=1e-6)
    assert 0 <= told["critic_accuracy"] <= 1


@pytest.mark.parity
def test_captioning_is_open_clips_coca_loss(recipe_of):
    network, objective, _, inputs = parts_of(recipe_of({"captioning": {"weight": 1.7}}), torch.float32)
    value = objective(network(*inputs), *inputs)
    value.backward()
    ours = gradients_of(network)
    network.zero_grad()
    model = network.model
    theirs = CoCaLoss(caption_loss_weight=1.7, clip_loss_weight=1.0)
    out = model(network.normalize(inputs[0]), inputs[1])
    contrast, caption = theirs(**out)
    expected = contrast + caption
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients_of(network).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parity
def test_stock_open_clip_opens_a_trained_coca_and_nothing_else_is_in_it(recipe_of, tmp_path, make_picture):
    trainer = Trainer(recipe_of(ALL, steps=2, schedule={"warmup": 0}))
    trainer.train()
    place = f"local-dir:{trainer.model_folder}"
    model, _, _ = open_clip.create_model_and_transforms(place)
    assert type(model).__name__ == "CoCa"
    saved = load_file(trainer.model_folder / "open_clip_model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert not any("critic" in name or "mlp.6" in name for name in saved)
    encoder = load_encoder(trainer.model_folder)
    images = torch.stack([encoder.preprocess(make_picture(number, (32, 32))) for number in range(3)])
    tokens = open_clip.get_tokenizer(place)(["a red thing", "nothing", "a small blue thing"])
    with torch.no_grad():
        stock = model.eval()(encoder.pixels(images), tokens)
        ours = encoder.model(encoder.pixels(images), tokens)
    for name in ("image_features", "text_features", "logits", "logit_scale"):
        torch.testing.assert_close(stock[name], ours[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), stock["image_features"], rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.encode_texts(tokens), stock["text_features"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ema", [None, {"decay": 0.9}])
def test_a_resumed_run_is_the_uninterrupted_one(recipe_of, fresh_accelerate, tmp_path, ema):
    """The critic, the projection and their moments too; bit for bit."""
    recipe = recipe_of(ALL, steps=4, ema=ema)
    ends = []
    for resume in (False, True):
        fresh_accelerate()
        trainer = Trainer(recipe, resume=resume)
        trainer.train()
        state = {**trainer.model.state_dict(), **trainer.terms.state_dict(prefix="terms.")}
        ends.append({name: value.clone() for name, value in state.items()})
        checkpoints = complete_checkpoints(tmp_path / "run/checkpoints")
        shutil.rmtree(checkpoints[0])
    assert "terms.alignment.critic.0.weight" in ends[0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    told = {"modality_gap", "critic_accuracy", "critic_loss", "self_supervision_loss", "caption_loss"}
    assert all(told <= line.keys() for line in lines)
    assert {"grad_norm_terms", "grad_norm_decoder"} <= lines[-1].keys()
    (checkpoints[1] / "training/terms.safetensors").unlink()
    fresh_accelerate()
    with pytest.raises(ValueError, match="state of the loss's terms cannot be read"):
        Trainer(recipe, resume=True)


def test_every_parameter_trains_with_each_loss_and_a_decoder_without_captioning_is_locked(
    recipe_of, fresh_accelerate, tmp_path
):
    for number, terms in enumerate(({"self_supervision": SMALL}, {"alignment": {}})):
        fresh_accelerate()
        trainer = Trainer(recipe_of(terms, steps=2, schedule={"warmup": 0}, run=str(tmp_path / str(number))))
        before = {name: value.clone() for name, value in trainer.model.text_decoder.state_dict().items()}
        trainer.check_gradients()
        trainer.train()
        for parameter in trainer.terms.parameters():
            assert float(trainer.optimizer.state[parameter]["exp_avg_sq"].sum()) > 0
        after = trainer.model.text_decoder.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_from_before_a_key_was_there_is_of_the_same_run(recipe_of):
    found = copy.deepcopy(recipe_of(None, "vit").model_dump(mode="json"))
    now = {**copy.deepcopy(found), "samples": 40}
    del found["terms"], found["model"]["decoder"]
    state = types.SimpleNamespace(folder="step-2", state={"identity": {**found, "samples": 40}})
    require_same_run(state, now)  # pyright: ignore
    now["terms"] = recipe_of(ALL).model_dump(mode="json")["terms"]
    with pytest.raises(ValueError, match="cannot resume with another terms"):
        require_same_run(state, now)  # pyright: ignore


def test_a_coca_model_from_scratch_begins_with_random_numbers(tiny_models):
    """open_clip leaves the decoder's projection as memory has it."""
    torch.manual_seed(0)
    one = build_encoder(TowersModel.model_validate(tiny_models["coca"]), device="cpu").model.text_decoder
    torch.manual_seed(0)
    two = build_encoder(TowersModel.model_validate(tiny_models["coca"]), device="cpu").model.text_decoder
    assert torch.equal(one.text_projection, two.text_projection)
    assert float(one.text_projection.detach().std()) == pytest.approx(16**-0.5, rel=0.02)


def test_views_change_nothing_else_and_depend_on_no_process(tiny_shards):
    views = TrainTransform((32, 32), scale=(0.08, 1.0), hflip=0.5, color_jitter=0.4, grayscale=0.2)
    options = {
        "transform": TrainTransform((32, 32), hflip=0.5),
        "tokenize": lambda texts: torch.tensor([[len(text)] * 3 for text in texts]),
        "shuffle": True,
    }
    plain = next(pair_stream(str(tiny_shards), batch_size=8, **options).iterate(3))
    whole = next(pair_stream(str(tiny_shards), batch_size=8, views=views, **options).iterate(3))
    assert torch.equal(plain["images"], whole["images"])
    assert torch.equal(plain["tokens"], whole["tokens"])
    assert whole["views"].shape == (8, 2, 3, 32, 32)
    assert not torch.equal(*whole["views"].unbind(1))
    halves = [
        next(
            pair_stream(str(tiny_shards), batch_size=4, views=views, rank=r, world_size=2, **options).iterate(
                3
            )
        )
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat([half["views"] for half in halves]), whole["views"])


def test_phases_change_the_size_of_views_too(recipe_of):
    recipe = recipe_of({"self_supervision": SMALL}, "vit", phases=[{"image_size": 16}, {"step": 2}], steps=3)
    assert input_names(recipe) == ("images", "tokens", "views")
    trainer = Trainer(recipe)
    sizes, step = [], trainer.train_step

    def noted(batch, *rest):
        sizes.append(batch["views"].shape[-1])
        return step(batch, *rest)

    trainer.train_step = noted  # pyright: ignore
    trainer.train()
    assert sizes == [16, 16, 32]
    assert len(open_stream(recipe, trainer.encoder, 0, 1).collate([])["views"]) == 0  # pyright: ignore


def test_the_plan_counts_terms(recipe_of):
    plain, more = (make_plan(recipe_of(terms)) for terms in (None, ALL))
    own = (16 * 256 + 256 + 257) + (16 * 24 + 24 * 24 + 24 * 8 + 2 * 24 + 8 + 4 * 24)
    assert more.towers["terms"] == own
    assert more.parameters == plain.parameters + own
    assert more.towers["decoder"] == plain.towers["decoder"] > 0
    decoder = more.towers["decoder"]
    assert more.phases[0].trainable == plain.phases[0].trainable + own + decoder
    assert more.image_bytes == 3 * plain.image_bytes
    assert more.step_flops > 2 * plain.step_flops
    assert more.loss_flops == plain.loss_flops + 24 * 8 * 8
    assert f"terms {own / 1e6:.1f} M" in describe(more, [read_fleet("8xh100")], 0.2)
    assert "terms" not in plain.towers


def test_what_cannot_be_is_refused(recipe_of, tiny_recipe, tiny_models):
    with pytest.raises(ValueError, match=r"terms.captioning: CLIP has no decoder: take a CoCa model"):
        Trainer(recipe_of({"captioning": {}}, model="vit"))
    data = {**tiny_recipe()["data"], "scaled_decode": True}
    with pytest.raises(ValueError, match=r"terms.self_supervision takes views of the whole picture"):
        recipe_of({"self_supervision": {}}, model="vit", data=data)
    coca = tiny_models["coca"]
    for change, said in (
        ({"image_tower": tiny_models["resnet"]["image_tower"]}, "kinds vit and transformer, got resnet"),
        ({"embed_dim": 32}, "expected embed_dim to be the text tower's width 16, got 32"),
        ({"decoder": {"heads": 3}}, "not a multiple of the decoder's 3 heads"),
    ):
        with pytest.raises(ValueError, match=said):
            TowersModel.model_validate({**coca, **change})
