"""Towers as ONNX graphs: normalisation of pixels and of rows inside, any batch size, optionally in int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairstream.errors import require
from pretrain.encoder import Encoder
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
    """int64 tokens `(b, context_length)` to unit rows float32 `(b, dim)`."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model = encoder.model

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def write_onnx(encoder: Encoder, folder: Path) -> None:
    """Write `image.onnx` and `text.onnx`, float32, each in one file.

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
    for name, tower, example in (
        ("image", ImageTower(encoder), pixels),
        ("text", TextTower(encoder), tokens),
    ):
        try:
            with quiet(), plain_attention(), torch.no_grad():
                torch.onnx.export(
                    tower.eval(),
                    (example,),
                    folder / f"{name}.onnx",
                    input_names=[name],
                    output_names=["rows"],
                    dynamic_axes={name: {0: "batch"}, "rows": {0: "batch"}},
                    opset_version=OPSET,
                    dynamo=False,  # the one on torch.export needs onnxscript and twice the time, for the same numbers
                )
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"{encoder.name}: its {name} tower ({tower_name(encoder, name)}) cannot be exported: {reason}"
            ) from error


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
    """Take attention apart into operators that ONNX has: torch's fused fast path for inference is none of them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
