"""`pairstream export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from pairstream.errors import require


def export(
    *,
    out: Path,
    model: str | None = None,
    captioner: Path | None = None,
    vqa: Path | None = None,
    to: Literal["onnx", "openvino"] = "onnx",
    int8: bool = False,
    reduce_range: bool = False,
    data: tuple[str, ...] = (),
    limit: int = 1000,
    pretrained: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model for machines without torch, after comparing the two.

    Args:
        out: The folder to write.
        model: Both towers of a dual encoder: a checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        captioner: A captioner of `pairstream finetune` instead.
        vqa: A VQA model of `pairstream finetune` instead.
        to: The runtime.
        int8: Weights in int8: smaller, and faster where the CPU has VNNI.
        reduce_range: Seven bits instead of eight, for CPUs without VNNI.
        data: Shards on which int8 must keep recall@1 and first results; without them cosines decide.
        limit: Only the first so many samples of them.
        pretrained: open_clip's tag of weights, for a name.
        overwrite: Replace an export that lies in --out.
    """
    from serve.export.runtime import CARD

    given = {"--model": model, "--captioner": captioner, "--vqa": vqa}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"give one of {', '.join(given)}; got {' and '.join(chosen) or 'none'}")
    if model is None and (int8 or data or pretrained):
        raise ValueError(
            f"--int8, --data and --pretrained go with --model: {chosen[0]} is exported in float32, and compared by "
            "what it writes"
        )
    require({"onnx": "onnxruntime", "openvino": "openvino"}[to], "export", "`pairstream export`")
    require("onnx", "export", "`pairstream export`")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / CARD).is_file():
            raise FileExistsError(f"{out} exists and holds no export: choose another --out")
        if not overwrite:
            raise FileExistsError(f"{out} already holds an export: choose another --out, or give --overwrite")
    folder = captioner or vqa
    if folder is not None:
        export_writer(folder, "caption" if captioner else "vqa", out, to)
        return
    from pretrain.encoder import load_encoder
    from serve.export.export import export_model

    assert model is not None
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


def export_writer(folder: Path, kind: str, out: Path, to: str) -> None:
    """A captioner or a VQA model.

    Raises:
        ValueError: It was trained for something else.
    """
    require("transformers", "finetune", "captioners and VQA models")
    from finetune.model import load_task_model
    from serve.export.task_models import export_task_model

    model = load_task_model(folder, device="cpu")
    if model.task.kind != kind:
        raise ValueError(f"{folder} was trained for {model.task.kind}, expected a model for {kind}")
    card = export_task_model(model, out, to=to, name=folder.name)
    print(
        f"all {card['parity']['texts']} texts are the model's, largest difference of a logit "
        f"{card['parity']['max_abs']:.1e}"
    )
    print(f"{out}: float32 for {to}, {card['bytes']['export'] / 1e6:.1f} MB")


def main(argv: list[str]) -> int | None:
    """Entry point of `pairstream export`."""
    tyro.cli(export, args=argv, prog="pairstream export")
