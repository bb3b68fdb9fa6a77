"""Attention weights of a running model, with their gradients.

Fused attention keeps no weights. Every tower that we know (open_clip's, timm's, transformers' own, CLIP's ResNet with
its attention pooling) ends in one function of torch, `scaled_dot_product_attention`; while a recorder is at work, that
function is computed step by step instead, and the weights of those calls are kept that come from inside the watched
modules. No model is changed, and no other thread is recorded.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

Recording = list[Tensor]
_active: ContextVar[tuple[Recording, list[int]] | None] = ContextVar("recorded attention", default=None)
_lock = threading.Lock()
_users = 0
_fused: Any = None
_fast = True


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` step by step; the weights are kept when the call is one to be recorded."""
    state = _active.get()
    if state is None or not state[1][0]:
        return _fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)  # (b, heads, queries, keys)
    if (
        torch.is_grad_enabled() and not weights.requires_grad
    ):  # a frozen tower: the weights themselves are what gradients are wanted of
        weights.requires_grad_()
    state[0].append(weights)
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, train=True)
    return weights @ value


@contextmanager
def record_attention(*modules: nn.Module) -> Iterator[Recording]:
    """Keep the attention weights of all calls made inside the modules, in their order.

    Args:
        modules: Towers, or parts of them.

    Yields:
        A list that fills up: float `(b, heads, queries, keys)` of each call, part of the graph.

    Example:
        >>> tower = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> with record_attention(tower) as weights:
        ...     _ = tower(torch.zeros(1, 5, 8))
        >>> weights[0].shape
        torch.Size([1, 2, 5, 5])
    """
    global _users, _fused, _fast
    recording: Recording = []
    depth = [0]  # above zero while a watched module runs

    state = (recording, depth)

    def enter(*_: Any) -> None:
        depth[0] += _active.get() is state

    def leave(*_: Any) -> None:
        depth[0] -= _active.get() is state

    with ExitStack() as stack:
        for module in {part for whole in modules for part in whole.modules()}:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        with _lock:
            if not _users:
                _fused = nn.functional.scaled_dot_product_attention
                nn.functional.scaled_dot_product_attention = explicit_attention
                # nn.MultiheadAttention has a shortcut that passes the function by.
                _fast = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            _users += 1
        token = _active.set(state)
        try:
            yield recording
        finally:
            _active.reset(token)
            with _lock:
                _users -= 1
                if not _users:
                    nn.functional.scaled_dot_product_attention = _fused
                    torch.backends.mha.set_fastpath_enabled(_fast)
