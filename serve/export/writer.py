"""An exported captioner or VQA model on a machine without torch: the same few libraries as `serve.export.runtime`.

from serve.export.writer import EdgeWriter

EdgeWriter("exported").caption(["cat.jpg"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.export.runtime import GRAPHS, Picture, as_pixels, read_card


class EdgeWriter:
    """A folder that `pairstream export --captioner` or `--vqa` wrote, ready to write, greedily.

    Each token is a pass over picture and text so far. Nothing is kept between passes, so that n tokens cost about
    n / 2 times the work of a cache: right for captions and answers of ten words, and not for stories.

    Args:
        folder: What was exported.
        threads: Threads of the runtime; 0 lets it choose.

    Attributes:
        card: Content of export.json.

    Raises:
        FileNotFoundError: No export there.
        ValueError: An export of another version, or of another kind of model.
        ImportError: The runtime is not installed.

    Example:
        >>> EdgeWriter("exported").caption(["cat.jpg"])                            # doctest: +SKIP
        ['a cat next to two red hearts']
    """

    def __init__(self, folder: str | Path, *, threads: int = 0):
        from tokenizers import Tokenizer

        self.folder = Path(folder)
        self.card = read_card(self.folder, "writer")
        self.preprocess_cfg: dict[str, Any] = self.card["preprocess"]
        self.text: dict[str, Any] = self.card["text"]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        load = GRAPHS[self.card["runtime"]]
        self.see, self.next = (load(self.folder, name, threads) for name in ("prefix", "next"))

    def caption(self, images: np.ndarray | Sequence[Picture]) -> list[str]:
        """A caption for each picture.

        Args:
            images: PIL images, files' bytes or paths; or uint8 `(b, 3, h, w)` of the model's size.

        Raises:
            ValueError: The model answers questions.
        """
        if self.text["task"] != "caption":
            raise ValueError(f"{self.folder} answers questions: use answer(images, questions)")
        pixels = as_pixels(images, self.preprocess_cfg)
        return self.write(self.see(pixels), self.text["prompt"])

    def answer(self, images: np.ndarray | Sequence[Picture], questions: Sequence[str]) -> list[str]:
        """An answer to one question about each picture.

        Args:
            images: As for `caption`.
            questions: As many.

        Raises:
            ValueError: The model writes captions, numbers differ, or a question is empty or too long.
        """
        if self.text["task"] != "vqa":
            raise ValueError(f"{self.folder} writes captions: use caption(images)")
        if isinstance(questions, str) or len(images) != len(questions):
            raise ValueError(
                f"got {len(images)} pictures and {questions!r}: expected one question for each picture"
            )
        if not all(question.strip() for question in questions):
            raise ValueError("an empty question cannot be answered: expected some words")
        prefix = self.see(as_pixels(images, self.preprocess_cfg))
        return [
            self.write(row[None], self.text["prompt"].format(question=question.strip()))[0]
            for row, question in zip(prefix, questions, strict=True)
        ]

    def predict(
        self, images: np.ndarray | Sequence[Picture], questions: Sequence[str] | None = None
    ) -> list[str]:
        """`caption(images)`, or `answer(images, questions)` where questions are given."""
        return self.caption(images) if questions is None else self.answer(images, questions)

    def write(self, prefix: np.ndarray, prompt: str) -> list[str]:
        """Continue one prompt after each picture.

        Args:
            prefix: float32 `(b, prefix_length, width)`.
            prompt: The same for all, possibly empty.

        Raises:
            ValueError: The prompt, with picture and room to write, is longer than the language model's context.
        """
        start = self.tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        limit, context = self.text["max_new_tokens"], self.text["context"]
        if prefix.shape[1] + len(start) + limit > context:
            raise ValueError(
                f"the prompt does not fit: {prefix.shape[1]} positions for the picture + {len(start)} for the prompt + "
                f"{limit} to write, the language model has {context}"
            )
        ids = np.tile(np.array(start, dtype=np.int64), (len(prefix), 1))
        written = np.full((len(prefix), limit), self.text["end"], dtype=np.int64)
        going = np.ones(len(prefix), dtype=bool)
        for place in range(limit):
            token = self.next(prefix, ids).argmax(axis=1)
            written[going, place] = token[going]
            going &= token != self.text["end"]
            if not going.any():
                break
            ids = np.concatenate([ids, token[:, None]], axis=1)
        rows = [
            row[: list(row).index(self.text["end"])] if self.text["end"] in row else row for row in written
        ]
        return [self.tokenizer.decode(list(row), skip_special_tokens=True).strip() for row in rows]
