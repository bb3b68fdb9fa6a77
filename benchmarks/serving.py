"""The server under 32 clients against one forward pass per request, and exported towers against torch.

- `throughput_ratio_32_clients`, `p95_ratio`: two servers of the same model, one that batches and one that runs each
  request by itself (`batch=1`: the same code, queue and thread), take the same requests in turn, A B B A. Both routes
  are measured, texts and pictures; the headline is the route where batching helps less.
  `forward_alone` is what a bare pass of 32 gains over 32 passes of one: no server gains more. `heavier` is the same of
  ViT-B/32, whose pass of one keeps the processor busy already.
- `overhead_p50_ms`: one client's median time for one text, less the median of the bare `encode_texts` in this process;
  on a machine that others use, too, it measures the others as well, and `cpu_ms` beside it, which is the processor
  time of the server for a request less that of the bare forward, does not.
- `onnx_fp32_speedup`, `int8_speedup`: the image tower of ViT-B/32 (random weights, batch 1, one thread, CPU time) in
  torch against its exports; `cosine_fp32` is the least cosine of their rows.
- `int8_recall_drop`: recall@1 that int8 loses, the worse direction, for a trained model on its shards.

Everything stays on the loopback address and is bounded in number.

    python benchmarks/serving.py --trained runs/quickstart/pretrain --data runs/quickstart/shards/test
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).resolve().parent  # its retrieval.py must not hide the package
sys.path[:] = [str(HERE.parent), *(each for each in sys.path if Path(each or ".").resolve() != HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.load import load, post  # noqa: E402
from benchmarks.timing import machine, timed  # noqa: E402
from pretrain.encoder import Encoder, build_encoder, load_encoder  # noqa: E402
from pretrain.recipe import PretrainRecipe  # noqa: E402

CLIENTS = 32
ROUTES = ("text", "image")


def small_encoder() -> Encoder:
    """The quickstart's architecture with random weights: speed does not depend on them."""
    from pairstream.recipe import load_recipe

    torch.manual_seed(0)
    return build_encoder(load_recipe(PretrainRecipe, "pretrain", "scenes_cpu").model, device="cpu")


def serve(model: str, batch: int) -> None:
    """Be one server; prints its port."""
    from serve.app import create_app
    from serve.models import load_models, settle
    from serve.server import make_server
    from serve.settings import Batching, Settings

    settings = Settings(embedding=Batching(batch=batch, deadline=120), rate=0)
    app = create_app(load_models(model, device="cpu"), settings)
    server = make_server(app, port=0, listening=lambda port: print(port, flush=True))
    settle()
    server.run()


@contextmanager
def server(model: str, batch: int) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process number."""
    words = [sys.executable, __file__, "--serve", model, "--batch", str(batch)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        process.terminate()
        process.wait(60)


def bodies(count: int) -> dict[str, list[bytes]]:
    """Requests of one item each, all different."""
    rng = np.random.default_rng(0)
    found: dict[str, list[bytes]] = {"text": [], "image": []}
    for number in range(count):
        found["text"].append(json.dumps({"texts": [f"two red hearts above cat number {number}"]}).encode())
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((96, 96)).save(file, "JPEG")
        picture = base64.b64encode(file.getvalue()).decode()
        found["image"].append(json.dumps({"images": [{"data": picture}]}).encode())
    return found


def under_load(port: int, route: str, contents: Sequence[bytes]) -> dict[str, Any]:
    """All requests, by clients that each ask again as soon as they have been answered."""
    found = load(port, [post(f"/v1/embed/{route}", body) for body in contents], CLIENTS)
    return {
        "rate": len(contents) / found.seconds,
        "p95": float(np.quantile(found.times, 0.95)),
        "rows": np.array([json.loads(answer)["embeddings"][0] for answer in found.answers]),
    }


def expected(encoder: Encoder, route: str, requests: Sequence[bytes]) -> np.ndarray:
    """The library's own rows."""
    contents = [json.loads(body) for body in requests]
    if route == "text":
        return encoder.encode_texts([content["texts"][0] for content in contents]).numpy()
    return encoder.encode_images([base64.b64decode(c["images"][0]["data"]) for c in contents]).numpy()


