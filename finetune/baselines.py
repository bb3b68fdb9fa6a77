"""What a result has to beat: answers that never look at the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from finetune import ptb
from finetune.samples import Question
from finetune.vqa_accuracy import normalise


def most_frequent_caption(captions: Iterable[str]) -> str:
    """The training caption that occurs most often, captions of equal tokens taken together.

    Raises:
        ValueError: No captions.
    """
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for caption in captions:
        tokens = ptb.tokenize(caption)
        first.setdefault(tokens, caption)
        counts[tokens] += 1
    if not counts:
        raise ValueError("no training captions: expected at least one")
    return first[counts.most_common(1)[0][0]]


class QuestionOnly:
    """Answers a question without its picture, from the training set.

    The most frequent training answer to the very same question; to one never seen, that of the longest run of first
    words that was (down to none: the majority answer of the whole set). On questions made from a few templates this
    is as good as language alone can get; on human questions a trained language model gains a few points more.

    Args:
        questions: The training questions.

    Raises:
        ValueError: No questions.
    """

    def __init__(self, questions: Iterable[Question]):
        counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for question in questions:
            words = self.words(question.text)
            for length in range(len(words) + 1):
                counts[words[:length]][question.majority] += 1
        if not counts:
            raise ValueError("no training questions: expected at least one")
        self.best = {start: answers.most_common(1)[0][0] for start, answers in counts.items()}

    @staticmethod
    def words(question: str) -> tuple[str, ...]:
        # The end is a word of its own, so that a question is not taken for the start of a longer one.
        return (*normalise(question).split(), "?")

    @property
    def majority(self) -> str:
        """The most frequent answer of the whole training set."""
        return self.best[()]

    def answer(self, question: str) -> str:
        """The likeliest answer, without looking."""
        words = self.words(question)
        return next(
            self.best[words[:length]] for length in range(len(words), -1, -1) if words[:length] in self.best
        )
