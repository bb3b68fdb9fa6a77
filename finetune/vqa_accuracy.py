"""VQA accuracy in two named modes: the official script's, bit for bit, and the one it means to compute.

Public implementations of this metric differ by up to 27 points on the same answers. The causes, each reproduced by
`official` and removed by `fixed`:

- the official script normalises (articles, number words, punctuation) only when the ten answers are not all equal;
- it leaves one human out by comparing whole records, so in files without `answer_id` all equal answers are left out.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Mode = Literal["official", "fixed"]
Answer = str | Mapping[str, Any]

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The lookbehind was meant as (?<!\d): as it stands it never fails, so "5." loses its period. Kept for parity.
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
PERIODS_AT_MOST = 32  # the script hands re.UNICODE (= 32) to sub() as the count. Kept for parity.

# The apostrophes that the metric restores: every form is found by its spelling with one apostrophe left out.
CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
    "you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've "
    "somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll "
    "y'all'd've you'd've"
)
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in CONTRACTED.split()
    for place, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


@functools.lru_cache(maxsize=100_000)  # ten people give the same few answers again and again
def normalise(answer: str) -> str:
    """An answer as the metric compares it: no articles, digits for number words, little punctuation.

    Example:
        >>> normalise("The two  dogs, dont bark.")
        "2 dogs don't bark"
    """
    text = answer
    in_number = COMMA_IN_NUMBER.search(answer) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or in_number else " ")
    text = PERIOD.sub("", text, count=PERIODS_AT_MOST)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def question_accuracy(prediction: str, answers: Sequence[Answer], mode: Mode = "fixed") -> float:
    """Accuracy of one answer: min(matching humans / 3, 1), averaged over leaving each human out.

    With ten humans, k of whom agree, this is 0, .3, .6, .9, 1 for k = 0, 1, 2, 3, 4 and more.

    Args:
        prediction: The model's answer.
        answers: The humans' answers: texts, or records with the key `answer` as in the official files.
        mode: `fixed` normalises both sides always and leaves out by position. `official` does as the script:
            normalises when the answers differ, and leaves out every record equal to the one at hand (texts count as
            records with an `answer_id`).

    Returns:
        From 0 to 1.

    Raises:
        ValueError: No human answers, or an unknown mode.

    Reference:
        Antol et al. 2015, and the evaluation script of visualqa.org.

    Example:
        >>> question_accuracy("2", ["two", "two", "2", "three", "4", "5", "6", "7", "8", "9"])
        0.9
    """
    if mode not in ("official", "fixed"):
        raise ValueError(f"mode {mode!r}: expected 'official' or 'fixed'")
    if not answers:
        raise ValueError("a question without human answers cannot be judged: expected ten")
    texts = [clean(answer if isinstance(answer, str) else answer["answer"]) for answer in answers]
    guess = clean(prediction)
    differ = len(set(texts)) > 1
    if mode == "fixed" or differ:
        texts, guess = [normalise(text) for text in texts], normalise(guess)
    # Records of the official files, after normalising; a text counts as a record of its own.
    records: list[Any] = [
        (place, text) if isinstance(answer, str) else {**answer, "answer": text}
        for place, (answer, text) in enumerate(zip(answers, texts, strict=True))
    ]
    total = 0.0
    for place in range(len(texts)):
        matching = sum(
            text == guess
            for other, text in enumerate(texts)
            if (other != place if mode == "fixed" else records[other] != records[place])
        )
        total += min(1.0, matching / 3)
    return total / len(texts)


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[Answer]],
    *,
    mode: Mode = "fixed",
    types: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """VQA accuracy of a set, and by type.

    Args:
        predictions: One answer for each question.
        answers: The humans' answers to each question.
        mode: See `question_accuracy`.
        types: Labels of each question by the name of the grouping, such as `{"answer_type": [...]}`.

    Returns:
        `accuracy` (0 to 1), `questions`, `mode`, and `by_NAME` for each grouping.

    Raises:
        ValueError: Numbers of rows differ, or no questions.
    """
    if len(predictions) != len(answers):
        raise ValueError(
            f"got {len(predictions)} predictions for {len(answers)} questions: each needs exactly one"
        )
    if not answers:
        raise ValueError("no questions to judge: expected at least one")
    scores = [question_accuracy(guess, row, mode) for guess, row in zip(predictions, answers, strict=True)]
    result: dict[str, Any] = {"accuracy": sum(scores) / len(scores), "questions": len(scores), "mode": mode}
    for name, labels in (types or {}).items():
        groups: dict[str, list[float]] = defaultdict(list)
        for label, score in zip(labels, scores, strict=True):
            groups[label].append(score)
        result[f"by_{name}"] = {label: sum(group) / len(group) for label, group in sorted(groups.items())}
    return result
