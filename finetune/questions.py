"""What all models that answer questions are judged by: VQA accuracy, beside answers that never look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from finetune.baselines import QuestionOnly
from finetune.samples import Question
from finetune.vqa_accuracy import question_accuracy, vqa_accuracy
from pairstream.report import Card

Row = dict[str, Any]


class Questions:
    """Answers, judged by VQA accuracy; `written` of an evaluated row is one answer for each of its questions."""

    main = "accuracy"

    def __init__(self, task: Any):
        self.task = task
        self.blind: QuestionOnly | None = None

    def corpus(self, row: list[Question]) -> Iterator[str]:
        for question in row:
            yield question.text
            yield question.majority

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        assert self.blind is not None, "learn() comes first"
        mode = self.task.accuracy
        questions: list[Question] = [question for row in rows for question in row["judged_by"]]
        truth = [question.answers for question in questions]
        names = sorted({name for question in questions for name in question.kinds})
        types = {name: [question.kinds.get(name, "(none)") for question in questions] for name in names}
        ours = vqa_accuracy([text for row in rows for text in row["written"]], truth, mode=mode, types=types)
        majority = vqa_accuracy([self.blind.majority] * len(truth), truth, mode=mode)
        blind = vqa_accuracy(
            [self.blind.answer(question.text) for question in questions], truth, mode=mode, types=types
        )
        return {
            **ours,
            "majority_baseline": majority["accuracy"],
            "majority_answer": self.blind.majority,
            "question_only_baseline": blind["accuracy"],
            "question_only": {name: value for name, value in blind.items() if name.startswith("by_")},
            "question_only_model": "most frequent training answer to the same question, else to its first words",
            "images": len(rows),
        }

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {"question_id": question.id, "answer": text}
            for row in rows
            for question, text in zip(row["judged_by"], row["written"], strict=True)
        ]

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        from finetune.tasks import shrink

        cards = []
        for number, row in enumerate(rows):
            if not row["file"]:
                continue
            place = number % len(row["judged_by"])  # another kind of question from card to card
            question, text = row["judged_by"][place], row["written"][place]
            right = question_accuracy(text, question.answers, self.task.accuracy) >= 0.5
            lines = [f"answer: {text}"] + ([] if right else [f"humans: {question.majority}"])
            cards.append(Card(shrink(row["file"]), question.text, lines, "right" if right else "wrong"))
        return cards
