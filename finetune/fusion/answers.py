"""What choosing answers from a list asks of the trainer; judged as any other answers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from finetune.baselines import QuestionOnly
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ChooseTask
from finetune.questions import Questions, Row
from finetune.samples import Question
from finetune.vqa_accuracy import normalise, question_accuracy


class Choosing(Questions):
    """Answers from a list, judged by VQA accuracy beside the best that the list allows and the question alone."""

    task: ChooseTask

    def __init__(self, task: ChooseTask):
        super().__init__(task)
        self.labels: tuple[str, ...] = ()
        self.shares: tuple[float, ...] = ()
        """Of the training questions, how many each answer of the list is right for."""

    @property
    def class_weights(self) -> list[float]:
        return [1.0] * len(self.labels)

    def learn(self, texts: Iterable[list[Question]]) -> None:
        """Make the list: the most frequent majority answers, normalised.

        Raises:
            ValueError: Fewer than two answers are left.
        """
        rows = list(texts)
        self.blind = QuestionOnly(question for row in rows for question in row)
        counts = Counter(normalise(question.majority) for row in rows for question in row)
        counts.pop("", None)  # "a" and "the" are nothing once they are normalised
        frequent = sorted((-times, name) for name, times in counts.items() if times >= self.task.occurrences)
        self.labels = tuple(name for _, name in frequent[: self.task.answers])
        self.shares = tuple(counts[name] / counts.total() for name in self.labels)
        if len(self.labels) < 2:
            raise ValueError(
                f"{len(self.labels)} of {len(counts)} training answers are right for at least "
                f"{self.task.occurrences} questions: expected two or more; lower task.occurrences"
            )

    def write(self, model: FusionClassifier, images: Tensor, rows: list[Row]) -> None:
        pictures = [place for place, row in enumerate(rows) for _ in row["judged_by"]]
        questions = [question.text for row in rows for question in row["judged_by"]]
        both = iter(model.scores(images, questions, pictures).argmax(dim=1).tolist())
        for row in rows:
            row["written"] = [model.labels[next(both)] for _ in row["judged_by"]]
        if not self.task.modality_dropout:
            return  # what stands for a missing picture has not trained: an answer from it would mean nothing
        blind: Any = [None] * len(questions)
        alone = iter(model.scores(blind, questions).argmax(dim=1).tolist())
        for row in rows:
            row["unseen"] = [model.labels[next(alone)] for _ in row["judged_by"]]

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        mode, known = self.task.accuracy, set(self.labels)
        questions: list[Question] = [question for row in rows for question in row["judged_by"]]
        unseen = [text for row in rows for text in row.get("unseen", ())]
        reachable = [
            max(
                (question_accuracy(text, q.answers, mode) for text in set(map(normalise, q.answers)) & known),
                default=0.0,
            )
            for q in questions
        ]
        alone = {}
        if unseen:
            scores = [
                question_accuracy(text, q.answers, mode) for text, q in zip(unseen, questions, strict=True)
            ]
            alone = {"text_only": sum(scores) / len(scores)}
        return {
            **super().score(rows),
            **alone,
            "answers": len(self.labels),
            "reachable": sum(reachable) / len(reachable),
        }
