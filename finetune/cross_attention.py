"""A connector that stands between the language model's layers and looks at the picture, instead of a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.connectors import Connector, Resampling
from finetune.recipe_model import CrossAttention, Resampler


class Block(nn.Module):
    """Cross-attention to a picture and two more layers, each added to what comes in, through a gate if wanted.

    Args:
        width: Of the language model.
        config: Heads, width of the second half, gates.
    """

    def __init__(self, width: int, config: CrossAttention):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        inner = config.feed_forward * width
        self.second = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
        )
        self.gates = nn.Parameter(torch.zeros(2)) if config.gated else None
        if not config.gated:  # an open branch starts small, or it would drown what the layers say
            with torch.no_grad():
                self.output.weight.mul_(0.1)
                self.second[-1].weight.mul_(0.1)  # pyright: ignore

    def remember(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pictures `(rows, k, width)`: each `(rows, heads, k, width / heads)`."""
        rows, count, width = seen.shape
        both = self.key_value(seen).view(rows, count, 2, self.heads, width // self.heads)
        key, value = both.permute(2, 0, 3, 1, 4)
        return key, value

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], allowed: Tensor | None) -> Tensor:
        """`(rows, q, width)` to the same.

        Args:
            x: What the language model's layer would get.
            memory: Of `remember`.
            allowed: bool `(rows, 1, q, k)`, which keys a position may look at; None for all. A position that may look
                at none sees nothing.
        """
        rows, length, width = x.shape
        gates = (1.0, 1.0) if self.gates is None else torch.tanh(self.gates)
        query = self.query(self.norm(x)).view(rows, length, self.heads, -1).transpose(1, 2)
        key, value = (part.to(query.dtype) for part in memory)
        if allowed is None:
            found = F.scaled_dot_product_attention(query, key, value)
        else:
            any_seen = allowed.any(dim=-1, keepdim=True)
            found = (
                F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~any_seen) * any_seen
            )
        x = x + gates[0] * self.output(found.transpose(1, 2).reshape(rows, length, width))
        return x + gates[1] * self.second(x)


class Looking(Connector):
    """Blocks in front of some of the language model's layers; in the sequence stands one learnt mark a picture.

    They are called by forward hooks of the layers, so every causal language model of transformers can have them, frozen
    or not, and its own cache stays right: a picture's keys and values do not depend on the text.

    Args:
        config: Where the blocks stand and what they are.
        grid: Rows and columns of the image tokens.
        token_dim: Width of an image token.
        width: Width of the language model.
        language_model: The language model.

    Raises:
        ValueError: `heads` does not divide the width, or there are fewer layers than `every`.

    Reference:
        Alayrac et al. 2022 (Flamingo: gated blocks, each text sees the picture in front of it), Li et al. 2022 (BLIP),
        Yu et al. 2022 (CoCa). The mark takes the place of Flamingo's `<image>` token.
    """

    length = 1

    def __init__(
        self,
        config: CrossAttention,
        *,
        grid: tuple[int, int],
        token_dim: int,
        width: int,
        language_model: Any,
    ):
        super().__init__()
        if width % config.heads:
            raise ValueError(
                f"connector.heads {config.heads} does not divide the language model's width {width}"
            )
        layers = list(decoder_layers(language_model))
        if config.every > len(layers):
            raise ValueError(
                f"connector.every {config.every}: the language model has {len(layers)} layers, so none would look at "
                "the picture"
            )
        self.tokens: nn.Module
        if config.queries:
            resampler = Resampler(queries=config.queries, width=width, heads=config.heads)
            self.tokens = Resampling(resampler, grid=grid, token_dim=token_dim, width=width)
        else:
            self.tokens = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, width))
        self.mark = nn.Parameter(torch.randn(1, width) * width**-0.5)
        places = range(config.every - 1, len(layers), config.every)
        self.blocks = nn.ModuleList(Block(width, config) for _ in places)
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.owner: Tensor | None = None
        self.handles = [
            layers[place].register_forward_pre_hook(Hook(self, number), with_kwargs=True)
            for number, place in enumerate(places)
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def forward(self, tokens: Tensor) -> Tensor:
        """Float `(b, n, token_dim)` to `(b, p, width)`."""
        return self.tokens(tokens)

    def prefix(self, seen: Tensor) -> Tensor:
        return self.mark.expand(len(seen), -1, -1)

    def look(self, seen: Tensor | None, owner: Tensor | None = None) -> None:
        self.memory = [] if seen is None else [block.remember(seen) for block in self.blocks]  # pyright: ignore
        self.owner = owner

    def add(self, number: int, x: Tensor) -> Tensor:
        """What a layer gets instead of `x` `(rows, q, width)`: the same, and what its block sees."""
        if not self.memory:
            return x
        beams = len(x) // len(self.memory[number][0])  # beam search writes several rows to one
        memory = self.memory[number]
        key, value = (part.repeat_interleave(beams, dim=0) if beams > 1 else part for part in memory)
        return self.blocks[number](x, (key, value), self.allowed(x.shape[1], key.shape[2], beams))

    def allowed(self, length: int, keys: int, beams: int) -> Tensor | None:
        """Which keys each of `length` positions may look at, bool `(rows, 1, length, keys)`; None for all."""
        if self.owner is None:
            return None
        owner = self.owner
        if length == 1:  # the cache holds what came before
            owner = owner[:, -1:]
        elif length > owner.shape[1]:  # no cache: the prompt and what has been written
            owner = F.pad(owner.unsqueeze(1).float(), (0, length - owner.shape[1]), "replicate")[:, 0].long()
        pictures = int(self.owner.max())
        of_key = torch.arange(keys, device=owner.device) // (keys // max(pictures, 1)) + 1
        mask = (owner[:, :, None] == of_key)[:, None]
        return mask.repeat_interleave(beams, dim=0) if beams > 1 else mask


class Hook:
    """Hands a layer's input to a block; an object, so that a copy of the model calls the copy's blocks."""

    def __init__(self, connector: Looking, number: int):
        self.connector, self.number = connector, number

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.connector.add(self.number, args[0]), *args[1:]), kwargs
        hidden = self.connector.add(self.number, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": hidden}


def decoder_layers(language_model: Any) -> Iterator[nn.Module]:
    """The layers of a causal language model of transformers', first to last.

    Raises:
        ValueError: They are not to be found.
    """
    count = language_model.config.get_text_config().num_hidden_layers
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return iter(module)
    raise ValueError(
        f"{type(language_model).__name__} has no list of {count} layers, so none can look at the picture: take the "
        "connector mlp, linear or resampler"
    )
