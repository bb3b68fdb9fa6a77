"""One model to one folder for the edge: towers, tokenizer, preprocessing, and a card that has been measured."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from pairstream import __version__
from pairstream.atomic import new_folder, write_text
from pretrain.encoder import Encoder
from serve.export.parity import check_float, check_int8, compare, compare_on_data
from serve.export.quantise import quantize
from serve.export.runtime import CARD, FORMAT, EdgeEncoder
from serve.export.tokenizer import write_tokenizer
from serve.export.towers import to_openvino, tower_name, write_onnx

Runtime = Literal["onnx", "openvino"]
ROUNDS = 9  # timings of each; the least is reported, which other work on the machine lengthens least


def export_model(
    encoder: Encoder,
    out: str | Path,
    *,
    to: Runtime = "onnx",
    int8: bool = False,
    reduce_range: bool = False,
    data: Sequence[str] = (),
    limit: int | None = 1000,
) -> dict[str, Any]:
    """Export both towers; the folder appears only when it says what the model says.

    Args:
        encoder: The model, on the CPU.
        out: The folder; an older export there is replaced.
        to: The runtime.
        int8: Quantise weights (onnx only).
        reduce_range: Seven bits instead of eight, for CPUs without VNNI.
        data: Shards on which int8 is judged by its recall and first results; without them by cosine alone.
        limit: Only the first so many samples of them.

    Returns:
        The content of export.json.

    Raises:
        ValueError: The gate refuses, int8 for OpenVINO, a model that cannot be exported.
        ImportError: The extra `export` is not installed.

    Example:
        >>> export_model(load_encoder("runs/scenes_cpu", device="cpu"), "edge")     # doctest: +SKIP
    """
    if int8 and to != "onnx":
        raise ValueError(
            "--int8 quantises for onnxruntime, and OpenVINO runs that graph slower than its own float32: use --to onnx "
            "with --int8, or --to openvino without"
        )
    if data and not int8:
        raise ValueError(
            "--data judges --int8: a float32 export is compared with the model row by row, without data"
        )
    out = Path(out)
    with new_folder(out) as folder:
        card: dict[str, Any] = {
            "format": FORMAT,
            "pairstream": __version__,
            "runtime": to,
            "precision": "int8" if int8 else "float32",
            "model": {"name": Path(encoder.name).name, "fingerprint": encoder.fingerprint},
            "embed_dim": encoder.embed_dim,
            "logit_scale": float(encoder.model.logit_scale.detach().exp()),
            "preprocess": {
                "size": list(encoder.image_size),
                **{
                    name: encoder.preprocess_cfg[name]
                    for name in ("interpolation", "resize_mode", "fill_color", "mean", "std")
                },
                "normalised": "inside the graph, which takes uint8",
            },
            "towers": {side: tower_name(encoder, side) for side in ("image", "text")},
            "text": write_tokenizer(encoder.tokenizer, folder / "tokenizer.json"),
        }
        write_onnx(encoder, folder)
        if to == "openvino":
            to_openvino(folder)
        write_card(folder, card)
        card["parity_float32"] = compare(encoder, EdgeEncoder(folder))
        check_float(card["parity_float32"])
        if int8:
            card["quantised"] = {"reduce_range": reduce_range, **quantize(folder, reduce_range=reduce_range)}
            edge = EdgeEncoder(folder)
            card["parity_int8"] = compare(encoder, edge)
            card["on_data"] = compare_on_data(encoder, edge, data, limit=limit) if data else None
            check_int8(card["parity_int8"], card["on_data"])
        card["bytes"] = sizes(encoder, folder)
        card["milliseconds"] = latencies(encoder, EdgeEncoder(folder, threads=torch.get_num_threads()))
        card["measured_with"] = {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "runtime": version({"onnx": "onnxruntime", "openvino": "openvino"}[to]),
        }
        write_card(folder, card)
        write_text(folder / "README.md", readme(card))
    return card


def write_card(folder: Path, card: dict[str, Any]) -> None:
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def sizes(encoder: Encoder, folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of each tower: the model's parameters, and the exported files."""
    visual = sum(p.numel() * p.element_size() for p in encoder.model.visual.parameters())
    total = sum(p.numel() * p.element_size() for p in encoder.model.parameters())
    return {
        name: {
            "model": before,
            "export": sum(p.stat().st_size for p in folder.iterdir() if p.name.startswith(f"{name}.")),
        }
        for name, before in (("image", visual), ("text", total - visual))
    }


