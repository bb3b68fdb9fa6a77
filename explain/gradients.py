"""Heatmaps from one forward and backward pass: Chefer's relevance, Grad-CAM, attention rollout; and integrated
gradients, which take dozens of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from explain.attention import record_attention
from explain.layout import Layout, tower_layout
from explain.relevance import chefer_relevance, rollout
from explain.targets import Target, mean_colour, score
from pairstream.errors import require
from pretrain.encoder import channels_first


def chefer(target: Target, pixels: Tensor, *, layers: int | None = None) -> Tensor:
    """Chefer's relevance of patches.

    Args:
        target: What to explain; its image tower is a ViT, or a ResNet with attention pooling.
        pixels: Normalised, `(b, 3, h, w)`.
        layers: Only so many of the last layers; `Layout.chefer_layers` when None.

    Returns:
        float `(b, rows, columns)`, not negative.

    Raises:
        ValueError: A tower without attention.
    """
    layout = need_attention(target, "chefer")
    weights, features, value = recorded(target, layout, pixels, gradients=True)
    *gradients, by_features = torch.autograd.grad(value.sum(), [*weights, features])
    count = layers or layout.chefer_layers
    start = read_out(target, layout, weights[-1], features, by_features)
    with torch.no_grad():
        row = chefer_relevance(weights[-count:], gradients[-count:], start)
    return patches(layout, row)


def attention_rollout(target: Target, pixels: Tensor) -> Tensor:
    """Attention rollout `(b, rows, columns)`: where the tower looks, whatever is asked for.

    Raises:
        ValueError: A tower without attention.
    """
    layout = need_attention(target, "rollout")
    with torch.no_grad():
        weights, features, _ = recorded(target, layout, pixels, gradients=False)
        return patches(layout, rollout(weights, read_out(target, layout, weights[-1], features, None)))


def need_attention(target: Target, method: str) -> Layout:
    """The layout of a tower that has attention between places of the picture."""
    layout = tower_layout(target.encoder)
    if layout.kind != "vit":
        raise ValueError(
            f"{method} needs an image tower whose tokens attend to each other; {target.encoder.name} has a "
            f"{type(layout.tower).__name__}: take gradcam, occlusion or integrated_gradients"
        )
    return layout


def recorded(
    target: Target, layout: Layout, pixels: Tensor, *, gradients: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Attention weights of the tower, its features, and the score."""
    with torch.set_grad_enabled(gradients), record_attention(layout.tower) as weights:
        features = target.see(pixels)
        if gradients and not features.requires_grad:
            features.requires_grad_()
        of = torch.arange(len(pixels), device=pixels.device)
        value = target.score_of(features, of)
    if not weights:
        raise ValueError(
            f"{target.encoder.name}: its image tower computes attention in a way that cannot be watched: "
            "take gradcam or occlusion"
        )
    return weights, features, value


def read_out(
    target: Target, layout: Layout, last: Tensor, features: Tensor, gradient: Tensor | None
) -> Tensor:
    """Where relevance starts: the weight of each of the last layer's queries, `(b, queries)`, summing to 1.

    The embedding is read from one token, from all patches alike, or by attention pooling (whose gradients know which
    queries count). A reader of tokens says itself how much each matters: gradient times activation, where positive.
    """
    start = last.new_zeros(len(last), last.shape[2])
    if target.reads == "tokens" and layout.pool != "attention":
        if gradient is None:
            weight = features.new_ones(features.shape[:2])
        else:
            weight = (features * gradient).sum(-1).clamp(min=0)
            weight = weight + 1e-12
        start[:, start.shape[1] - weight.shape[1] :] = weight / weight.sum(1, keepdim=True)
        return start.detach()
    if layout.pool == "attention":
        start[:] = 1 / start.shape[1]
    elif layout.pool == "avg":
        start[:, layout.prefix :] = 1 / (start.shape[1] - layout.prefix)
    else:
        start[:, 0] = 1
    return start


def patches(layout: Layout, row: Tensor) -> Tensor:
    """The patches of a row of tokens, as a map."""
    assert layout.grid is not None
    return row[:, layout.prefix :].detach().view(-1, *layout.grid)


