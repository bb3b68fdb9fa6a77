"""From raw samples to rows and batches: what `data.stream.PairStream` is given for training and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.faults import Fault
from data.samples import RawSample, is_text
from data.transforms import EvalTransform, TrainTransform, decode_image
from finetune.fusion.recipe import ChooseTask, MatchTask
from finetune.recipe_task import CaptionTask, MixedTask, Task, VqaTask
from finetune.rows import Rows, Turn
from finetune.text import Pair, make_pair, pack, token_ids


@dataclass(frozen=True)
class Question:
    """One question of a sample, as the shard's JSON has it.

    Attributes:
        id: Its `question_id`, unique in the set; made from the key and place when the JSON has none.
        text: The question.
        answers: The humans' answers, usually ten.
        kinds: `answer_type` and `question_type`, where the JSON has them.
    """

    id: Any
    text: str
    answers: list[str]
    kinds: dict[str, str]

    @property
    def majority(self) -> str:
        """The most frequent answer, the first of equally frequent ones."""
        return Counter(self.answers).most_common(1)[0][0]


class Both(NamedTuple):
    """Captions and questions of a sample, either of which may be none."""

    captions: list[str]
    questions: list[Question]


def read_captions(sample: RawSample) -> list[str]:
    """The captions of a sample.

    Raises:
        Fault: `missing_caption`.
    """
    captions = sample.captions()
    if not captions:
        raise Fault("missing_caption", "no caption in KEY.json and no text in KEY.txt")
    return captions


def read_questions(sample: RawSample) -> list[Question]:
    """The questions of a sample.

    Raises:
        Fault: `missing_question` or `bad_question` (no text, or no answers).
    """
    entries = sample.record.get("questions")
    if not entries:
        raise Fault("missing_question", "no `questions` in KEY.json")
    questions = []
    for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        text = entry.get("question") if isinstance(entry, dict) else None
        found = entry.get("answers") if isinstance(entry, dict) else None
        answers: list[Any] = [
            answer.get("answer") if isinstance(answer, dict) else answer
            for answer in (found if isinstance(found, list) else ())
        ]
        if not isinstance(text, str) or not text.strip() or not is_text(text):
            raise Fault("bad_question", f"question {place} is empty or no text: {entry!r}"[:200])
        if not answers or not all(
            isinstance(answer, str) and answer.strip() and is_text(answer) for answer in answers
        ):
            raise Fault(
                "bad_question", f"question {place} has no answers, or one that is no text: {entry!r}"[:200]
            )
        kinds = {
            name: entry[name] for name in ("answer_type", "question_type") if isinstance(entry.get(name), str)
        }
        questions.append(
            Question(entry.get("question_id", f"{sample.key}/{place}"), text.strip(), answers, kinds)
        )
    return questions


def read_texts(task: Task, sample: RawSample) -> Any:
    """What a task learns from and judges by: captions, questions, or a post with its label.

    Raises:
        Fault: There is nothing of that kind, or it is broken.
    """
    if isinstance(task, CaptionTask | MatchTask):
        return read_captions(sample)
    if isinstance(task, VqaTask | ChooseTask):
        return read_questions(sample)
    if isinstance(task, MixedTask):
        both = Both(sample.captions(), read_questions(sample) if sample.record.get("questions") else [])
        if not both.captions and not both.questions:
            raise Fault("missing_text", "neither a caption nor questions")
        return both
    from finetune.fusion.samples import read_post

    return read_post(task, sample)


class TextRow(NamedTuple):
    """The texts of a sample: those the task is about, and others, which the vocabulary should hold as well."""

    judged_by: Any
    others: list[str]


@dataclass(frozen=True)
class TextLoad:
    """All texts of a sample, for the tokenizer and the baselines; see `read_texts`."""

    task: Task

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> TextRow:
        others = sample.captions() if isinstance(self.task, VqaTask) else []
        if isinstance(self.task, CaptionTask) and sample.record.get("questions"):
            others = [
                text for question in read_questions(sample) for text in (question.text, question.majority)
            ]
        return TextRow(read_texts(self.task, sample), others)


@dataclass(frozen=True)
class TrainLoad:
    """A picture with the texts to learn.

    Attributes:
        task: Caption: one caption, drawn anew each epoch. VQA: `questions` of the sample's questions, likewise. Mixed:
            both, as far as the sample has them.
        tokenizer: The language model's.
        room: Tokens that prompt and answer may have.
        transform: Of the picture; None where its tokens are kept, so that nothing is decoded.
    """

    task: Task
    tokenizer: Any
    room: int
    transform: EvalTransform | TrainTransform | None

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> tuple[Tensor | None, list[Pair]]:
        if isinstance(self.task, CaptionTask):
            captions = read_captions(sample)
            texts = [(self.task.prompt, captions[rng.integers(len(captions))])]
        elif isinstance(self.task, MixedTask):
            both: Both = read_texts(self.task, sample)
            texts = self.draw(self.task.vqa, both.questions, rng)
            if both.captions:
                drawn = both.captions[rng.integers(len(both.captions))]
                texts = [(self.task.caption.prompt, drawn), *texts]
        else:
            assert isinstance(self.task, VqaTask), "posts have a load of their own"
            texts = self.draw(self.task, read_questions(sample), rng)
        pairs = [make_pair(self.tokenizer, prompt, answer) for prompt, answer in texts]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        if longest > self.room:
            raise Fault("text_too_long", f"{longest} tokens, the language model has room for {self.room}")
        image = None if self.transform is None else self.transform(decode_image(sample.image), rng)
        return image, pairs

    @staticmethod
    def draw(task: VqaTask, questions: list[Question], rng: np.random.Generator) -> list[tuple[str, str]]:
        chosen = rng.permutation(len(questions))[: task.questions]
        texts = []
        for place in chosen:
            question = questions[place]
            answers = question.answers
            answer = question.majority if task.target == "majority" else answers[rng.integers(len(answers))]
            texts.append((task.prompt.format(question=question.text), answer))
        return texts


@dataclass(frozen=True)
class TrainCollate:
    """Stack pictures and pack the texts of a batch.

    The batch: `images` uint8 `(b, 3, h, w)` (absent where the tokens are kept), and `image_of_text` int64 `(n,)` with
    what `finetune.text.pack` makes; or, with `rows`, what `Rows.pack` makes.
    """

    pad: int
    size: tuple[int, int]
    pictures: bool = True
    rows: Rows | None = None

    def __call__(self, rows: list[tuple[Tensor | None, list[Pair]]]) -> dict[str, Any]:
        turns = [Turn(picture, pair) for picture, (_, pairs) in enumerate(rows) for pair in pairs]
        if self.rows is not None:
            batch: dict[str, Any] = self.rows.pack(turns, self.pad)
        else:
            batch = {**pack([turn.pair for turn in turns], self.pad)}
            batch["image_of_text"] = torch.tensor([turn.picture for turn in turns], dtype=torch.int64)  # (n,)
        if self.pictures:
            batch["images"] = stack([image for image, _ in rows if image is not None], self.size)
        return batch


@dataclass(frozen=True)
class EvalLoad:
    """A picture with all that it is judged by; the file itself too for the first ones, to be shown."""

    task: Task
    transform: EvalTransform
    shown: int = 0
    tokenizer: Any = None
    room: int | None = None
    """Tokens of the longest question that can be answered; a longer one is a fault, and not the end of a run."""

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> dict[str, Any]:
        judged = read_texts(self.task, sample)
        asking = self.task.vqa if isinstance(self.task, MixedTask) else self.task
        if self.room is not None and isinstance(asking, VqaTask):
            questions: list[Question] = judged.questions if isinstance(judged, Both) else judged
            prompts = [asking.prompt.format(question=question.text) for question in questions]
            longest = max((len(token_ids(self.tokenizer, prompt)) for prompt in prompts), default=0)
            if longest > self.room:
                raise Fault(
                    "text_too_long",
                    f"a question of {longest} tokens, the language model has room for {self.room}",
                )
        return {
            "key": sample.key,
            "image_id": sample.record.get("image_id", sample.key),
            "index": sample.index,
            "image": self.transform(decode_image(sample.image)),
            "file": sample.image if sample.index < self.shown else None,
            "judged_by": judged,
        }


@dataclass(frozen=True)
class EvalCollate:
    """Pictures stacked, everything else as it is."""

    size: tuple[int, int]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = stack([row.pop("image") for row in rows], self.size)
        return {"images": images, "rows": rows}


def stack(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    """uint8 `(b, 3, h, w)`, also for none."""
    return torch.stack(images) if images else torch.zeros((0, 3, *size), dtype=torch.uint8)


@dataclass(frozen=True)
class ImageLoad:
    """Only the picture."""

    transform: Callable[[Tensor], Tensor]

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> Tensor:
        return self.transform(decode_image(sample.image))


@dataclass(frozen=True)
class ImageCollate:
    """Only pictures."""

    size: tuple[int, int]

    def __call__(self, rows: list[Tensor]) -> dict[str, Any]:
        return {"images": stack(rows, self.size)}