def latencies(encoder: Encoder, edge: EdgeEncoder, batches: Sequence[int] = (1, 8)) -> dict[str, Any]:
    """Least milliseconds of a pass, model and export in turn on the same input and threads."""
    report: dict[str, Any] = {}
    for batch in batches:
        pixels = torch.randint(0, 256, (batch, 3, *encoder.image_size), dtype=torch.uint8)
        tokens = encoder.tokenize(["two dogs on a beach"] * batch)
        arrays = pixels.numpy(), tokens.numpy()
        for name, pair in {
            "image": (partial(encoder.encode_images, pixels), partial(edge.encode_images, arrays[0])),
            "text": (partial(encoder.encode_texts, tokens), partial(edge.encode_texts, arrays[1])),
        }.items():
            before, after = paired(*pair)
            report[f"{name}_batch_{batch}"] = {"model": round(before, 3), "export": round(after, 3)}
    return report


def paired(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Least milliseconds of two functions, timed in turn: A B B A."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for warm in (first, second):
        warm()
    for number in range(ROUNDS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.perf_counter()
            (first, second)[which]()
            times[which].append(1000 * (time.perf_counter() - began))
    return min(times[0]), min(times[1])


def readme(card: dict[str, Any]) -> str:
    """The card in words."""
    lines = [
        f"# {card['model']['name']} for the edge",
        "",
        f"Both towers of the dual encoder `{card['model']['fingerprint']}` ({card['towers']['image']}, "
        f"{card['towers']['text']}), {card['precision']}, for {card['runtime']}. Rows have {card['embed_dim']} "
        "dimensions and length one.",
        "",
        "```python",
        "from serve.export.runtime import EdgeEncoder",
        "",
        'encoder = EdgeEncoder("this folder")',
        'encoder.predict(["cat.jpg"], ["cat", "dog"])',
        "```",
        "",
        "## Parity with the model",
        "",
        "| tower | precision | largest difference | mean cosine | least cosine |",
        "|---|---|---|---|---|",
    ]
    for precision in ("float32", "int8"):
        for name, numbers in card.get(f"parity_{precision}", {}).items():
            lines.append(
                f"| {name} | {precision} | {numbers['max_abs']:.1e} | {numbers['cosine_mean']:.6f} | "
                f"{numbers['cosine_min']:.6f} |"
            )
    if card.get("on_data"):
        found = card["on_data"]
        lines += ["", f"On {found['samples']:,} pictures with {found['texts']:,} texts:", ""]
        lines += [
            "| direction | recall@1 | recall@1, int8 | same first result | of the same picture |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name.replace('_', ' ')} | {found[name]['recall@1']:.4f} | {found[name]['recall@1_export']:.4f} | "
            f"{found[name]['agreement']:.1%} | {found[name]['same_picture']:.1%} |"
            for name in ("image_to_text", "text_to_image")
        ]
    elif card["precision"] == "int8":
        lines += ["", "No data were given: recall was not measured."]
    if "quantised" in card:
        lines += ["", "What is int8:", ""]
        for name in ("image", "text"):
            found = card["quantised"][name]
            lines.append(
                f"- {name} tower: {found['int8_products']} matrix products in int8, {found['float_products']} in "
                f"float32; {found['float_convolutions']} convolutions, all in float32"
                + (", and the table of embeddings in int8" if found["int8_tables"] else "")
            )
    lines += ["", "## Size and speed", "", "| tower | model, MB | export, MB |", "|---|---|---|"]
    for name, numbers in card["bytes"].items():
        lines.append(f"| {name} | {numbers['model'] / 1e6:.1f} | {numbers['export'] / 1e6:.1f} |")
    lines += ["", "| pass | torch, ms | export, ms |", "|---|---|---|"]
    for name, numbers in card["milliseconds"].items():
        lines.append(f"| {name.replace('_', ' ')} | {numbers['model']} | {numbers['export']} |")
    used = card["measured_with"]
    lines += [
        "",
        f"The least of {ROUNDS} passes in turn on {used['cpu']}, {used['threads']} threads, torch {used['torch']}, "
        f"{card['runtime']} {used['runtime']}.",
        "",
    ]
    return "\n".join(lines)
