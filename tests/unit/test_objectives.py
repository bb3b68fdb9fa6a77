"""Each `loss` of a recipe, through the trainer."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import complete_checkpoints
from pretrain.encoder import build_encoder, load_encoder
from pretrain.global_contrast import SampleMeans, global_info_nce
from pretrain.losses import info_nce, sigmoid_loss, smoothing_term
from pretrain.objectives import PROBES, build_objective, text_ids
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_loss import (
    DistillationConfig,
    GlobalContrastConfig,
    HardNegativesConfig,
    InfoNCEConfig,
    MultiPositiveConfig,
    SigmoidConfig,
)
from pretrain.recipe_model import TowersModel
from pretrain.soft_targets import Teacher, distillation_loss, hard_negative_info_nce, multi_positive_info_nce
from pretrain.trainer import DualEncoder, Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def encoder(tiny_models):
    torch.manual_seed(0)
    return build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")


@pytest.fixture
def pairs(encoder):
    """Five pairs, two with the same caption."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, encoder.tokenize(["a cat", "a dog", "a cat", "two cats", "no cat"])


def test_each_kind_is_its_function(encoder, pairs, tmp_path, tiny_models):
    torch.manual_seed(1)
    teacher = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
    teacher.save(tmp_path / "teacher")
    features = tuple(value.detach() for value in DualEncoder(encoder)(*pairs))
    said = Teacher(
        teacher.encode_images(pairs[0]), teacher.encode_texts(pairs[1]), teacher.model.logit_scale.exp()
    )
    expected = {
        InfoNCEConfig(): info_nce(*features),
        InfoNCEConfig(tile=2, exchange="ring"): info_nce(*features),
        InfoNCEConfig(label_smoothing=0.2): info_nce(*features) + 0.2 * smoothing_term(*features),
        MultiPositiveConfig(): multi_positive_info_nce(*features, torch.tensor([0, 1, 0, 2, 3])),
        HardNegativesConfig(beta=0.4): hard_negative_info_nce(*features, beta=0.4),
        DistillationConfig(teachers=(str(tmp_path / "teacher"),), weight=0.3): 0.7 * info_nce(*features)
        + 0.3 * distillation_loss(*features, [said]),
    }
    for config, value in expected.items():
        objective = build_objective(config, encoder)
        torch.testing.assert_close(objective(features, *pairs), value, rtol=1e-6, atol=1e-7)
    assert encoder.model.logit_bias is None
    objective = build_objective(SigmoidConfig(init_scale=5.0, init_bias=-3.0), encoder)
    features = tuple(value.detach() for value in DualEncoder(encoder)(*pairs))
    assert [float(value) for value in features[2:]] == pytest.approx([5.0, -3.0])
    torch.testing.assert_close(objective(features, *pairs), sigmoid_loss(*features))
    # A bias that is there stays, and only the sigmoid loss trains it.
    build_objective(SigmoidConfig(), encoder)
    assert float(encoder.model.logit_bias.detach()) == -3.0
    build_objective(InfoNCEConfig(), encoder)
    assert not encoder.model.logit_bias.requires_grad


