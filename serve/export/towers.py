"""Towers as ONNX graphs: normalisation of pixels and of rows inside, any batch size, optionally in int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from pairstream.errors import require
from pretrain.encoder import Encoder
from pretrain.towers import quiet

OPSET = 18


class ImageTower(nn.Module):
    """uint8 pixels `(b, 3, h, w)` to unit rows float32 `(b, dim)`."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.normalize, self.model = encoder.normalize, encoder.model

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(self.normalize(pixels)).float(), dim=-1)


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
    if not isinstance(encoder.model, CLIP):
        raise ValueError(
            f"{encoder.name}: the model is a {type(encoder.model).__name__}: only open_clip's own CLIP (a ViT or "
            "ResNet with its text transformer) is exported"
        )
    size = encoder.image_size
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    tokens = encoder.tokenize(["a", "two dogs on a beach"])
    for name, tower, example in (
        ("image", ImageTower(encoder), pixels),
        ("text", TextTower(encoder), tokens),
    ):
        with quiet(), plain_attention(), torch.no_grad():
            torch.onnx.export(
                tower.eval(),
                (example,),
                folder / f"{name}.onnx",
                input_names=[name],
                output_names=["rows"],
                dynamic_axes={name: {0: "batch"}, "rows": {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,  # the exporter on torch.export needs onnxscript and twice the time, for the same numbers
            )


def quantize(folder: Path, *, reduce_range: bool = False) -> dict[str, Any]:
    """Replace both graphs by dynamically quantised ones: int8 weights, activations measured as they come.

    Per channel and signed: unsigned weights (onnxruntime's default) miss the fast kernels. In the text tower the table
    of embeddings is quantised as well: it is a third of the file, and its rows are only looked up.

    Args:
        folder: Holds `image.onnx` and `text.onnx`.
        reduce_range: Seven bits: for CPUs without VNNI (AVX2), whose kernels may saturate on eight.

    Returns:
        For each tower, how many nodes of which kind were quantised, and how many convolutions stay float32.
    """
    require("onnxruntime", "export", "int8 towers")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    report = {}
    for name, kinds in (("image", ["MatMul", "Gemm"]), ("text", ["MatMul", "Gemm", "Gather"])):
        source, prepared = folder / f"{name}.onnx", folder / f"{name}.prepared.onnx"
        target = folder / f"{name}.int8.onnx"
        with quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_dynamic(
                str(prepared),
                str(target),
                op_types_to_quantize=kinds,
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
            )
        counts: dict[str, int] = {}
        for node in onnx.load(str(target), load_external_data=False).graph.node:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        report[name] = {
            "int8_products": counts.get("MatMulInteger", 0),
            "float_products": counts.get("MatMul", 0) + counts.get("Gemm", 0),
            "float_convolutions": counts.get("Conv", 0),
        }
        prepared.unlink()
        target.replace(source)
    return report


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