def batch_gain(encoder: Encoder, route: str, requests: Sequence[bytes]) -> float:
    """How much less processor time an item takes in a bare pass of 32 than alone: no server can gain more."""
    contents = [json.loads(body) for body in requests[:32]]
    if route == "text":
        items: Any = encoder.tokenize([content["texts"][0] for content in contents])
        encode = encoder.encode_texts
    else:
        pictures = [base64.b64decode(content["images"][0]["data"]) for content in contents]
        items = torch.stack([encoder.preprocess(picture) for picture in pictures])
        encode = encoder.encode_images
    ratios = []
    for _ in range(7):
        one = statistics.median(timed(lambda n=n: encode(items[n : n + 1])).seconds for n in range(8))
        ratios.append(one * len(items) / timed(lambda: encode(items)).seconds)
    return statistics.median(ratios)


def under_both(
    servers: tuple[int, int], encoder: Encoder, content: dict[str, list[bytes]], pairs: int
) -> dict[str, Any]:
    """Both servers, the one that batches first, under the same load in turn.

    Returns:
        For each route the ratio of the rates with its spread, that of p95, both rates, and `forward_alone`.
    """
    from serve.folding import fold

    batching, single = servers
    served, found = copy.deepcopy(encoder), {}
    fold(served)  # as the servers do
    for route, requests in content.items():
        rounds = []
        for number in range(pairs + 1):  # the first one warms
            order = (batching, single) if number % 2 else (single, batching)
            results = {port: under_load(port, route, requests) for port in order}
            for result in results.values():
                np.testing.assert_allclose(
                    result["rows"], expected(encoder, route, requests), rtol=0, atol=1e-5
                )
            rounds.append((results[batching], results[single]))
        rounds = rounds[1:]
        ratios = sorted(a["rate"] / b["rate"] for a, b in rounds)
        found[route] = {
            "ratio": round(statistics.median(ratios), 2),
            "low": round(ratios[0], 2),
            "high": round(ratios[-1], 2),
            "p95_ratio": round(statistics.median(a["p95"] / b["p95"] for a, b in rounds), 2),
            "requests_per_second": round(statistics.median(a["rate"] for a, _ in rounds), 1),
            "one_by_one": round(statistics.median(b["rate"] for _, b in rounds), 1),
            "forward_alone": round(batch_gain(served, route, requests), 2),
        }
    return found


def serving(model: str, encoder: Encoder, requests: int, pairs: int) -> dict[str, Any]:
    """Both servers of a model under load, and a lone client of the one that batches."""
    content = bodies(requests)
    with server(model, 32) as (batching, process), server(model, 1) as (single, _):
        found = under_both((batching, single), encoder, content, pairs)
        found["overhead"] = overhead(batching, process, encoder, content["text"][:50], pairs)
    return found


