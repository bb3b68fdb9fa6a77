"""CPU time of our BLEU, ROUGE-L and CIDEr-D beside pycocoevalcap's Python scorers, on the same tokenised captions.

One human caption of each picture is judged by the other four. Both sides get texts that are already tokenised;
pycocoevalcap's own tokeniser is a Java program and not counted. `each` has the three metrics one by one, where ours
share nothing. CPU time of the process, one thread; pairs are interleaved A B B A. The results are compared first:
a difference above 1e-9 ends the benchmark.

    python benchmarks/caption_metrics.py --captions ../shared/flickr8k/Flickr8k.token.txt
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from benchmarks.timing import in_turns, spread
from finetune import metrics, ptb


def read(file: Path, images: int) -> tuple[list[str], list[list[str]]]:
    """The first caption of each picture, and its others, tokenised."""
    captions = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        key, caption = line.split("\t")
        captions[key.split("#")[0]].append(ptb.tokenize(caption))
    rows = list(captions.values())[:images]
    return [row[0] for row in rows], [row[1:] for row in rows]


def ours(candidates: list[str], references: list[list[str]]) -> list[float]:
    scores = metrics.score_tokenised(candidates, references)
    return [scores[name] for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")]


def theirs(candidates: list[str], references: list[list[str]]) -> list[float]:
    truth, result = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    with contextlib.redirect_stdout(io.StringIO()):
        scores = [*Bleu(4).compute_score(truth, result)[0]]
        scores += [Rouge().compute_score(truth, result)[0], Cider().compute_score(truth, result)[0]]
    return [float(score) for score in scores]


def paired(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> list[tuple[float, float]]:
    """CPU seconds of both, in turns."""
    with contextlib.redirect_stdout(io.StringIO()):
        return [(one.seconds, other.seconds) for one, other in in_turns(a, b, pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=Path, required=True, help="lines `picture#number TAB caption`")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    candidates, references = read(args.captions, args.images)
    truth, result = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    mine, expected = ours(candidates, references), theirs(candidates, references)
    gap = max(abs(a - b) for a, b in zip(mine, expected, strict=True))
    if gap > 1e-9:
        raise SystemExit(f"the results differ by {gap}: {mine} and {expected}")
    each = {
        "bleu": (
            lambda: metrics.bleu(candidates, references),
            lambda: Bleu(4).compute_score(truth, result),
        ),
        "rouge_l": (
            lambda: metrics.rouge_l(candidates, references),
            lambda: Rouge().compute_score(truth, result),
        ),
        "cider": (
            lambda: metrics.cider(candidates, references),
            lambda: Cider().compute_score(truth, result),
        ),
    }
    rounds = paired(lambda: ours(candidates, references), lambda: theirs(candidates, references), args.pairs)
    alone = {}
    for name, (a, b) in each.items():
        alone[name] = round(
            statistics.median(second / first for first, second in paired(a, b, args.pairs)), 2
        )
    print(
        json.dumps(
            {
                "benchmark": "caption_metrics",
                **spread([b / a for a, b in rounds], "speedup"),
                "each": alone,
                "pairs": args.pairs,
                "images": len(candidates),
                "cpu_seconds": {
                    "ours": round(statistics.median(a for a, _ in rounds), 4),
                    "pycocoevalcap": round(statistics.median(b for _, b in rounds), 4),
                },
                "largest_difference": gap,
                "machine": f"{platform.machine()}, Python {platform.python_version()}, "
                f"pycocoevalcap {version('pycocoevalcap')}",
            }
        )
    )


if __name__ == "__main__":
    main()
