"""`pairstream export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from pairstream.errors import require


def export(
    *,
    model: str,
    out: Path,
    to: Literal["onnx", "openvino"] = "onnx",
    int8: bool = False,
    reduce_range: bool = False,
    data: tuple[str, ...] = (),
    limit: int = 1000,
    pretrained: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write both towers for machines without torch, after comparing them with the model.

    Args:
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        out: The folder to write.
        to: The runtime.
        int8: Weights in int8: smaller, and faster where the CPU has VNNI.
        reduce_range: Seven bits instead of eight, for CPUs without VNNI.
        data: Shards on which int8 must keep recall@1 and first results; without them cosines decide.
        limit: Only the first so many samples of them.
        pretrained: open_clip's tag of weights, for a name.
        overwrite: Replace an export that lies in --out.
    """
    from serve.export.runtime import CARD

    require({"onnx": "onnxruntime", "openvino": "openvino"}[to], "export", "`pairstream export`")
    require("onnx", "export", "`pairstream export`")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / CARD).is_file():
            raise FileExistsError(f"{out} exists and holds no export: choose another --out")
        if not overwrite:
            raise FileExistsError(f"{out} already holds an export: choose another --out, or give --overwrite")
    from pretrain.encoder import load_encoder
    from serve.export.export import export_model

    card = export_model(
        load_encoder(model, pretrained=pretrained, device="cpu"),
        out,
        to=to,
        int8=int8,
        reduce_range=reduce_range,
        data=data,
        limit=limit,
    )
    parity = card["parity_int8" if int8 else "parity_float32"]
    for name, numbers in parity.items():
        ratio = card["bytes"][name]["model"] / card["bytes"][name]["export"]
        print(
            f"{name:<6} largest difference {numbers['max_abs']:.1e}, mean cosine {numbers['cosine_mean']:.6f}, "
            f"{card['bytes'][name]['export'] / 1e6:.1f} MB ({ratio:.2f}x smaller)"
        )
    print(f"{out}: {card['precision']} for {card['runtime']}; README.md has sizes, latencies and parity")


def main(argv: list[str]) -> int | None:
    """Entry point of `pairstream export`."""
    tyro.cli(export, args=argv, prog="pairstream export")
