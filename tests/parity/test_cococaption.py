"""Our caption metrics beside pycocoevalcap's pure Python classes, on tokenised texts."""

from __future__ import annotations

import contextlib
import io
import random
from collections import defaultdict
from pathlib import Path

import pytest

from finetune import metrics, ptb

FIXTURE = Path(__file__).parent.parent / "fixtures" / "ptb_tokens.tsv"
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


def test_hard_corpus():
    """Everything that breaks a scorer: odd characters, no words at all, runs of one word, very long and very short."""
    lines = [line.split("\t")[1] for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
    lines += [
        "",
        "",
        "a",
        "a a a a a a a a",
        "the " * 180 + "end",
        " ".join(f"w{number}" for number in range(300)),
    ]
    lines += ["日本 語 日本 語", "é é é", "a b a b a b a b a b", "b a b a b a"]
    rng = random.Random(5)
    candidates = lines + [rng.choice(lines) for _ in range(100)]
    references = []
    for candidate in candidates:
        words = candidate.split()
        row = rng.sample(lines, rng.randint(0, 5))
        if words and rng.random() < 0.8:
            row.append(" ".join(rng.sample(words, len(words))))  # the same words in another order
            row.append(" ".join(words[: len(words) // 2 + 1]))
        references.append(row or [candidate])
    compare(candidates, references)


def test_cider_with_frequencies_of_another_corpus():
    """Fixed document frequencies, as for a reward, against pycocoevalcap's scorer that is given the same."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices("abcdef", k=rng.randint(1, 9)))

    training = [[text() for _ in range(3)] for _ in range(40)]
    # One row more than training has: no document frequency can be taken for the size of this set.
    candidates, references = [text() for _ in range(41)], [[text() for _ in range(4)] for _ in range(41)]
    scorer = CiderScorer()
    for candidate, row in zip(candidates, references, strict=True):
        scorer += (candidate, row)

    def frequencies_of_training() -> None:
        other = CiderScorer()
        for row in training:
            other += (None, row)
        other.compute_doc_freq()
        scorer.document_frequency = other.document_frequency

    # The scorer counts its own set in any case; hand it the other corpus' counts and size in that place.
    scorer.compute_doc_freq = frequencies_of_training  # pyright: ignore
    frequencies = metrics.DocumentFrequencies.of(training, "training captions")
    ours, each = metrics.cider(candidates, references, frequencies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pycocoevalcap.cider.cider_scorer.np.log", log_of_size(len(candidates), len(training)))
        frequencies_of_training()
        expected = scorer.compute_cider()
    assert each == pytest.approx([float(score) for score in expected], abs=1e-9)
    assert ours == pytest.approx(float(sum(expected) / len(expected)), abs=1e-9)


def log_of_size(size: int, instead: int):
    """np.log, but that of one corpus' size becomes that of another's."""
    import numpy as np

    exact = np.log
    return lambda value: exact(float(instead)) if value == float(size) else exact(value)
