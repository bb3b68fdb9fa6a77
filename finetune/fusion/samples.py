"""Pictures with texts: posts with labels, questions with how right each answer is, captions right and wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.faults import Fault
from data.samples import RawSample
from data.transforms import EvalTransform, TrainTransform, decode_image
from finetune.fusion.recipe import ChooseTask, ClassifyTask, MatchTask
from finetune.samples import Question, read_captions, read_questions, stack
from finetune.text import IGNORED
from finetune.vqa_accuracy import normalise

MATCHES = ("no match", "match")


class Post(NamedTuple):
    """A sample's text and label (labels, in the order of the JSON, where there may be several); None without."""

    text: str | None
    label: Any


def read_post(task: ClassifyTask, sample: RawSample) -> Post:
    """The text and label of a sample.

    Raises:
        Fault: `bad_text` or `bad_label`: there, but no text; or `unknown_label`: not one of `task.labels`.
    """
    text, label = sample.record.get(task.text_key), sample.record.get(task.label_key)
    if text is not None and not isinstance(text, str):
        raise Fault("bad_text", f"{task.text_key} should be a text, got {text!r}"[:200])
    if label is not None:
        label = read_labels(task, label)
    named = () if label is None else label if task.several else (label,)
    for name in named:
        if task.labels and name not in task.labels:
            raise Fault("unknown_label", f"{name!r} is none of {', '.join(task.labels)}"[:200])
    return Post(text.strip() if text and text.strip() else None, label)


def read_labels(task: ClassifyTask, value: Any) -> Any:
    """A JSON value as one label, or as a tuple of labels where there may be several."""
    if task.several and isinstance(value, str):
        value = [part.strip() for part in value.split(task.separator) if part.strip()]
    entries = value if task.several and isinstance(value, list) else [value]
    entries = [
        str(entry) if isinstance(entry, int) else entry for entry in entries
    ]  # class numbers, true, false
    if not all(isinstance(entry, str) and entry.strip() for entry in entries):
        wanted = "a list of texts" if task.several else "a text or a whole number"
        raise Fault("bad_label", f"{task.label_key} should be {wanted}, got {value!r}"[:200])
    return tuple(dict.fromkeys(entries)) if task.several else entries[0]


class Text(NamedTuple):
    """One text to a picture: its tokens int64 `(m,)`, whether it is missing, and what is to be learnt of it."""

    tokens: Tensor
    missing: bool
    target: Any


@dataclass(frozen=True)
class PostLoad:
    """A picture, the tokens of its text, and the number of its label (a row of 0 and 1 where there may be several).

    Attributes:
        task: With the labels filled in.
        tokenize: Texts to int64 `(n, m)`.
        transform: Of the picture; None where its features are kept, so that nothing is decoded.
    """

    task: ClassifyTask
    tokenize: Any
    transform: EvalTransform | TrainTransform | None

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> tuple[Tensor | None, list[Text]]:
        post = read_post(self.task, sample)
        return picture(self.transform, sample, rng), [
            Text(self.tokenize([post.text or ""])[0], post.text is None, self.target(post.label))
        ]

    def target(self, label: Any) -> Any:
        names = self.task.labels
        if not self.task.several:
            return IGNORED if label is None else names.index(label)
        if label is None:
            return torch.full((len(names),), float(IGNORED))
        return torch.tensor([float(name in label) for name in names])


def soft_target(answers: Sequence[str], place: Mapping[str, int]) -> Tensor:
    """The VQA accuracy of every answer of a list: float `(answers,)`.

    Args:
        answers: The humans' answers to one question.
        place: Number of each answer of the list, by its normalised text.

    Returns:
        With ten humans 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 and more who agree; the same for any number of humans,
        but that a single human counts whole (leaving that one out, none would be left).
    """
    counts, total = Counter(map(normalise, answers)), len(answers)
    target = torch.zeros(len(place))
    for answer, agree in counts.items():
        if answer in place:
            without = (total - agree) * min(1.0, agree / 3) + agree * min(1.0, (agree - 1) / 3)
            target[place[answer]] = without / total if total > 1 else 1.0
    return target


