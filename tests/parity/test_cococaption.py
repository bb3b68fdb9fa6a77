"""Our caption metrics beside pycocoevalcap's pure Python classes, on tokenised texts."""

from __future__ import annotations

import contextlib
import io
import random
from collections import defaultdict
from pathlib import Path

import pytest

from finetune import metrics, ptb

pytestmark = pytest.mark.parity
pytest.importorskip("pycocoevalcap")


def compare(candidates: list[str], references: list[list[str]]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = dict(enumerate(references))
    result = {number: [candidate] for number, candidate in enumerate(candidates)}
    with contextlib.redirect_stdout(io.StringIO()):
        expected_bleu = Bleu(4).compute_score(truth, result)[0]
        expected_rouge = Rouge().compute_score(truth, result)[0]
        expected_cider, expected_each = Cider().compute_score(truth, result)
    assert metrics.bleu(candidates, references) == pytest.approx(expected_bleu, abs=1e-9)
    assert metrics.rouge_l(candidates, references) == pytest.approx(expected_rouge, abs=1e-9)
    ours, each = metrics.cider(candidates, references)
    assert ours == pytest.approx(expected_cider, abs=1e-9)
    assert each == pytest.approx(list(expected_each), abs=1e-9)


def test_real_captions(shared: Path):
    captions = defaultdict(list)
    for line in (shared / "flickr8k" / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        key, caption = line.split("\t")
        captions[key.split("#")[0]].append(ptb.tokenize(caption))
    rows = list(captions.values())[:400]
    compare([row[0] for row in rows], [row[1:] for row in rows])
    shifted = [row[0] for row in rows[1:] + rows[:1]]  # captions of the wrong picture
    compare(shifted, [row[1:] for row in rows])


@pytest.mark.parametrize("seed", range(6))
def test_random_captions(seed: int):
    rng = random.Random(seed)
    words = list("abcdefgh")

    def text(least: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, 12)))

    images = rng.choice([1, 2, 30])
    candidates = [text(0) for _ in range(images)]  # an empty caption may occur
    compare(candidates, [[text(1) for _ in range(rng.randint(1, 5))] for _ in range(images)])
