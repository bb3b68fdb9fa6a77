"""Heatmaps: where they must be hot, what they add up to, what they refuse, and how they are drawn."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from explain import gradients
from explain.cli import main
from explain.gradients import (
    chefer,
    grad_cam,
    integrated_gradients,
    resize_map,
    shift,
    stages_product,
    views,
)
from explain.layout import Layout, tower_layout
from explain.methods import METHODS, default_method, explain_pair, heatmaps
from explain.perturb import leave_one_out, lime, occlusion, picture_players, shap_values, superpixels
from explain.picture import FOR, overlay, paint, save_picture, word_lines
from explain.targets import PairTarget, mean_colour, score
from pairstream.cli import run_stage

TEXT = "two red hearts"


class Patch:
    """A score that is the mean brightness of the lower right quarter."""

    reads = "pooled"

    def __init__(self, encoder):
        self.encoder = encoder

    def see(self, pixels):
        height, width = pixels.shape[-2:]
        return pixels[:, :, height // 2 :, width // 2 :].mean((1, 2, 3))

    def score_of(self, features, of):
        return features


def bright_corner(encoder) -> torch.Tensor:
    height, width = encoder.image_size
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    image[:, :, height // 2 :, width // 2 :] = 255
    return image


@pytest.mark.parametrize(
    ("kind", "method", "shape"),
    [
        ("vit", "chefer", (4, 4)),
        ("vit", "gradcam", (4, 4)),
        ("vit", "rollout", (4, 4)),
        ("vit_avg", "chefer", (4, 4)),
        ("timm_vit", "chefer", (10, 10)),
        ("timm_vit", "gradcam", (10, 10)),
        ("resnet", "gradcam", (8, 8)),
        ("timm_cnn", "gradcam", (8, 8)),
        ("channels_last", "gradcam", (8, 8)),
        ("resnet", "occlusion", (8, 8)),
        ("resnet", "integrated_gradients", (64, 64)),
    ],
)
def test_every_tower_gives_a_map_for_each_picture_alone(explained, pictures, kind, method, shape):
    encoder = explained[kind]
    images, rows = pictures(encoder), encoder.encode_texts([TEXT, "a dog"])
    both = heatmaps(PairTarget(encoder, rows), images, method)
    assert both.shape == (2, *shape)
    assert bool(torch.isfinite(both).all())
    assert float(both.abs().max()) > 0
    one = heatmaps(PairTarget(encoder, rows[1:]), images[1:], method)
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-3)
    if method in ("chefer", "gradcam", "rollout"):
        assert float(both.min()) >= 0


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients", "lime", "shap"])
def test_heat_lies_where_the_score_comes_from(explained, method):
    encoder = explained["vit"]
    images = bright_corner(encoder)
    heat = resize_map(heatmaps(Patch(encoder), images, method), encoder.image_size)[0]
    inside = heat[17:, 17:].mean()
    assert inside > 10 * heat[:15].abs().mean()
    assert inside > 10 * heat[:, :15].abs().mean()


def test_layers_of_chefer(explained, pictures):
    encoder = explained["vit"]
    target, pixels = PairTarget(encoder, encoder.encode_texts([TEXT])), encoder.pixels(pictures(encoder, 1))
    assert torch.equal(chefer(target, pixels), chefer(target, pixels, layers=3))
    assert not torch.equal(chefer(target, pixels), chefer(target, pixels, layers=1))
    module = torch.nn.Identity()
    sizes = {(7, 7): 12, (14, 14): 3, (16, 16): 3}  # B/32, B/16, L/14 with twelve layers
    for grid, expected in sizes.items():
        assert Layout(module, "vit", (module,), grid, 1, "tok", 12).chefer_layers == expected


def test_grad_cam_behind_the_last_attention_would_be_empty(explained, pictures):
    encoder = explained["vit"]
    layout = tower_layout(encoder)
    assert layout.grad_cam == (encoder.model.visual.transformer.resblocks[-1].ln_1,)
    kept = []
    block = encoder.model.visual.transformer.resblocks[-1]
    handle = block.ln_2.register_forward_hook(lambda m, i, output: kept.append(output))
    target = PairTarget(encoder, encoder.encode_texts([TEXT]))
    value = score(target, encoder.pixels(pictures(encoder, 1)))
    handle.remove()
    (gradient,) = torch.autograd.grad(value.sum(), kept)
    assert float(gradient[:, 1:].abs().max()) == 0


def test_frozen_towers_are_explained_too(explained, pictures):
    encoder = explained["vit"]
    images, target = pictures(encoder), PairTarget(encoder, encoder.encode_texts([TEXT, TEXT]))
    expected = {name: heatmaps(target, images, name) for name in METHODS}
    encoder.model.requires_grad_(False)
    try:
        for name, heat in expected.items():
            torch.testing.assert_close(heatmaps(target, images, name), heat, atol=1e-6, rtol=1e-4)
    finally:
        encoder.model.requires_grad_(True)


def test_integrated_gradients_and_shap_add_up(explained, pictures):
    encoder = explained["vit"]
    images = pictures(encoder, 1)
    pixels = encoder.pixels(images)
    target = PairTarget(encoder, encoder.encode_texts([TEXT]))
    with torch.no_grad():
        difference = float(score(target, pixels) - score(target, mean_colour(pixels).expand_as(pixels)))
    assert float(integrated_gradients(target, pixels, steps=128).sum()) == pytest.approx(difference, abs=5e-3)
    assert float(heatmaps(target, images, "shap").double().sum()) == pytest.approx(difference, abs=1e-4)


def test_lime_and_shap_of_a_linear_game_are_its_weights():
    weights = np.array([3.0, -1.0, 0.5, 0.0])
    players = lambda there: np.asarray(there) @ weights + 2  # noqa: E731
    np.testing.assert_allclose(shap_values(players, 4), weights, atol=1e-9)
    np.testing.assert_allclose(leave_one_out(players, 4), weights, atol=1e-9)
    found = lime(players, 4, samples=4000)
    assert np.abs(found - weights).max() < 0.05
    assert shap_values(lambda there: np.asarray(there)[:, 0] * 7, 1).tolist() == [7]


def test_occlusion_by_a_plain_loop(explained, pictures):
    encoder = explained["vit"]
    target, pixels = PairTarget(encoder, encoder.encode_texts([TEXT])), encoder.pixels(pictures(encoder, 1))
    total, count = np.zeros((8, 8)), np.zeros((8, 8))
    with torch.no_grad():
        whole = float(score(target, pixels))
        for r in range(7):
            for c in range(7):
                changed = pixels.clone()
                changed[:, :, 4 * r : 4 * r + 8, 4 * c : 4 * c + 8] = mean_colour(pixels)
                total[r : r + 2, c : c + 2] += whole - float(score(target, changed))
                count[r : r + 2, c : c + 2] += 1
    np.testing.assert_allclose(occlusion(target, pixels)[0].numpy(), total / count, atol=1e-5)


def test_superpixels_number_all_parts_and_absent_ones_are_painted(explained):
    encoder = explained["vit"]
    image = bright_corner(encoder)
    parts = superpixels(image[0], 10)
    assert parts.shape == encoder.image_size
    assert set(np.unique(parts)) == set(range(parts.max() + 1))
    players = picture_players(Patch(encoder), encoder.pixels(image), parts, 0)
    count = parts.max() + 1
    whole, none = players(np.array([np.ones(count), np.zeros(count)]))
    pixels = encoder.pixels(image)
    assert whole == pytest.approx(float(pixels[:, :, 16:, 16:].mean()), abs=1e-5)
    assert none == pytest.approx(float(pixels.mean()), abs=1e-5)


def test_what_cannot_be_explained_is_refused(explained, pictures):
    encoder, vit = explained["resnet"], explained["vit"]
    target = PairTarget(encoder, encoder.encode_texts([TEXT]))
    with pytest.raises(ValueError, match="chefer needs an image tower whose tokens attend"):
        heatmaps(target, pictures(encoder, 1), "chefer")
    with pytest.raises(ValueError, match=r"no method 'grad_cam'.*did you mean 'gradcam'"):
        heatmaps(target, pictures(encoder, 1), "grad_cam")
    with pytest.raises(ValueError, match="an empty text cannot be explained"):
        explain_pair(vit, pictures(vit, 1)[0], "  ")
    assert (default_method(encoder), default_method(vit)) == ("gradcam", "chefer")


def test_pictures_show_heat_and_words(explained, pictures, tmp_path):
    heat = np.zeros((4, 4))
    heat[0, 0] = 1
    plain = Image.new("RGB", (32, 32), (10, 10, 10))
    drawn = np.asarray(overlay(plain, heat, 64)).astype(int)
    assert drawn[4, 4].sum() > 2 * drawn[60, 60].sum()
    assert drawn[60, 60].max() - drawn[60, 60].min() <= 1  # grey where nothing matters
    assert np.asarray(overlay(plain, np.zeros((2, 2)), 64)).std() == 0
    lines = np.asarray(word_lines([("warm", 2.0), ("cold", -1.0)], 300))
    assert (lines == FOR).all(-1).any()
    assert word_lines([("word", 1.0)] * 40, 300).height > word_lines([("word", 1.0)], 300).height
    encoder = explained["vit"]
    found = explain_pair(encoder, pictures(encoder, 1)[0], TEXT)
    assert found.method == "chefer"
    assert paint([found] * 6, side=64).width > paint([found], side=64).width
    with pytest.raises(ValueError, match=r"give a name that ends in \.png"):
        save_picture([found], tmp_path / "map.jpg")


def test_the_command_writes_a_picture_and_numbers(explained, make_picture, tmp_path, capsys):
    folder = explained["vit"].save(tmp_path / "model")
    (tmp_path / "cat.jpg").write_bytes(make_picture(1))
    call = ["--model", str(folder), "--image", str(tmp_path / "cat.jpg"), "--device", "cpu"]
    out = ["--out", str(tmp_path / "cat.png")]
    assert main([*call, *out, "--text", TEXT, "--json", str(tmp_path / "cat.json")]) == 0
    assert Image.open(io.BytesIO((tmp_path / "cat.png").read_bytes())).format == "PNG"
    (found,) = json.loads((tmp_path / "cat.json").read_text())
    assert [word for word, _ in found["words"]] == TEXT.split()
    assert np.array(found["heat"]).shape == (4, 4)
    assert "hearts" in capsys.readouterr().out
    for words, expected in (
        ([*call, *out], "--model needs --text"),
        ([*call, *out, "--text", "a", "--vqa", "x"], "give one of --model, --captioner, --vqa, --classifier"),
        ([*call, *out, "--text", "a", "--question", "why?"], "--question goes with --vqa"),
        (["--vqa", "x", *call[2:], *out], "--vqa needs --question"),
    ):
        assert run_stage(main, words) == 2
        assert expected in capsys.readouterr().err


class Corners:
    """A reader of tokens: what is at the lower right speaks for the score, the same at the upper left against it."""

    reads = "tokens"

    def __init__(self, encoder):
        self.encoder = encoder

    def see(self, pixels):
        return self.encoder.tokens_of(pixels)

    def score_of(self, features, of):
        return features[:, -1].sum(-1) - features[:, 0].sum(-1)


def test_a_reader_of_tokens_weighs_each_cell_by_its_own_gradients(explained):
    encoder = explained["resnet"]
    images = torch.randint(0, 256, (2, 3, *encoder.image_size), dtype=torch.uint8)
    found = grad_cam(Corners(encoder), encoder.pixels(images), smooth=False)
    assert found[:, -1, -1].min() > 0
    assert not found[:, 0, 0].any()


def test_pictures_are_moved_with_their_edge_repeated():
    picture = torch.arange(12.0).view(1, 1, 3, 4)
    assert torch.equal(shift(picture, 1, 0)[0, 0], picture[0, 0, [0, 0, 1]])
    assert torch.equal(shift(picture, 0, -1)[0, 0], picture[0, 0][:, [1, 2, 3, 3]])
    assert torch.equal(shift(shift(picture, 1, 1), -1, -1)[..., :2, :3], picture[..., :2, :3])
    assert shift(picture, 0, 0) is picture
    found = views((96, 48))
    assert len(set(found)) == 10
    assert {abs(y) for y, _, _ in found} == {0, 4}
    assert {abs(x) for _, x, _ in found} == {0, 2}


def test_grad_cam_of_a_mirrored_picture_is_its_map_mirrored(explained, pictures):
    """As many views are mirrored as not, and each map is put back where it belongs."""
    encoder = explained["resnet"]
    target, pixels = PairTarget(encoder, encoder.encode_texts([TEXT])), encoder.pixels(pictures(encoder, 1))
    found = grad_cam(target, pixels)
    assert found.shape == (1, 8, 8)
    assert found.max() == pytest.approx(1, abs=0.5)
    torch.testing.assert_close(grad_cam(target, pixels.flip(-1)).flip(-1), found, rtol=0, atol=1e-4)
    single = grad_cam(target, pixels, smooth=False)
    assert not torch.allclose(grad_cam(target, pixels.flip(-1), smooth=False).flip(-1), single, atol=1e-2)


def test_stages_are_multiplied_and_a_silent_one_is_left_out():
    fine = torch.tensor([[[4.0, 2.0, 0.0, 2.0]] * 2, [[1.0, 0.0, 0.0, 0.0]] * 2])  # (2, 2, 4)
    coarse = torch.tensor([[[3.0, 6.0]], [[0.0, 0.0]]])  # (2, 1, 2): nothing for the second picture
    found = stages_product([fine, coarse])
    share = torch.tensor([0.5, 0.625, 0.875, 1.0])  # 3 and 6 relative to 6, stretched over four cells
    assert torch.allclose(found[0], torch.tensor([1.0, 0.5, 0.0, 0.5]) * share)
    assert torch.equal(found[1], fine[1])
    assert not stages_product([torch.zeros(1, 2, 2), torch.zeros(1, 1, 1)]).any()


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.filterwarnings("ignore")  # the other library's own
def test_grad_cam_is_that_of_the_grad_cam_package(explained, pictures, kind, monkeypatch):
    package = pytest.importorskip("pytorch_grad_cam")
    encoder = explained[kind]
    layout = tower_layout(encoder)
    layout = replace(layout, grad_cam=layout.grad_cam[-1:])  # the package takes means where there are several
    monkeypatch.setattr(gradients, "tower_layout", lambda encoder: layout)
    target, pixels = PairTarget(encoder, encoder.encode_texts([TEXT])), encoder.pixels(pictures(encoder, 1))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder.model

        def forward(self, x):
            return self.inner.encode_image(x)

    reshape = None
    if layout.grid is not None:
        reshape = lambda x: x[:, 1:].reshape(len(x), *layout.grid, -1).permute(0, 3, 1, 2)  # noqa: E731
    with package.GradCAM(Model(), list(layout.grad_cam), reshape_transform=reshape) as cam:
        theirs = cam(pixels, [lambda row: torch.nn.functional.normalize(row, dim=-1) @ target.rows[0]])
    ours = grad_cam(target, pixels, smooth=False)[0].numpy()
    scaled = (ours - ours.min()) / (
        1e-7 + ours.max() - ours.min()
    )  # as the package shows maps: stretched, enlarged
    expected = np.asarray(Image.fromarray(scaled).resize(theirs.shape[1:][::-1], Image.Resampling.BILINEAR))
    assert np.corrcoef(expected.ravel(), theirs[0].ravel())[0, 1] > 0.99
