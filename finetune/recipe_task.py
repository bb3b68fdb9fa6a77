"""What a fine-tuning recipe says of the task: what is written or judged, how text is decoded, and its reward."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from finetune.fusion.recipe import ChooseTask, ClassifyTask, MatchTask
from pairstream.recipe import Config


class CaptionTask(Config):
    """Write a caption of the picture."""

    kind: Literal["caption"] = "caption"
    prompt: str = ""
    """Words before the caption; a pretrained language model may like `A photo of`."""


class VqaTask(Config):
    """Answer questions about the picture by writing the answer."""

    kind: Literal["vqa"] = "vqa"
    prompt: str = "{question}"
    """The question's place in the prompt; `Question: {question} Answer:` suits a pretrained language model."""
    questions: int = Field(default=4, ge=1)
    """Questions drawn for each picture in a step. The picture is encoded once for all of them."""
    target: Literal["majority", "sample"] = "majority"
    """Train on the most frequent human answer, or on one drawn anew each time (softer, for real humans)."""
    accuracy: Literal["official", "fixed"] = "fixed"
    """Mode of the VQA accuracy; docs/finetuning.md has the difference."""

    @field_validator("prompt")
    @classmethod
    def has_question(cls, value: str) -> str:
        try:
            names = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
        except ValueError as error:
            raise ValueError(f"not a template: {error}") from error
        if names != ["question"]:
            raise ValueError("expected exactly one {question} in the prompt")
        return value


class MixedTask(Config):
    """Captions and questions in one run; the prompts tell the model which is wanted.

    A picture of the training shards gives what it has: a caption, questions, or both.
    """

    kind: Literal["mixed"] = "mixed"
    caption: CaptionTask = CaptionTask(prompt="describe the picture:")
    vqa: VqaTask = VqaTask(prompt="question: {question} answer:")

    @model_validator(mode="after")
    def possible(self) -> MixedTask:
        if not self.caption.prompt.strip():
            raise ValueError(
                "task.caption.prompt is empty: the model could not tell a caption from an answer"
            )
        return self


Task = Annotated[
    CaptionTask | VqaTask | MixedTask | ClassifyTask | ChooseTask | MatchTask, Field(discriminator="kind")
]


class Decoding(Config):
    """How text is written."""

    num_beams: int = Field(default=1, ge=1)
    """1 is greedy; 3 to 5 give captions a few CIDEr points more at about that many times the work."""
    max_new_tokens: int = Field(default=30, ge=1)
    """Tokens written at the most, the image and prompt not counted."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Tokens written at the least."""
    length_penalty: float = 1.0
    """Beam search divides a text's log-probability by its length to this power: above 0 favours longer texts."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """No run of so many tokens is written twice; 0 allows it, 3 stops stuttering."""
    sample: bool = False
    """Draw each token instead of taking the likeliest: livelier texts, and lower scores."""
    temperature: float = Field(default=1.0, gt=0)
    """Of drawing: below 1 keeps closer to the likeliest."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of drawing: only from the likeliest tokens that have this probability together (nucleus)."""
    seed: int | None = None
    """Of drawing, in `predict`: the same picture gets the same text, in batches of any size. The recipe's when None."""

    @model_validator(mode="after")
    def possible(self) -> Decoding:
        if not self.sample and (self.temperature != 1.0 or self.top_p != 1.0):
            raise ValueError("temperature and top_p are about drawing: set sample, or leave them at 1")
        if not self.sample and self.seed is not None:
            raise ValueError("seed is about drawing: set sample, or leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
            )
        return self


class Reward(Config):
    """Self-critical training of captions after cross-entropy: drawn texts are learnt as far as they beat greedy ones.

    The reward is CIDEr-D with the document frequencies of the training captions. It raises CIDEr-D by some points and
    makes captions more alike; a step costs the writing of `samples` + 1 texts a picture.
    """

    after: int | None = Field(default=None, ge=0)
    """Optimiser steps of cross-entropy before it; None never begins."""
    samples: int = Field(default=4, ge=1)
    """Captions drawn for each picture."""
    rate: float = Field(default=0.1, gt=0)
    """Learning rate from then on, as a multiple of what the schedule has."""
