"""Small models side by side: parameters, size and latency of torch, onnxruntime and int8, and recall where it is real.

Each model is exported as `pairstream export` does it; one thread, batch 1, processor time, the three of each in turn
(A B C C B A), medians with the least and largest ratio, and the rows of the float32 export equal to torch's within
1e-5 in the same run. Models by name have random weights, since none are packaged: parameters, sizes and latencies
do not depend on them, and recall does, so that it is only measured for `--trained` models on their shards.

The last line is one JSON object; before it the table of docs/edge.md.

    python benchmarks/small_towers.py --trained runs/quickstart/pretrain=runs/quickstart/shards/test
    python benchmarks/small_towers.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).resolve().parent  # its retrieval.py must not hide the package
sys.path[:] = [str(HERE.parent), *(each for each in sys.path if Path(each or ".").resolve() != HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.timing import machine, timed  # noqa: E402
from pretrain.encoder import Encoder, build_encoder, load_encoder  # noqa: E402
from pretrain.recipe_model import TextTransformer, TimmTower, TowersModel  # noqa: E402
from serve.export.parity import compare_on_data  # noqa: E402
from serve.export.quantise import quantize  # noqa: E402
from serve.export.runtime import OnnxTower  # noqa: E402
from serve.export.towers import tower_name, write_onnx  # noqa: E402

KINDS = ("torch", "fp32", "int8")
SMALL_TEXT = TextTransformer(width=256, heads=4, layers=4)
NAMED = {  # open_clip's own, and timm's with a small text tower
    "ViT-B-32": "ViT-B-32",
    "MobileCLIP2-S0": "MobileCLIP2-S0",
    "MobileCLIP-S1": "MobileCLIP-S1",
    "TinyViT 5M": "timm:tiny_vit_5m_224",
    "TinyViT 11M": "timm:tiny_vit_11m_224",
    "EfficientNet-lite0": "timm:tf_efficientnet_lite0",
    "RepViT M0.9": "timm:repvit_m0_9",
}
QUICK = ("TinyViT 5M", "EfficientNet-lite0")


def build(name: str) -> Encoder:
    """An encoder with random weights, by open_clip's name or `timm:` and timm's."""
    torch.manual_seed(0)
    if not name.startswith("timm:"):
        return load_encoder(name, device="cpu")
    tower = TimmTower(name=name.removeprefix("timm:"))
    return build_encoder(TowersModel(embed_dim=512, image_tower=tower, text_tower=SMALL_TEXT), device="cpu")


class Pair:
    """Both towers of an export, in the place of an Encoder."""

    def __init__(self, folder: Path):
        self.encode_images, self.encode_texts = (OnnxTower(folder, side, 1) for side in ("image", "text"))


def in_turn(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """Milliseconds of processor time of each, and how much faster than the first the others are."""
    for run in runs.values():
        run()
    names = list(runs)
    rounds = [
        {name: 1000 * timed(runs[name]).seconds for name in (names if number % 2 else names[::-1])}
        for number in range(pairs)
    ]
    found: dict[str, Any] = {
        "ms": {name: round(statistics.median(each[name] for each in rounds), 2) for name in names}
    }
    for name in names[1:]:
        ratios = sorted(each[names[0]] / max(each[name], 1e-6) for each in rounds)
        found[f"{name}_speedup"] = [
            round(value, 2) for value in (statistics.median(ratios), ratios[0], ratios[-1])
        ]
    return found


def measure(encoder: Encoder, pairs: int, data: str | None = None, limit: int = 600) -> dict[str, Any]:
    """One model in torch, exported, and in int8.

    Args:
        encoder: The model, on the CPU.
        pairs: Rounds of each timing.
        data: Shards for recall@1, for a model that was trained.
        limit: Pictures of them.

    Returns:
        For `image` and `text`: `tower`, `parameters`, `megabytes` (`fp32`, `int8`), `ms` of each of `KINDS` and the
        speedups; `fp32_difference`, `int8_cosine`; with data `recall` (what `compare_on_data` gives for int8).
    """
    pixels = torch.randint(0, 256, (1, 3, *encoder.image_size), dtype=torch.uint8)
    tokens = encoder.tokenize(["two dogs on a beach"])
    parts = {"image": sum(p.numel() for p in encoder.model.visual.parameters())}
    parts["text"] = sum(p.numel() for p in encoder.model.parameters()) - parts["image"]
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        float_, int8 = Path(name) / "fp32", Path(name) / "int8"
        float_.mkdir()
        int8.mkdir()
        write_onnx(encoder, float_)
        quantize(float_, int8)
        exports = {"fp32": Pair(float_), "int8": Pair(int8)}
        for side, given in (("image", pixels), ("text", tokens)):
            method = f"encode_{side}s"
            runs: dict[str, Callable[[], np.ndarray]] = {
                "torch": lambda method=method, given=given: getattr(encoder, method)(given).numpy()
            }
            for kind, pair in exports.items():
                runs[kind] = lambda pair=pair, method=method, given=given: getattr(pair, method)(
                    given.numpy()
                )
            rows = {kind: run() for kind, run in runs.items()}
            np.testing.assert_allclose(rows["fp32"], rows["torch"], rtol=0, atol=1e-5)
            report[side] = {
                "tower": tower_name(encoder, side),
                "parameters": parts[side],
                "megabytes": {
                    kind: round((folder / f"{side}.onnx").stat().st_size / 1e6, 1)
                    for kind, folder in (("fp32", float_), ("int8", int8))
                },
                "fp32_cosine": float((rows["torch"] * rows["fp32"]).sum()),
                "int8_cosine": round(float((rows["torch"] * rows["int8"]).sum()), 5),
                **in_turn(runs, pairs),
            }
        if data is not None:
            report["recall"] = compare_on_data(encoder, exports["int8"], [data], limit=limit)  # pyright: ignore
    return report


def table(found: dict[str, dict[str, Any]]) -> str:
    """docs/edge.md's table."""
    lines = [
        "| model | input | image tower, M | MB, fp32 / int8 | ms, torch / fp32 / int8 | text tower, M | "
        "MB, fp32 / int8 | ms, torch / fp32 / int8 | recall@1, fp32 / int8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = [name, str(one["input"])]
        for side in ("image", "text"):
            part = one[side]
            cells += [
                f"{part['parameters'] / 1e6:.1f}",
                " / ".join(f"{value:.1f}" for value in part["megabytes"].values()),
                " / ".join(f"{part['ms'][kind]:.1f}" for kind in KINDS),
            ]
        if "recall" in one:
            sides = [one["recall"][direction] for direction in ("image_to_text", "text_to_image")]
            cells.append(
                "; ".join(f"{each['recall@1']:.3f} / {each['recall@1_export']:.3f}" for each in sides)
            )
        else:
            cells.append("random weights")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trained",
        action="append",
        default=[],
        metavar="MODEL=SHARDS",
        help="a trained model and held-out shards",
    )
    parser.add_argument("--models", nargs="*", choices=list(NAMED), help="only these of the named ones")
    parser.add_argument("--quick", action="store_true", help="two small models, to see that it works")
    parser.add_argument("--limit", type=int, default=600, help="pictures for recall")
    parser.add_argument("--pairs", type=int, default=9, help="rounds of each timing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = QUICK if args.quick else list(NAMED) if args.models is None else args.models
    jobs: list[tuple[str, Callable[[], Encoder], str | None]] = []
    for each in args.trained:
        model, divider, data = each.partition("=")
        if not divider:
            parser.error(f"--trained {each}: expected MODEL=SHARDS")
        name = "/".join(Path(model).parts[-2:])
        jobs.append((name, lambda model=model: load_encoder(model, device="cpu"), data))
    jobs += [(name, lambda name=name: build(NAMED[name]), None) for name in names]
    found: dict[str, dict[str, Any]] = {}
    for name, make, data in jobs:
        began = time.perf_counter()
        encoder = make()
        found[name] = {
            "input": encoder.image_size[0],
            **measure(encoder, args.pairs, data, args.limit),
        }
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        del encoder
    print(table(found))
    result = {
        "benchmark": "small_towers",
        "models": found,
        "pairs": args.pairs,
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
