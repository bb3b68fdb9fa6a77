"""Phases of training on small or partly hidden pictures: the image tower's input size, and patch dropout."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import PatchDropout
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

Size = tuple[int, int]


def as_size(size: Any) -> Size:
    """Height and width of a size that may be one number for both, pixels."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def require_image_size(visual: Any, size: Size) -> None:
    """Refuse a picture size that an image tower cannot take.

    Args:
        visual: open_clip's image tower.
        size: Height and width, pixels.

    Raises:
        ValueError: Not a multiple of its patches or strides, or a tower of one fixed size.
    """
    grain = grain_of(visual, size)
    if any(side % step for side, step in zip(size, grain, strict=True)):
        raise ValueError(
            f"image_size {size}: this image tower takes multiples of {grain[0]} x {grain[1]} pixels"
        )


def grain_of(visual: Any, size: Size) -> Size:
    """The smallest difference between two picture sizes that an image tower can take, pixels."""
    if isinstance(visual, VisionTransformer):
        if not isinstance(visual.positional_embedding, nn.Parameter) or visual.attn_pool is not None:
            raise ValueError(f"image_size {size}: cannot change that of this kind of ViT")
        return as_size(visual.patch_size)
    if isinstance(visual, ModifiedResNet):
        return (32, 32)
    trunk: Any = getattr(visual, "trunk", None)
    if isinstance(visual, TimmModel) and (
        not hasattr(trunk, "set_input_size") or getattr(trunk, "dynamic_img_size", False)
    ):
        return (1, 1)  # convolutions take any size, and so does a ViT that resamples its positions itself
    if as_size(visual.image_size) == size:
        return (1, 1)
    name = type(trunk if isinstance(visual, TimmModel) else visual).__name__
    raise ValueError(
        f"image_size {size}: a {name} takes pictures of {as_size(visual.image_size)} pixels only; open_clip could not "
        "load it at another size. Take open_clip's own ViT (kind: vit) or ResNet, or a convolutional tower of timm's."
    )


@torch.no_grad()
def resize_image_tower(visual: Any, size: Size) -> None:
    """Let an image tower take pictures of another size; embeddings of positions are interpolated.

    Bicubic and antialiased, as open_clip does when it loads weights at another size, so that both ways give the same
    model. The class token's embedding stays.

    Args:
        visual: open_clip's image tower, changed in place; a ViT and CLIP's ResNet get a new parameter for positions.
        size: Height and width, pixels.

    Raises:
        ValueError: As `require_image_size` does.

    Reference:
        Li et al. 2023, An Inverse Scaling Law for CLIP Training (CLIPA): most of training on few tokens.
    """
    require_image_size(visual, size)
    before = as_size(visual.image_size)
    if before == size:
        return
    visual.image_size = size
    if isinstance(visual, VisionTransformer | ModifiedResNet):
        holder: Any = visual if isinstance(visual, VisionTransformer) else visual.attnpool
        grain = grain_of(visual, size)
        old, new = ((height // grain[0], width // grain[1]) for height, width in (before, size))
        positions: nn.Parameter = holder.positional_embedding
        holder.positional_embedding = nn.Parameter(
            resample(positions.detach(), old, new), requires_grad=positions.requires_grad
        )
        if isinstance(visual, VisionTransformer):
            visual.grid_size = new


def resample(positions: Tensor, old: Size, new: Size) -> Tensor:
    """Embeddings `(1 + old_h * old_w, d)` of a class token and a grid to those of another grid."""
    return resample_abs_pos_embed(
        positions[None], new_size=list(new), old_size=list(old), num_prefix_tokens=1
    )[0].contiguous()  # (1 + new_h * new_w, d)


def set_patch_dropout(visual: Any, share: float) -> None:
    """Let a ViT see a random part of each picture's patches in training; 0 shows it all.

    The tower's work falls with the tokens that are left. Which are left out is drawn on the model's device.

    Args:
        visual: open_clip's image tower.
        share: Of the patches that are left out, below 1.

    Raises:
        ValueError: A tower that has no patches to leave out.

    Reference:
        Li et al. 2022, Scaling Language-Image Pre-training via Masking (FLIP), with its unmasked tuning at the end.
    """
    holder, name, prefix = visual, "patch_dropout", 1
    if isinstance(visual, TimmModel):
        holder, name = visual.trunk, "patch_drop"
        prefix = getattr(holder, "num_prefix_tokens", 1)
    if not isinstance(getattr(holder, name, None), nn.Module):
        if share:
            raise ValueError(
                f"patch_dropout {share}: a {type(holder).__name__} has no patches to leave out; take a ViT"
            )
        return
    setattr(holder, name, PatchDropout(share, num_prefix_tokens=prefix) if share else nn.Identity())
