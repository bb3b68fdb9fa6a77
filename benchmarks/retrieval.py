"""Retrieval numbers, their memory and the zero-shot classifier against clip-benchmark, on the same embeddings.

Both sides get the same unit rows and must give the same recall at 1, 5 and 10 in both directions; the peer is
its own `evaluate`, with towers that hand embeddings through. Its score matrix, boolean matrix and one-hot
tensors make one run at 5,000 x 25,000 take minutes, so that size is run once between two of ours; the smaller
pair is interleaved A B B A. The classifier is built on a small text tower with 80 templates and compared row by
row. One thread, CPU seconds of the process. `product_cpu_s` is the float32 product of all rows and nothing else, in
the same blocks: whoever counts all ranks exactly pays at least that. `slope` is the exponent of our CPU seconds
against the number of images at five texts an image; all pairs are compared, so 2 is expected.

    python benchmarks/retrieval.py [--quick] [--full] [--plot cost.png]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
# A script's own folder comes first on the path, and there this file would be taken for the package `retrieval`.
sys.path[:] = [str(HERE.parent), *(each for each in sys.path if Path(each or ".").resolve() != HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.timing import in_turns, spread, timed  # noqa: E402
from retrieval.metrics import retrieval_metrics  # noqa: E402

KS = (1, 5, 10)
DIM = 512
TEXTS = 5  # an image


def embeddings(images: int, dim: int = DIM, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows with a modality gap and half-right neighbours: `(images, dim)`, `(5 images, dim)`, owners."""
    rng = np.random.default_rng(seed)
    gap = rng.standard_normal((2, dim)).astype(np.float32)
    owner = np.arange(images).repeat(TEXTS)
    image = rng.standard_normal((images, dim), dtype=np.float32)
    text = rng.standard_normal((len(owner), dim), dtype=np.float32)
    for start in range(0, images, 1000):  # in place: a whole copy would be counted as memory of the work
        mine = slice(start * TEXTS, (start + 1000) * TEXTS)
        text[mine] += 0.22 * image[start : start + 1000].repeat(TEXTS, 0) + gap[1]
        text[mine] /= np.linalg.norm(text[mine], axis=1, keepdims=True)
    for start in range(0, images, 1000):
        mine = slice(start, start + 1000)
        image[mine] += gap[0]
        image[mine] /= np.linalg.norm(image[mine], axis=1, keepdims=True)
    return image, text, owner