def processor_ms(process: int) -> float:
    """Processor time of another process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overhead(
    port: int, process: int, encoder: Encoder, requests: Sequence[bytes], pairs: int
) -> dict[str, float]:
    """Milliseconds at the median, server and bare forward in turn."""
    texts = [json.loads(body)["texts"] for body in requests]
    whole = [post("/v1/embed/text", body) for body in requests]

    def served() -> float:
        return 1000 * statistics.median(load(port, whole, 1).times)

    def bare() -> float:
        return median_ms([lambda text=text: encoder.encode_texts(text) for text in texts])

    differences, processor = [], []
    for number in range(pairs + 1):
        used: dict[Any, float] = {}
        times: dict[Any, float] = {}
        for which in (served, bare) if number % 2 else (bare, served):
            clock = (
                (lambda: processor_ms(process)) if which is served else (lambda: 1000 * time.process_time())
            )
            began = clock()
            times[which] = which()
            used[which] = (clock() - began) / len(requests)
        differences.append((times[served] - times[bare], times[served], times[bare]))
        processor.append(used[served] - used[bare])
    differences, processor = differences[1:], processor[1:]
    return {
        "cpu_ms": round(statistics.median(processor), 2),
        "p50_ms": round(statistics.median(each[0] for each in differences), 2),
        "served_ms": round(statistics.median(each[1] for each in differences), 2),
        "bare_ms": round(statistics.median(each[2] for each in differences), 2),
    }


def median_ms(calls: Sequence[Callable[[], Any]]) -> float:
    times = []
    for call in calls:
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def towers(pairs: int) -> dict[str, Any]:
    """ViT-B/32 in torch and exported, batch 1: the image tower, and the text tower beside it."""
    from benchmarks.small_towers import build, measure

    found = measure(build("ViT-B-32"), pairs)
    report: dict[str, Any] = {
        "fp32_cosine": found["image"]["fp32_cosine"],
        "int8_cosine": found["image"]["int8_cosine"],
    }
    for side, prefix in (("image", ""), ("text", "text_")):
        one = found[side]
        report |= {f"{prefix}{name}": one[name] for name in ("fp32_speedup", "int8_speedup")}
        report[f"{prefix}milliseconds"] = one["ms"]
        report[f"{prefix}int8_smaller"] = round(one["megabytes"]["fp32"] / one["megabytes"]["int8"], 2)
    return report


def recall_drop(model: str, data: str, limit: int) -> dict[str, Any]:
    """What int8 costs a trained model; both ranges of weights."""
    from benchmarks.small_towers import Pair
    from serve.export.parity import compare_on_data
    from serve.export.quantise import quantize
    from serve.export.towers import write_onnx

    encoder, found = load_encoder(model, device="cpu"), {}
    for name, reduce_range in (("8 bits", False), ("7 bits", True)):
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(encoder, Path(folder))
            quantize(Path(folder), reduce_range=reduce_range)
            report = compare_on_data(encoder, Pair(Path(folder)), [data], limit=limit)  # pyright: ignore
        sides = [report[side] for side in ("image_to_text", "text_to_image")]
        found[name] = {
            "recall@1": round(min(side["recall@1"] for side in sides), 4),
            "drop": round(max(side["drop"] for side in sides), 4),
            "agreement": round(min(side["agreement"] for side in sides), 4),
            "same_picture": round(min(side["same_picture"] for side in sides), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trained", help="a trained model, for int8's recall")
    parser.add_argument("--data", help="its held-out shards")
    parser.add_argument("--limit", type=int, default=600, help="pictures of them")
    parser.add_argument("--requests", type=int, default=320, help="requests of one load")
    parser.add_argument("--pairs", type=int, default=7, help="paired runs")
    parser.add_argument(
        "--heavier", default="ViT-B-32", help="an open_clip name, served beside; `none` leaves it out"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=32, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve:
        serve(args.serve, args.batch)
        return
    if bool(args.trained) != bool(args.data):
        parser.error("--trained and --data belong together")
    with tempfile.TemporaryDirectory() as name:
        encoder = small_encoder()
        model = str(encoder.save(Path(name) / "model"))
        served = serving(model, encoder, args.requests, args.pairs)
    heavier = None
    if args.heavier != "none":
        torch.manual_seed(0)
        other = load_encoder(args.heavier, device="cpu")
        with tempfile.TemporaryDirectory() as name:
            heavier = serving(str(other.save(Path(name) / "model")), other, max(64, args.requests // 5), 3)
        del other
    exported = towers(max(args.pairs, 7))
    int8 = recall_drop(args.trained, args.data, args.limit) if args.trained else None
    worse = min(ROUTES, key=lambda route: served[route]["ratio"])
    result = {
        "benchmark": "serving",
        "throughput_ratio_32_clients": served[worse]["ratio"],
        "p95_ratio": served[worse]["p95_ratio"],
        "overhead_p50_ms": served["overhead"]["p50_ms"],
        "onnx_fp32_speedup": exported["fp32_speedup"][0],
        "int8_speedup": exported["int8_speedup"][0],
        "int8_recall_drop": int8["8 bits"]["drop"] if int8 else None,
        "cosine_fp32": exported["fp32_cosine"],
        "served": served,
        "heavier": heavier and {"model": args.heavier, **heavier},
        "exported": exported,
        "int8": int8,
        "pairs": args.pairs,
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
