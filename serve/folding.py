"""An image tower for answers alone: what training needs and an answer does not is folded away."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pretrain.encoder import Encoder


class JoinedBottleneck(Bottleneck):
    """A bottleneck whose last convolution and that of its shortcut are one, over the channels of both.

    Two convolutions of 1 x 1 that are added are one over their inputs side by side: the larger map is written once
    and not three times. `conv3` is the joined one and `downsample` the pool in front of the shortcut.
    """

    downsample: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Float `(b, c, h, w)` to `(b, c', h', w')`."""
        out = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.act3(self.conv3(torch.cat([self.avgpool(out), self.downsample(x)], dim=1)))


class OneQueryPool(AttentionPool2d):
    """The attention pool that computes the one query whose answer is read, in place of one for every cell."""

    def forward(self, x: Tensor) -> Tensor:
        """Float `(b, c, h, w)` to `(b, output_dim)`."""
        cells = x.flatten(2).transpose(1, 2)  # (b, h w, c)
        cells = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) + self.positional_embedding
        query, key, value = (
            project(tokens)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # (b, heads, n, width of a head)
            for project, tokens in ((self.q_proj, cells[:, :1]), (self.k_proj, cells), (self.v_proj, cells))
        )
        return self.c_proj(F.scaled_dot_product_attention(query, key, value).flatten(1))


def fold(encoder: Encoder) -> int:
    """Fold the batch norms of open_clip's ResNets into the convolutions before them, in place.

    Shortcuts' convolutions join those that they are added to, the attention pool asks one query, and average pools
    over one pixel go. The rows are the same up to rounding (1e-6), at three quarters of the time in batches of 32 on a
    CPU, where norms and sums are passes over memory of their own. Other towers stay as they are.
    `Encoder.fingerprint` is another afterwards: ask for it before.

    Args:
        encoder: A model that is only read from now on, in evaluation mode.

    Returns:
        How many norms were folded.
    """
    visual, folded = encoder.model.visual, 0
    if not isinstance(visual, ModifiedResNet):
        return 0
    for parent in list(visual.modules()):
        before: tuple[str, nn.Module] | None = None
        for name, part in list(parent.named_children()):  # in these towers, in the order in which they run
            if type(part) is nn.BatchNorm2d and before is not None and type(before[1]) is nn.Conv2d:
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], part))
                setattr(parent, name, nn.Identity())
                folded += 1
            elif isinstance(part, nn.AvgPool2d) and part.kernel_size == part.stride == 1:
                setattr(parent, name, nn.Identity())
            before = name, part
    for part in list(visual.modules()):
        if type(part) is AttentionPool2d:
            part.__class__ = OneQueryPool
        elif type(part) is Bottleneck and part.downsample is not None:
            join(part)
    visual.to(memory_format=encoder.layout)
    return folded


def join(block: Any) -> None:
    """Make a `Bottleneck` with a shortcut a `JoinedBottleneck`, in place; its norms have been folded."""
    pool, shortcut, _ = block.downsample
    joined = nn.Conv2d(block.conv3.in_channels + shortcut.in_channels, block.conv3.out_channels, 1)
    joined.weight = nn.Parameter(torch.cat([block.conv3.weight, shortcut.weight], dim=1), requires_grad=False)
    joined.bias = nn.Parameter(block.conv3.bias + shortcut.bias, requires_grad=False)
    block.conv3, block.downsample, block.__class__ = joined, pool, JoinedBottleneck
