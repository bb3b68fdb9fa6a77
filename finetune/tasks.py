"""What the tasks do differently: texts to learn from, what is written, how it is judged and shown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from finetune import ptb
from finetune.baselines import QuestionOnly, most_frequent_caption
from finetune.fusion.answers import Choosing
from finetune.fusion.matching import Matching
from finetune.fusion.task import Classification
from finetune.metrics import caption_metrics
from finetune.model import VisionLanguageModel
from finetune.questions import Questions
from finetune.recipe_task import CaptionTask, MixedTask, Task, VqaTask
from finetune.samples import Both, Question
from pairstream.report import Card

# One evaluated picture: key, index, file (or None), judged_by, and `written`: one text or one for each question.
Row = dict[str, Any]


class TaskKind(Protocol):
    """What the trainer asks of a task."""

    main: str
    """The number in `metrics.json` that the task is about."""

    def learn(self, texts: Iterable[Any]) -> None:
        """Take in all training texts of the sample rows, for the baselines."""
        ...

    def corpus(self, row: Any) -> Iterator[str]:
        """A sample's texts, for the tokenizer."""
        ...

    def write(self, model: Any, images: Tensor, rows: list[Row]) -> None:
        """Fill in `written` of each row."""
        ...

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The numbers, the baselines beside them."""
        ...

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What was written, in the data set's own result format."""
        ...

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        """The wall of the report."""
        ...


class Captioning:
    """Captions, judged by CIDEr-D, BLEU and ROUGE-L."""

    main = "cider"

    def __init__(self, task: CaptionTask):
        self.task = task
        self.baseline = ""

    def corpus(self, row: list[str]) -> Iterator[str]:
        yield from row
        yield self.task.prompt

    def learn(self, texts: Iterable[list[str]]) -> None:
        self.baseline = most_frequent_caption(caption for row in texts for caption in row)

    def write(self, model: VisionLanguageModel, images: Tensor, rows: list[Row]) -> None:
        prompts = [self.task.prompt] * len(rows)
        for row, text in zip(rows, model.write(model.see(images), range(len(rows)), prompts), strict=True):
            row["written"] = text

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        references = [row["judged_by"] for row in rows]
        ours = caption_metrics([row["written"] for row in rows], references)
        baseline = caption_metrics([self.baseline] * len(rows), references)
        return {
            **ours,
            **{f"baseline_{name}": value for name, value in baseline.items()},
            "baseline_caption": self.baseline,
            "images": len(rows),
            "distinct_captions": len({row["written"] for row in rows}),
            "tokeniser": ptb.NAME,
            "df_source": "references of this evaluation",
        }

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [{"image_id": row["image_id"], "caption": row["written"]} for row in rows]

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        return [
            Card(shrink(row["file"]), row["written"], [f"human: {row['judged_by'][0]}"])
            for row in rows
            if row["file"]
        ]


class VisualQuestions(Questions):
    """Written answers, judged by VQA accuracy."""

    task: VqaTask

    def corpus(self, row: list[Question]) -> Iterator[str]:
        for question in row:
            yield self.task.prompt.format(question=question.text)
            yield question.majority

    def learn(self, texts: Iterable[list[Question]]) -> None:
        self.blind = QuestionOnly(question for row in texts for question in row)

    def write(self, model: VisionLanguageModel, images: Tensor, rows: list[Row]) -> None:
        pictures = [place for place, row in enumerate(rows) for _ in row["judged_by"]]
        prompts = [model.prompt(question.text) for row in rows for question in row["judged_by"]]
        answers = iter(model.write(model.see(images), pictures, prompts))
        for row in rows:
            row["written"] = [next(answers) for _ in row["judged_by"]]


class Mixed:
    """Captions and questions, each judged as if it were alone; the main number is the mean of both main numbers."""

    main = "mean_of_tasks"

    def __init__(self, task: MixedTask):
        self.parts: dict[str, Any] = {"caption": Captioning(task.caption), "vqa": VisualQuestions(task.vqa)}

    def rows_of(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """The rows of one task, as that task knows them."""
        place = ("caption", "vqa").index(name)
        return [
            {**row, "judged_by": row["judged_by"][place], "written": row.get("written", {}).get(name)}
            for row in rows
            if row["judged_by"][place]
        ]

    def corpus(self, row: Both) -> Iterator[str]:
        yield from self.parts["caption"].corpus(row.captions)
        yield from self.parts["vqa"].corpus(row.questions)

    def learn(self, texts: Iterable[Both]) -> None:
        rows = list(texts)
        for name, part, own in zip(self.parts, self.parts.values(), zip(*rows, strict=True), strict=True):
            if not any(own):
                raise ValueError(
                    f"no training sample has anything for the task {name}: take the other one alone"
                )
            part.learn([entry for entry in own if entry])

    def write(self, model: VisionLanguageModel, images: Tensor, rows: list[Row]) -> None:
        for row in rows:
            row["written"] = {}
        for place, (name, part) in enumerate(self.parts.items()):
            chosen = [number for number, row in enumerate(rows) if row["judged_by"][place]]
            own = self.rows_of(name, rows)
            if own:
                part.write(model, images[chosen], own)
            for number, row in zip(chosen, own, strict=True):
                rows[number]["written"][name] = row["written"]

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, part in self.parts.items():
            own = self.rows_of(name, rows)
            if not own:
                raise ValueError(f"no validation sample has anything for the task {name}: nothing to judge")
            found[name] = part.score(own)
        mains = [found[name][part.main] for name, part in self.parts.items()]
        return {**found, self.main: sum(mains) / len(mains), "images": len(rows)}

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            entry for name, part in self.parts.items() for entry in part.predictions(self.rows_of(name, rows))
        ]

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        return [card for name, part in self.parts.items() for card in part.cards(self.rows_of(name, rows))]


def make_task(task: Task) -> TaskKind:
    """The implementation of a recipe's `task`."""
    return TASKS[task.kind](task)


TASKS: dict[str, Any] = {
    "caption": Captioning,
    "vqa": VisualQuestions,
    "mixed": Mixed,
    "classify": Classification,
    "choose": Choosing,
    "match": Matching,
}


def shrink(file: bytes, side: int = 256) -> bytes:
    """An encoded picture of at most `side` pixels, as it is when it is small enough."""
    with Image.open(io.BytesIO(file)) as image:
        if max(image.size) <= side:
            return file
        small = image.convert("RGB")
        small.thumbnail((side, side))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=85)
        return out.getvalue()