def test_equal_captions_have_equal_ids(encoder):
    ids = text_ids(encoder.tokenize(["a cat", "a dog", "a cat", "cat a", ""]))
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 4
    ids = text_ids(torch.arange(40000).reshape(10000, 4) % 97)
    assert len(ids.unique()) == 97


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "info_nce", "label_smoothing": 0.1, "tile": 3},
        {"kind": "sigmoid"},
        {"kind": "multi_positive"},
        {"kind": "multi_positive", "label_smoothing": 0.1, "captions": 2},
        {"kind": "hard_negatives"},
        {"kind": "global_contrast"},
        {"kind": "distillation"},
    ],
    ids=lambda loss: f"{loss['kind']}-{len(loss)}",
)
def test_each_kind_trains_and_in_parts_the_same(tiny_recipe, fresh_accelerate, tmp_path, encoder, loss):
    if loss["kind"] == "distillation":
        encoder.save(tmp_path / "teacher")
        loss = {**loss, "teachers": [str(tmp_path / "teacher")]}
    captions = loss.get("captions", 1)
    loss = {key: value for key, value in loss.items() if key != "captions"}
    ends, losses = [], []
    for micro_batch in (None, 3):
        fresh_accelerate()
        run = tmp_path / f"run-{micro_batch}"
        content = tiny_recipe(run=str(run), steps=3, loss=loss, micro_batch=micro_batch)
        content["data"]["captions_per_image"] = captions
        trainer = Trainer(PretrainRecipe.model_validate(content))
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        losses.append([json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()])
        for name, parameter in trainer.model.named_parameters():
            assert float(trainer.optimizer.state[parameter]["exp_avg_sq"].sum()) > 0, name
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    apart = sum(float((ends[0][name] - ends[1][name]).double().square().sum()) for name in ends[0]) ** 0.5
    assert apart < 2e-3  # three AdamW steps of 1e-3 move the weights by about 0.2
    assert ("logit_bias" in ends[0]) == (loss["kind"] == "sigmoid")


def test_the_global_estimator_remembers_samples_by_their_index(encoder, pairs):
    features = tuple(value.detach() for value in DualEncoder(encoder)(*pairs))
    ours, beside = SampleMeans(9), SampleMeans(9)
    objective = build_objective(GlobalContrastConfig(gamma=0.5), encoder, means=ours)
    for indices in (torch.tensor([4, 0, 8, 2, 3]), torch.tensor([3, 8, 1, 0, 2])):
        value = objective(features, *pairs, indices)
        images, texts, scale = features[:3]
        expected = global_info_nce(images, texts, scale, indices, beside, gamma=0.5)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        torch.testing.assert_close(ours.image, beside.image, rtol=0, atol=0, equal_nan=True)
    assert ours.image.isnan().tolist() == [False] * 5 + [True] * 3 + [False]
    tried = build_objective(GlobalContrastConfig(gamma=0.5), encoder)  # on noise: every sample is new
    images, texts, scale = features[:3]
    new = global_info_nce(images, texts, scale, torch.arange(5), SampleMeans(5), gamma=0.5)
    for _ in range(2):
        torch.testing.assert_close(tried(features, *pairs, torch.tensor([0, 0, 0, 0, 0])), new)


def test_a_resumed_run_has_the_averages_of_its_samples(tiny_recipe, tmp_path, fresh_accelerate):
    """Resumed in the middle of the second epoch; without the averages it would be another run."""
    content = tiny_recipe(
        steps=10, loss={"kind": "global_contrast", "gamma": 0.3}, checkpoint={"every": 4, "keep": 9}
    )
    ends, means = [], []
    for resume in (False, True):
        fresh_accelerate()
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        assert trainer.step == (8 if resume else 0)
        trainer.check_gradients()
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        newest = complete_checkpoints(tmp_path / "run/checkpoints")[0]
        means.append(load_file(newest / "training/terms.safetensors"))
        shutil.rmtree(newest)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert means[0].keys() == {"sample_means.image", "sample_means.text"}
    for name, values in means[0].items():
        assert len(values) == trainer.stream.samples
        assert not values.isnan().any()  # all samples have come
        assert torch.equal(values, means[1][name])
    path = complete_checkpoints(tmp_path / "run/checkpoints")[0] / "training/terms.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)
    fresh_accelerate()
    other = Trainer(PretrainRecipe.model_validate(content), resume=True)
    other.train()
    assert not all(torch.equal(ends[0][name], value) for name, value in other.model.state_dict().items())


