"""Towers as ONNX graphs: normalisation of pixels and of rows inside, any batch size, optionally in int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairstream.errors import require
from pretrain.attention import is_plain
from pretrain.encoder import Encoder
from pretrain.short_texts import features_of, pooling, reads_at_the_end, text_tower
from pretrain.towers import quiet

OPSET = 18


class ImageTower(nn.Module):
    """uint8 pixels `(b, 3, h, w)` to unit rows float32 `(b, dim)`."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.normalize, self.visual = encoder.normalize, reparameterised(encoder.model.visual)

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.visual(self.normalize(pixels))
        rows = found[0] if isinstance(found, tuple) else found  # CoCa's gives its tokens as well
        return F.normalize(rows.float(), dim=-1)


class TextTower(nn.Module):
    """int64 tokens `(b, length)` to unit rows float32 `(b, dim)`.

    Attributes:
        short: Whether `length` may be anything up to the context, which a causal tower allows; else it is the context.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model = encoder.model
        self.short = reads_at_the_end(text_tower(encoder.model))

    def forward(self, tokens: Tensor) -> Tensor:
        features = (
            features_of(text_tower(self.model), tokens) if self.short else self.model.encode_text(tokens)
        )
        return F.normalize(features.float(), dim=-1)


def write_onnx(encoder: Encoder, folder: Path) -> None:
    """Write `image.onnx` and `text.onnx`, float32, each in one file.

    A causal text tower leaves the places behind the batch's longest text out, as the Encoder does.

    Args:
        encoder: The model; on the CPU.
        folder: Where to.

    Raises:
        ValueError: A tower that cannot be exported.
        ImportError: onnx is not installed.
    """
    require("onnx", "export", "`pairstream export`")
    size = encoder.image_size
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    tokens = encoder.tokenize(["a", "two dogs on a beach"])
    image, text = ImageTower(encoder), TextTower(encoder)
    for name, tower, example in (("image", image, pixels), ("text", text, tokens)):
        axes = {0: "batch", 1: "length"} if tower is text and text.short else {0: "batch"}
        try:
            with quiet(), plain_attention(), torch.no_grad():
                torch.onnx.export(
                    tower.eval(),
                    (example,),
                    folder / f"{name}.onnx",
                    input_names=[name],
                    output_names=["rows"],
                    dynamic_axes={name: axes, "rows": {0: "batch"}},
                    opset_version=OPSET,
                    dynamo=False,  # the one on torch.export needs onnxscript and twice the time, for the same numbers
                )
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"{encoder.name}: its {name} tower ({tower_name(encoder, name)}) cannot be exported: {reason}"
            ) from error
    if text.short:
        cut_padding(folder / "text.onnx", *pooling(text_tower(encoder.model)))


def cut_padding(path: Path, pool: str, eos: int | None) -> None:
    """Let a text tower's graph begin with cutting its tokens behind the batch's longest text.

    Done to the graph, since a trace would keep the number of places of its example.

    Args:
        path: A graph whose one input, int64 `(b, length)`, may have any length.
        pool: What ends a text: the largest token (`argmax`), or the first `eos`.
        eos: That token.
    """
    onnx = require("onnx", "export", "`pairstream export`")
    model = onnx.load(str(path))
    graph, make = model.graph, onnx.helper.make_node
    (tokens,) = graph.input
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == tokens.name:
                node.input[place] = "cut.tokens"
    numbers, ending, source = {"cut.zero": [0], "cut.one": [1]}, [], tokens.name
    if pool == "eos" and eos is not None:
        numbers["cut.end"], source = [eos], "cut.marks"
        ending = [
            make("Equal", [tokens.name, "cut.end"], ["cut.is_end"]),
            make("Cast", ["cut.is_end"], [source], to=onnx.TensorProto.INT32),
        ]
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in numbers.items()
    )
    nodes = [
        *ending,
        make("ArgMax", [source], ["cut.ends"], axis=1, keepdims=0),
        make("ReduceMax", ["cut.ends"], ["cut.last"], keepdims=1),  # int64 (1,)
        make("Add", ["cut.last", "cut.one"], ["cut.length"]),
        make("Slice", [tokens.name, "cut.zero", "cut.length", "cut.one"], ["cut.tokens"]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    tokens.type.tensor_type.shape.dim[1].dim_param = "length"
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def tower_name(encoder: Encoder, side: str) -> str:
    """What a tower is, for messages and cards."""
    config = encoder.model_cfg["vision_cfg" if side == "image" else "text_cfg"]
    tower = encoder.model.visual if side == "image" else getattr(encoder.model, "text", encoder.model)
    if side == "image" and config.get("timm_model_name"):
        return f"timm's {config['timm_model_name']}"
    inner = getattr(tower, "transformer", None)
    if side == "text" and config.get("hf_model_name"):
        return f"transformers' {type(inner).__name__}"
    return f"open_clip's {'text transformer' if side == 'text' else type(tower).__name__}"


def reparameterised(visual: nn.Module) -> nn.Module:
    """An image tower with its parallel branches made into one convolution each.

    Towers of MobileOne's and RepVGG's blocks (MobileCLIP's FastViT among them) train several branches that are one
    linear map together; left apart, the graph would compute each of them. The model itself keeps them.
    """
    if not any(hasattr(part, "reparameterize") or hasattr(part, "fuse") for part in visual.modules()):
        return visual
    from timm.utils.model import reparameterize_model

    return reparameterize_model(visual)


def to_openvino(folder: Path, names: Sequence[str] = ("image", "text")) -> None:
    """Replace graphs by OpenVINO's `.xml` and `.bin`, weights in float32."""
    openvino = require("openvino", "export", "`pairstream export --to openvino`")
    for name in names:
        source = folder / f"{name}.onnx"
        # Not convert_model, which reports its use to its makers over the network.
        openvino.save_model(
            openvino.Core().read_model(str(source)), str(folder / f"{name}.xml"), compress_to_fp16=False
        )
        source.unlink()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Take attention apart into operators that ONNX has, few of them, and for any number of tokens.

    torch's fused fast path for inference is none of them, and its other path leaves a dozen reshapes a layer that the
    length of the example is written into.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    theirs = nn.MultiheadAttention.forward

    def forward(
        self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Any:
        if query is key is value and not self.training and is_plain(self, options):
            return self_attention(self, query, options.get("attn_mask")), None
        return theirs(self, query, key, value, **options)

    torch.backends.mha.set_fastpath_enabled(False)
    nn.MultiheadAttention.forward = forward  # pyright: ignore
    try:
        yield
    finally:
        nn.MultiheadAttention.forward = theirs
        torch.backends.mha.set_fastpath_enabled(before)


def self_attention(layer: nn.MultiheadAttention, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `(b, n, width)` to itself, `mask` `(n, n)` added."""
    heads, width = layer.num_heads, layer.head_dim
    parts = F.linear(tokens, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3 * heads, width))
    query, key, value = parts.transpose(1, 2).chunk(3, dim=1)  # (b, heads, n, width) each
    scores = query * width**-0.5 @ key.transpose(2, 3)  # (b, heads, n, n)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return layer.out_proj((weights @ value).transpose(1, 2).flatten(2))
