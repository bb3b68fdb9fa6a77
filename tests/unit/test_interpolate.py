"""Models between two checkpoints."""

from __future__ import annotations

import open_clip
import pytest
import torch

from pairstream.cli import main as pairstream
from pretrain.encoder import Encoder, build_encoder, load_encoder
from pretrain.interpolate import interpolate
from pretrain.recipe_model import TowersModel


def make(model: dict, seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder = build_encoder(TowersModel.model_validate(model), device="cpu")
    for name, value in encoder.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(seed)
        if name.endswith("running_mean"):
            value.copy_(torch.randn_like(value))
    return encoder


def state(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.model.state_dict().items()}


def test_weights_and_statistics_lie_between_and_the_ends_are_the_models(tiny_models):
    model = tiny_models["resnet"]
    ends = [state(make(model, seed)) for seed in (1, 2)]
    for alpha in (0.0, 0.25, 0.5, 1.0):
        found = state(interpolate(make(model, 1), make(model, 2), alpha))
        for name, value in found.items():
            first, second = (end[name] for end in ends)
            if not value.is_floating_point():
                assert value == (2 if alpha > 0.5 else 1)
            elif alpha in (0.0, 1.0):
                assert torch.equal(value, ends[int(alpha)][name]), name
            else:
                expected = (1 - alpha) * first.double() + alpha * second.double()
                torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tower", ["transformer", "transformers"])
def test_the_command_writes_a_checkpoint_that_stock_open_clip_opens(
    tiny_models, tiny_bert, tmp_path, capsys, tower
):
    model = dict(tiny_models["vit"])
    if tower == "transformers":
        model["text_tower"] = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    encoders = [make(model, seed) for seed in (1, 2)]
    for name, encoder in zip("ab", encoders, strict=True):
        encoder.save(tmp_path / name)
    words = ["pretrain", "interpolate", str(tmp_path / "a"), str(tmp_path / "b"), "--alpha", "0.3"]
    assert pairstream([*words, "--out", str(tmp_path / "c")]) == 0
    between = load_encoder(tmp_path / "c", device="cpu")
    assert between.fingerprint == interpolate(encoders[0], encoders[1], 0.3).fingerprint
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'c'}")
    assert torch.equal(stock.visual.conv1.weight, between.model.visual.conv1.weight)  # pyright: ignore
    assert "0.7 x" in (tmp_path / "c/README.md").read_text()
    assert pairstream([*words, "--out", str(tmp_path / "c")]) == 2
    assert "c is not empty: give another --out, or --overwrite" in capsys.readouterr().err
    assert pairstream([*words, "--out", str(tmp_path / "c"), "--overwrite"]) == 0


def test_what_has_nothing_between_is_refused_with_what_differs(tiny_models, tiny_bert, tmp_path):
    vit = tiny_models["vit"]
    wide = {**vit, "image_tower": {**vit["image_tower"], "width": 32}}
    for other, said in (
        (wide, r"different architectures: model_cfg.vision_cfg.width: 16 and 32\. Take two"),
        (tiny_models["resnet"], r"model_cfg.vision_cfg.head_width: 8 and nothing; .* and \d more"),
        ({**vit, "embed_dim": 8}, "model_cfg.embed_dim: 16 and 8"),
    ):
        with pytest.raises(ValueError, match=said):
            interpolate(make(vit, 1), make(other, 2), 0.5)
    biased = make(vit, 2)
    biased.model.logit_bias = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"logit_bias: no such tensor and \(\)"):
        interpolate(make(vit, 1), biased, 0.5)
    bert = {**vit, "text_tower": {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}}
    foreign = make(bert, 2)
    foreign.tokenizer = lambda texts: torch.ones(len(texts), 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="their tokenizers give different tokens"):
        interpolate(make(bert, 1), foreign, 0.5)
    with pytest.raises(ValueError, match=r"alpha is the share of the second model, 0 to 1, got 1.5"):
        interpolate(make(vit, 1), make(vit, 2), 1.5)


def test_the_command_refuses_before_it_reads_weights(tmp_path, capsys):
    for words, said in (
        (["a", "b", "--alpha", "2"], "--alpha is the share of the second model"),
        (["ViT-B-32", "ViT-B-32"], "ViT-B-32 is a name of open_clip's: give --pretrained TAG"),
    ):
        assert pairstream(["pretrain", "interpolate", *words, "--out", str(tmp_path / "c")]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        pairstream(["pretrain", "interpolate", "--help"])
    assert stopped.value.code == 0
    assert "WiSE-FT" in capsys.readouterr().out