@dataclass(frozen=True)
class QuestionLoad:
    """A picture, the tokens of some of its questions, and how right each answer of the list is.

    Attributes:
        task: How many questions.
        place: Number of each answer, see `soft_target`.
        tokenize: Texts to int64 `(n, m)`.
        transform: Of the picture, or None.
    """

    task: ChooseTask
    place: dict[str, int]
    tokenize: Any
    transform: EvalTransform | TrainTransform | None

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> tuple[Tensor | None, list[Text]]:
        questions: list[Question] = read_questions(sample)
        chosen = [questions[number] for number in rng.permutation(len(questions))[: self.task.questions]]
        tokens = self.tokenize([question.text for question in chosen])
        return picture(self.transform, sample, rng), [
            Text(row, False, soft_target(question.answers, self.place))
            for row, question in zip(tokens, chosen, strict=True)
        ]


@dataclass(frozen=True)
class MatchLoad:
    """A picture with one of its captions drawn; the target is all of them, by which `MatchCollate` knows wrong ones.

    Attributes:
        tokenize: Texts to int64 `(n, m)`.
        transform: Of the picture, or None.
    """

    tokenize: Any
    transform: EvalTransform | TrainTransform | None

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> tuple[Tensor | None, list[Text]]:
        captions = read_captions(sample)
        drawn = captions[rng.integers(len(captions))]
        return picture(self.transform, sample, rng), [
            Text(self.tokenize([drawn])[0], False, (drawn, frozenset(captions)))
        ]


def picture(
    transform: EvalTransform | TrainTransform | None, sample: RawSample, rng: np.random.Generator
) -> Tensor | None:
    """The pixels of a sample; None where its features are kept."""
    return None if transform is None else transform(decode_image(sample.image), rng)


def wrong_captions(rows: Sequence[tuple[str, frozenset[str]]], each: int) -> list[list[int]]:
    """For each picture the numbers of up to `each` other pictures whose caption is none of its own.

    The next ones in the row are taken, so that every caption serves about as often wrong as right.
    """
    found = []
    for number, (_, own) in enumerate(rows):
        others = ((number + step) % len(rows) for step in range(1, len(rows)))
        found.append([other for other in others if rows[other][0] not in own][:each])
    return found


@dataclass(frozen=True)
class FusionCollate:
    """Stack a batch of pictures with any number of texts each.

    The batch: `text` int64 `(k, m)`, each different one once (templates, and captions that are right here and wrong
    there), `text_of` int64 `(n,)`, which one a sample has, `text_missing` bool `(n,)`, `image_of_text` int64 `(n,)`,
    `labels` int64 `(n,)` or float `(n, labels)`, and `images` uint8 `(b, 3, h, w)` (absent where features are kept).

    Attributes:
        size: Of the pictures.
        pictures: Whether there are any.
        negatives: Wrong captions for each right one; the targets are then those of `MatchLoad`. 0 for other tasks.
    """

    size: tuple[int, int]
    pictures: bool = True
    negatives: int = 0

    def __call__(self, rows: list[tuple[Tensor | None, list[Text]]]) -> dict[str, Any]:
        owners = [number for number, (_, texts) in enumerate(rows) for _ in texts]
        texts = [text for _, row in rows for text in row]
        if self.negatives and texts:
            others = wrong_captions([text.target for text in texts], self.negatives)
            texts, owners = zip(
                *(
                    (text._replace(target=target), number)
                    for number, own in enumerate(texts)
                    for text, target in [(own, 1), *((texts[other], 0) for other in others[number])]
                ),
                strict=True,
            )
        targets = [torch.as_tensor(text.target) for text in texts]
        tokens = (
            torch.stack([text.tokens for text in texts]) if texts else torch.zeros((0, 1), dtype=torch.int64)
        )
        different, text_of = torch.unique(tokens, dim=0, return_inverse=True)
        batch: dict[str, Any] = {
            "text": different,
            "text_of": text_of,
            "text_missing": torch.tensor([text.missing for text in texts], dtype=torch.bool),
            "image_of_text": torch.tensor(owners, dtype=torch.int64),
            "labels": torch.stack(targets) if targets else torch.zeros(0, dtype=torch.int64),
        }
        if self.pictures:
            batch["images"] = stack([image for image, _ in rows if image is not None], self.size)
        return batch


def make_load(
    task: ClassifyTask | ChooseTask | MatchTask,
    labels: Sequence[str],
    tokenize: Any,
    transform: EvalTransform | TrainTransform | None,
) -> PostLoad | QuestionLoad | MatchLoad:
    """What reads the training samples of a task."""
    if isinstance(task, ClassifyTask):
        return PostLoad(task.model_copy(update={"labels": tuple(labels)}), tokenize, transform)
    if isinstance(task, ChooseTask):
        return QuestionLoad(task, {name: place for place, name in enumerate(labels)}, tokenize, transform)
    return MatchLoad(tokenize, transform)