def grad_cam(target: Target, pixels: Tensor, *, smooth: bool = True) -> Tensor:
    """Grad-CAM: channels of a layer, weighed by their mean gradient, where the sum is positive.

    On a ViT it is the norm in front of the last attention (`ln_1`): behind it a class token's score has no gradient
    by the patches, and the map would be zero. On a ResNet it is the product of the maps of the last three stages, each
    relative to its largest: the last knows best which object is meant, and its cells see everything; the earlier ones
    know where edges and colours are. There, a reader of tokens, to whom a channel means something else in each cell,
    has each cell weighed by its own gradients. Each stage's map is the mean over ten views of the picture (a little
    moved, and mirrored), at ten times the cost: a cell's gradient hangs on where exactly the grid lies.

    Args:
        target: What to explain.
        pixels: Normalised, `(b, 3, h, w)`.
        smooth: Whether a ResNet's map is the mean over views; else it is of the picture alone.

    Returns:
        float `(b, rows, columns)`, not negative; on a ResNet at most 1, in the cells of the earliest of its stages.

    Reference:
        Selvaraju et al. 2017, which takes the last stage alone; Draelos and Carin 2020 for weights by cell; Morbidelli
        et al. 2020 for views.
    """
    layout = tower_layout(target.encoder)
    if layout.grid is not None:
        ((layer, found),) = layer_gradients(target, layout, pixels)
        activation, gradient = layer[:, layout.prefix :], found[:, layout.prefix :]  # (b, n, d)
        weight = gradient.mean(1, keepdim=True)
        return (weight * activation).sum(-1).clamp(min=0).view(-1, *layout.grid)
    size, sums, cells = (pixels.shape[-2], pixels.shape[-1]), [], None
    for down, right, mirrored in views(size) if smooth else [(0, 0, False)]:
        moved = shift(pixels, down, right)
        moved = moved.flip(-1) if mirrored else moved
        stages = [
            weighted_channels(layer, found, by_cell=target.reads == "tokens")
            for layer, found in layer_gradients(target, layout, moved)
        ]
        cells = cells or (stages[0].shape[-2], stages[0].shape[-1])
        if smooth:
            stages = [resize_map(each.flip(-1) if mirrored else each, size) for each in stages]
            stages = [shift(each[:, None], -down, -right)[:, 0] for each in stages]
        sums = [one + other for one, other in zip(sums, stages, strict=True)] if sums else stages
    assert cells is not None
    return stages_product([resize_map(each, cells) for each in sums] if smooth else sums)


def layer_gradients(target: Target, layout: Layout, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The outputs of the layers that Grad-CAM weighs, and the score's gradients by them."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        kept.append(output)
        return output

    handles = [module.register_forward_hook(keep) for module in layout.grad_cam]
    try:
        with torch.enable_grad():
            value = score(target, pixels)
            gradients = torch.autograd.grad(value.sum(), kept, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    # Who looks at finer tokens does not look at the last stage.
    both = [pair for pair in zip(kept, gradients, strict=True) if pair[1] is not None]
    visual = target.encoder.model.visual
    return [(channels_first(visual, layer.detach()), channels_first(visual, found)) for layer, found in both]


def views(size: tuple[int, int]) -> list[tuple[int, int, bool]]:
    """How a picture is looked at: moved down and right by so many pixels, and mirrored or not."""
    down, right = (max(1, round(each / 24)) for each in size)
    moves = [(0, 0), *((y, x) for y in (-down, down) for x in (-right, right))]
    return [(y, x, mirrored) for y, x in moves for mirrored in (False, True)]


def shift(pixels: Tensor, down: int, right: int) -> Tensor:
    """Pictures `(b, c, h, w)` moved by whole pixels, their edge repeated where nothing is known."""
    if not (down or right):
        return pixels
    y, x = abs(down), abs(right)
    wide = F.pad(pixels, (x, x, y, y), mode="replicate")
    return wide[..., y - down : y - down + pixels.shape[-2], x - right : x - right + pixels.shape[-1]]


def weighted_channels(activation: Tensor, gradient: Tensor, *, by_cell: bool) -> Tensor:
    """Grad-CAM of one layer, weighed by the gradients' mean or cell by cell.

    `(b, c, rows, columns)` twice to `(b, rows, columns)`.
    """
    weight = gradient if by_cell else gradient.mean((2, 3), keepdim=True)
    return (weight * activation).sum(1).clamp(min=0)


def stages_product(maps: Sequence[Tensor]) -> Tensor:
    """The product of maps `(b, rows, columns)`, each relative to its largest, in the cells of the first.

    A map that is zero everywhere says nothing and is left out, so that it does not take the others with it.
    """
    size = (maps[0].shape[-2], maps[0].shape[-1])
    product = torch.ones_like(maps[0])
    largest = torch.stack([each.amax((1, 2)) for each in maps])  # (stages, b)
    for each, top in zip(maps, largest, strict=True):
        share = resize_map(each / top.clamp(min=1e-30)[:, None, None], size)
        product = product * torch.where(top[:, None, None] > 0, share, torch.ones_like(share))
    return product * (largest > 0).any(0)[:, None, None]


def integrated_gradients(target: Target, pixels: Tensor, *, steps: int = 32) -> Tensor:
    """Integrated gradients of the pixels, from the picture's mean colour to the picture.

    Args:
        target: What to explain.
        pixels: Normalised, `(b, 3, h, w)`.
        steps: Of the integral (Gauss-Legendre); the sum of a map is the difference of the two scores, up to its error.

    Returns:
        float `(b, h, w)`, signed.

    Raises:
        ImportError: The extra `explain` is not installed.

    Reference:
        Sundararajan et al. 2017; captum's implementation.
    """
    captum = require("captum.attr", "explain", "integrated gradients")
    number = torch.arange(len(pixels), device=pixels.device)
    method = captum.IntegratedGradients(lambda versions, of: score(target, versions, of))
    with torch.enable_grad():
        found = method.attribute(
            pixels,
            baselines=mean_colour(pixels).expand_as(pixels),
            additional_forward_args=(number,),
            n_steps=steps,
            internal_batch_size=max(len(pixels), 64),
        )
    return found.detach().sum(1).float()


def resize_map(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `(b, rows, columns)` to another size, smoothly when it is larger and by means when it is smaller."""
    if heat.shape[-2] > size[0]:
        return F.adaptive_avg_pool2d(heat[:, None], size)[:, 0]
    return F.interpolate(heat[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