def ours(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    found = retrieval_metrics(image, text, owner, KS)
    return {
        f"{direction}/recall@{k}": numbers[f"recall@{k}"] for direction, numbers in found.items() for k in KS
    }


class Through(torch.nn.Module):
    """Towers whose input is already the embedding."""

    def encode_image(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    encode_text = encode_image


def theirs(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    from clip_benchmark.metrics import zeroshot_retrieval

    zeroshot_retrieval.tqdm = lambda items: items
    rows, texts = torch.from_numpy(image), torch.from_numpy(text)
    batches = (  # 64 at a time is the peer's default
        (
            rows[start : start + 64],
            np.arange(start, min(start + 64, len(rows)))[:, None] * TEXTS + np.arange(TEXTS),
        )
        for start in range(0, len(rows), 64)
    )
    found = zeroshot_retrieval.evaluate(
        Through(),
        batches,
        lambda numbers: texts[torch.tensor(numbers)],
        "cpu",
        amp=False,
        recall_k_list=list(KS),
    )
    names = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}
    return {
        f"{direction}/recall@{k}": found[f"{name}_recall@{k}"]
        for direction, name in names.items()
        for k in KS
    }


def product_alone(image: np.ndarray, text: np.ndarray, block: int = 1024) -> None:
    """The product that every exact ranking needs, block by block into the same memory."""
    first, second = torch.from_numpy(image), torch.from_numpy(text)
    for rows in first.split(block):
        for columns in second.split(block):
            kept = SCRATCH[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=kept)


SCRATCH = torch.empty(1024 * 1024)


def memory_mb(which: str) -> float:
    """`VmRSS` or `VmHWM` of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    return float("nan")


def one_run(who: str, images: int, seed: int = 0) -> dict[str, Any]:
    """CPU seconds, numbers and extra peak memory of one run; called in a process of its own."""
    torch.set_num_threads(1)
    ours(*embeddings(64))  # libraries are loaded before anything is measured
    if who == "theirs":
        theirs(*embeddings(64))
    data = embeddings(images, seed=seed)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seconds, numbers = timed(lambda: (ours if who == "ours" else theirs)(*data))
    extra = memory_mb("VmHWM") - before
    result = {"cpu_s": seconds, "numbers": numbers, "extra_mb": extra}
    if who == "ours":
        result["product_cpu_s"] = timed(lambda: product_alone(*data[:2])).seconds
    return result


def in_child(who: str, images: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", who, str(images)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(first: dict[str, float], second: dict[str, float]) -> float:
    assert first.keys() == second.keys()
    return max(abs(first[name] - second[name]) for name in first)


def compare_once(images: int) -> dict[str, Any]:
    """The peer once, between two runs of ours."""
    first, peer, last = in_child("ours", images), in_child("theirs", images), in_child("ours", images)
    difference = largest_difference(first["numbers"], peer["numbers"])
    mine = statistics.mean([first["cpu_s"], last["cpu_s"]])
    return {
        "cpu_ratio": round(peer["cpu_s"] / mine, 1),
        # The peer's numbers are float32 means; one query is 4e-5 here.
        "numbers_equal": difference < 2e-6 and first["numbers"] == last["numbers"],
        "largest_difference": difference,
        "ours_cpu_s": [round(first["cpu_s"], 2), round(last["cpu_s"], 2)],
        "theirs_cpu_s": round(peer["cpu_s"], 2),
        "product_cpu_s": [round(first["product_cpu_s"], 2), round(last["product_cpu_s"], 2)],
        "ours_extra_mb": round(first["extra_mb"]),
        "theirs_extra_mb": round(peer["extra_mb"]),
        "runs": {"ours": 2, "theirs": 1},
        "numbers": first["numbers"],
    }


def compare_pairs(images: int, pairs: int) -> dict[str, Any]:
    """Interleaved pairs at a size that the peer can take."""
    data = embeddings(images)
    rounds = in_turns(lambda: ours(*data), lambda: theirs(*data), pairs)
    difference = max(largest_difference(mine.result, peer.result) for mine, peer in rounds)
    return {
        **spread([peer.seconds / mine.seconds for mine, peer in rounds], "cpu_ratio", 1),
        "pairs": pairs,
        "numbers_equal": difference < 2e-6,
    }


def classifier_build(pairs: int, classes: int) -> dict[str, Any]:
    """Zero-shot classifier on a small text tower with ImageNet's templates."""
    from clip_benchmark.metrics import zeroshot_classification

    from pretrain.encoder import build_encoder
    from pretrain.recipe_model import TextTransformer, TowersModel, ViT
    from retrieval.classifier import build_classifier
    from retrieval.prompts import named_classes, named_templates

    zeroshot_classification.tqdm = lambda items: items
    torch.manual_seed(0)
    encoder = build_encoder(
        TowersModel(
            embed_dim=128,
            image_tower=ViT(image_size=32, patch_size=16, width=64, layers=1, head_width=32),
            text_tower=TextTransformer(context_length=77, width=128, heads=2, layers=4),
        ),
        device="cpu",
    )
    names, templates = named_classes()["imagenet"][:classes], named_templates()["imagenet"]
    marked = [template.replace("{}", "{c}") for template in templates]

    def ours() -> np.ndarray:
        return build_classifier(encoder, names, templates).weights

    def theirs() -> np.ndarray:
        tokenizer = encoder.tokenizer
        made = zeroshot_classification.zero_shot_classifier(
            encoder.model, tokenizer, names, marked, "cpu", amp=False
        )
        return made.T.numpy()

    rounds = in_turns(ours, theirs, pairs)
    difference = max(float(np.abs(mine.result - peer.result).max()) for mine, peer in rounds)
    return {
        **spread([peer.seconds / mine.seconds for mine, peer in rounds]),
        "pairs": pairs,
        "classes": classes,
        "templates": len(templates),
        "largest_difference": difference,
        "weights_equal": difference < 1e-6,
    }


def fitted_slope(points: list[dict[str, float]]) -> float:
    """Exponent of CPU seconds against images, least squares on logarithms."""
    x, y = (np.log([point[name] for point in points]) for name in ("images", "cpu_s"))
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def draw(points: list[dict[str, float]], slope: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog([p["images"] for p in points], [p["cpu_s"] for p in points], "o-", label=f"slope {slope}")
    axes.set(xlabel="images (5 texts each, 512 wide)", ylabel="CPU seconds, both directions")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)


def index_figures(quick: bool) -> dict[str, Any]:
    """What `retrieval_index.py` beside this file measures in its `run()`."""
    path = HERE / "retrieval_index.py"
    spec = spec_from_file_location("retrieval_index", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.run(quick=quick)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute, for trying the command")
    parser.add_argument("--full", action="store_true", help="also 100,000 x 500,000: ten minutes more")
    parser.add_argument("--plot", type=Path, help="draw cost against size on logarithmic axes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(one_run(args.child[0], int(args.child[1]))))
        return
    sizes = [500, 1000, 2000] if args.quick else [2000, 5000, 10000, 20000] + [100000] * args.full
    large = compare_once(1000 if args.quick else 5000)
    print(f"once: {large}", flush=True)
    small = compare_pairs(200 if args.quick else 1000, 7)
    print(f"pairs: {small}", flush=True)
    classifier = classifier_build(3 if args.quick else 7, 10 if args.quick else 25)
    print(f"classifier: {classifier}", flush=True)
    points = []
    for images in sizes:
        run = in_child("ours", images)
        points.append(
            {"images": images, "cpu_s": round(run["cpu_s"], 3), "extra_mb": round(run["extra_mb"], 1)}
        )
        print(f"cost: {points[-1]}", flush=True)
    slope = fitted_slope(points)
    if args.plot:
        draw(points, slope, args.plot)
    result: dict[str, Any] = {
        "benchmark": "retrieval",
        "quick": args.quick,
        "score_1k_5k" if not args.quick else "score_200_1k": small,
        "score_5k_25k" if not args.quick else "score_1k_5k": large,
        "classifier_build_ratio": classifier["ratio"],
        "classifier": classifier,
        "slope": slope,
        "points": points,
        "machine": f"{platform.machine()}, torch {torch.__version__}, clip_benchmark {version('clip_benchmark')}",
    }
    by_size = {point["images"]: point["extra_mb"] for point in points}
    if 20000 in by_size:
        result["score_20k_100k_extra_mb"] = by_size[20000]
    result["index_30k" if args.quick else "index_200k"] = index_figures(args.quick)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