def test_stock_open_clip_opens_a_model_with_a_bias(tiny_recipe, tmp_path, make_picture):
    recipe = tiny_recipe(steps=2, loss={"kind": "sigmoid"}, schedule={"warmup": 0})
    trainer = Trainer(PretrainRecipe.model_validate(recipe))
    trainer.train()
    assert float(trainer.model.logit_bias.detach()) != -10.0
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{trainer.model_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{trainer.model_folder}")
    encoder = load_encoder(trainer.model_folder)
    images = torch.stack([encoder.preprocess(make_picture(number, (32, 32))) for number in range(3)])
    texts = ["a red thing", "nothing", "a small blue thing"]
    with torch.no_grad():
        stock, _ = model.eval().get_logits(encoder.pixels(images), tokenizer(texts))  # pyright: ignore
        rows = encoder.encode_images(images) @ encoder.encode_texts(texts).T
        ours = encoder.model.logit_scale.exp() * rows + encoder.model.logit_bias
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-5)


def test_a_resumed_sigmoid_run_is_the_uninterrupted_one(tiny_recipe, tmp_path, fresh_accelerate):
    content = tiny_recipe(steps=4, loss={"kind": "sigmoid"})
    ends = []
    for resume in (False, True):
        fresh_accelerate()
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        shutil.rmtree(complete_checkpoints(tmp_path / "run/checkpoints")[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    fresh_accelerate()
    with pytest.raises(ValueError, match="cannot resume with another loss"):
        Trainer(PretrainRecipe.model_validate({**content, "loss": {"kind": "info_nce"}}), resume=True)


def test_batch_norm_in_parts_is_refused_unless_it_is_locked(tiny_recipe, tiny_models, fresh_accelerate):
    content = tiny_recipe(model=tiny_models["resnet"], micro_batch=4)
    with pytest.raises(ValueError, match=r"micro_batch: visual.bn1 is a BatchNorm2d"):
        Trainer(PretrainRecipe.model_validate(content))
    fresh_accelerate()
    late = [{"image_groups": 0}, {"step": 2, "image_groups": "all", "keep_statistics": False}]
    with pytest.raises(ValueError, match="micro_batch"):
        Trainer(PretrainRecipe.model_validate({**content, "phases": late}))
    fresh_accelerate()
    Trainer(PretrainRecipe.model_validate({**content, "phases": [{"image_groups": 0}, {"step": 2}]}))


def test_a_teacher_with_another_input_is_refused(encoder, tiny_models, tmp_path):
    small = {**tiny_models["vit"], "image_tower": {**tiny_models["vit"]["image_tower"], "image_size": 16}}
    short = {**tiny_models["vit"], "text_tower": {**tiny_models["vit"]["text_tower"], "context_length": 6}}
    for model, said in (
        (small, r"pictures of \(16, 16\) pixels"),
        (short, "another tokenizer or context length"),
    ):
        build_encoder(TowersModel.model_validate(model), device="cpu").save(tmp_path / "teacher")
        with pytest.raises(ValueError, match=said):
            build_objective(DistillationConfig(teachers=(str(tmp_path / "teacher"),)), encoder)
    assert len(encoder.tokenize(PROBES)) == 4


def test_the_gradient_check_of_one_process_says_so(tiny_recipe, capsys):
    from pretrain.cli import main

    trainer = Trainer(PretrainRecipe.model_validate(tiny_recipe(loss={"kind": "sigmoid"})))
    trainer.check_gradients()
    said = capsys.readouterr().err
    assert "gradients are those of one process" in said
    assert "logit_bias 1.000000, 1.000000" in said
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert main(["--help", "--check-gradients"]) == 0
    assert "--check-gradients first compares" in capsys.readouterr().out


def test_the_command_takes_the_flag(tiny_recipe, tmp_path, capsys):
    import yaml

    from pretrain.cli import main

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_recipe(steps=1, schedule={"warmup": 0})))
    assert main([str(tmp_path / "mine.yaml"), "--check-gradients"]) == 0
    assert "gradients are those of one process" in capsys.readouterr().err
    assert complete_checkpoints(tmp_path / "run/checkpoints")
