"""What the methods must know of an image tower: its grid, its tokens in front, and the layers to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from pretrain.encoder import Encoder

STAGES = 3  # of a cnn, for Grad-CAM
MANY_TOKENS = 196  # patches of a B/16 at 224 pixels


@dataclass(frozen=True)
class Layout:
    """An image tower as the methods see it.

    Attributes:
        tower: The module.
        kind: `vit`: tokens that attend to each other; `cnn`: a feature map.
        grad_cam: The modules whose outputs Grad-CAM weighs, in the order of the forward pass: of a cnn the last stages.
        grid: Rows and columns of a ViT's patches; None for a cnn.
        prefix: A ViT's tokens in front of the patches.
        pool: What a ViT's embedding is read from: the first token, the mean of patches, or attention pooling.
        depth: A ViT's layers.
    """

    tower: nn.Module
    kind: Literal["vit", "cnn"]
    grad_cam: tuple[nn.Module, ...]
    grid: tuple[int, int] | None = None
    prefix: int = 0
    pool: Literal["tok", "avg", "attention"] = "tok"
    depth: int = 0

    @property
    def chefer_layers(self) -> int:
        """How many of the last layers Chefer's relevance takes.

        All, except for large towers (B/16 and larger), where the early layers spread relevance everywhere: there the
        last quarter.
        """
        assert self.grid is not None
        if self.grid[0] * self.grid[1] < MANY_TOKENS or self.depth < 12:
            return self.depth
        return max(1, self.depth // 4)


def tower_layout(encoder: Encoder) -> Layout:
    """The layout of an encoder's image tower.

    Raises:
        TypeError: A tower of an unknown kind.
    """
    visual: Any = encoder.model.visual
    if isinstance(visual, VisionTransformer):
        blocks = visual.transformer.resblocks
        pool: Any = "attention" if visual.attn_pool is not None else visual.pool_type
        return Layout(visual, "vit", (blocks[-1].ln_1,), tuple(visual.grid_size), 1, pool, len(blocks))  # pyright: ignore
    if isinstance(visual, ModifiedResNet):
        return Layout(visual, "cnn", (visual.layer2, visual.layer3, visual.layer4))
    trunk: Any = getattr(visual, "trunk", None)
    if isinstance(visual, TimmModel) and hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens"):
        pool = {"token": "tok", "map": "attention"}.get(trunk.global_pool, "avg")
        grid = tuple(trunk.patch_embed.grid_size)
        return Layout(
            visual, "vit", (trunk.blocks[-1].norm1,), grid, trunk.num_prefix_tokens, pool, len(trunk.blocks)
        )
    if isinstance(visual, TimmModel) and getattr(trunk, "feature_info", None):
        stages = [trunk.get_submodule(each["module"]) for each in list(trunk.feature_info)[-STAGES:]]
        return Layout(visual, "cnn", tuple(stages))
    raise TypeError(f"{encoder.name}: no explanation known for an image tower {type(visual).__name__}")
