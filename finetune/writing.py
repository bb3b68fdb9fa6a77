"""Writing: rows of pictures and texts, continued through transformers' own `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.utils import logging

from finetune.drawing import own_draws
from finetune.recipe_task import Decoding
from finetune.text import Pair, token_ids

Picture = Image.Image | bytes | Tensor


class Continues:
    """What a model with a connector and a language model needs to write; see `finetune.model.VisionLanguageModel`."""

    connector: Any
    language_model: Any
    tokenizer: Any
    decoding: Decoding
    device: Any
    training: bool
    prefix_length: Any
    context: Any
    train: Any
    eval: Any
    see: Any

    def write(
        self,
        seen: Tensor,
        image_of_text: Sequence[int],
        prompts: Sequence[str],
        decoding: Decoding | None = None,
        *,
        use_cache: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Continue prompts after their pictures; see `continue_rows`.

        Args:
            seen: What `see` made of the pictures, `(b, p, width)`.
            image_of_text: Each prompt's picture.
            prompts: Texts, possibly empty.
            decoding: How; the model's own when None.
            use_cache: Keep keys and values of earlier positions. Off (greedy alone) gives the same text, more slowly.
            seeds: Of drawing, one a prompt; see `continue_rows`.

        Returns:
            One text a prompt.

        Raises:
            ValueError: A prompt, with picture and room to write, is longer than the context.
        """
        rows = [
            [picture, token_ids(self.tokenizer, prompt)]
            for picture, prompt in zip(image_of_text, prompts, strict=True)
        ]
        return self.continue_rows(seen, rows, decoding, use_cache=use_cache, seeds=seeds)

    def write_after(
        self,
        examples: Sequence[tuple[Picture, Pair]],
        images: Sequence[Picture],
        prompts: Sequence[str],
        decoding: Decoding | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Continue a prompt after each picture, with the same examples in front of all; see `continue_rows`.

        Args:
            examples: Pictures with prompt and answer, which stand there as in training (`shots`).
            images: Pictures.
            prompts: As many texts, possibly empty.
            decoding: How; the model's own when None.
            seeds: Of drawing, one a picture.
        """
        seen = self.see(images)
        if not examples:
            return self.write(seen, range(len(images)), prompts, decoding, seeds=seeds)
        first: list[int | list[int]] = []
        for place, (_, (prompt, answer)) in enumerate(examples):
            first += [place, [*prompt, *answer]]
        rows = [
            [*first, len(examples) + place, token_ids(self.tokenizer, prompt)]
            for place, prompt in enumerate(prompts)
        ]
        both = torch.cat([self.see([picture for picture, _ in examples]), seen])
        return self.continue_rows(both, rows, decoding, seeds=seeds)

    def complete(
        self, rows: Sequence[Sequence[Picture | str]], decoding: Decoding | None = None
    ) -> list[str]:
        """Continue rows of pictures and texts in turns, such as examples in front of a question (few-shot prompts).

        Args:
            rows: Each a list of PIL images or file contents, and texts, in their order.
            decoding: How; the model's own when None.

        Returns:
            One text a row.

        Raises:
            ValueError: An empty row, or one longer than the context.
            data.faults.Fault: File contents that are no picture.

        Example:
            >>> model.complete([[cat, "a cat. ", dog, "a dog. ", bird, ""]])       # doctest: +SKIP
            ['a bird']
        """
        pictures: list[Picture] = []
        composed: list[list[int | list[int]]] = []
        for number, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"row {number} is empty: expected a picture or a text")
            parts: list[int | list[int]] = []
            for part in row:
                if isinstance(part, str):
                    parts.append(token_ids(self.tokenizer, part))
                else:
                    parts.append(len(pictures))
                    pictures.append(part)
            composed.append(parts)
        width = self.language_model.get_input_embeddings().embedding_dim
        seen = self.see(pictures) if pictures else torch.zeros(0, 1, width, device=self.device)
        return self.continue_rows(seen, composed, decoding)

    @torch.no_grad()
    def continue_rows(
        self,
        seen: Tensor,
        rows: Sequence[Sequence[int | list[int]]],
        decoding: Decoding | None = None,
        *,
        use_cache: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Continue rows of pictures and tokens, through transformers' own `generate`.

        Rows of unequal length are padded on the left, and the padding is masked: a text does not depend on its
        neighbours in the batch.

        Args:
            seen: What `see` made of the pictures.
            rows: Each in its order: numbers of pictures, and lists of token ids.
            decoding: How; the model's own when None.
            use_cache: Keep keys and values of earlier positions.
            seeds: Of drawing, one a row: a text then depends on its own alone, and not on its neighbours. torch's
                generator, which moves on from call to call, when None. Drawing beams shares one seed a batch.

        Returns:
            One text a row.

        Raises:
            ValueError: A row, with room to write, is longer than the context; or there are other than one seed a row.
        """
        if not rows:
            return []
        written = self.generate_ids(seen, rows, decoding or self.decoding, use_cache=use_cache, seeds=seeds)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def generate_ids(
        self,
        seen: Tensor,
        rows: Sequence[Sequence[int | list[int]]],
        decoding: Decoding,
        *,
        use_cache: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """`continue_rows` as token ids: int64 `(rows, new tokens)`, padded behind the end of each."""
        self.check_room(rows, decoding)
        if seeds is not None and len(seeds) != len(rows):
            raise ValueError(f"got {len(seeds)} seeds for {len(rows)} rows: expected one for each")
        training = self.training
        self.eval()
        try:
            return self.generate_in_evaluation(seen, rows, decoding, use_cache=use_cache, seeds=seeds)
        finally:  # also where memory ran out: the caller may go on with fewer rows
            self.connector.look(None)
            self.train(training)

    def generate_in_evaluation(
        self,
        seen: Tensor,
        rows: Sequence[Sequence[int | list[int]]],
        decoding: Decoding,
        *,
        use_cache: bool,
        seeds: Sequence[int] | None,
    ) -> Tensor:
        """`generate_ids` of a model that is in evaluation mode; leaves the connector looking at the pictures."""
        embed, prefix = self.language_model.get_input_embeddings(), self.connector.prefix(seen)
        sequences, owners, pictures = [], [], []
        for row in rows:
            parts, owner, own = [], [], []
            for part in row:
                if isinstance(part, int):
                    own.append(part)
                    parts.append(prefix[part])
                else:
                    parts.append(embed(torch.tensor(part, dtype=torch.int64, device=self.device)))
                owner += [len(own)] * len(parts[-1])
            sequences.append(torch.cat(parts))
            owners.append(torch.tensor(owner, device=self.device))
            pictures.append(own)
        embeddings = pad_sequence(sequences, batch_first=True, padding_side="left")  # (n, length, width)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        places = torch.arange(embeddings.shape[1], device=self.device)
        mask = (places >= embeddings.shape[1] - lengths[:, None]).long()  # (n, length)
        if all(len(own) == 1 and row[0] == own[0] for own, row in zip(pictures, rows, strict=True)):
            self.connector.look(seen[[own[0] for own in pictures]])
        else:
            shown = [seen[own].flatten(0, 1) for own in pictures]  # (pictures * p, width) each
            owner = pad_sequence(owners, batch_first=True, padding_side="left")
            together = pad_sequence(shown, batch_first=True)
            self.connector.look(together if together.shape[1] else None, owner)
        if not use_cache:
            return self.without_cache(embeddings, mask, decoding)
        given: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": mask}
        if decoding.sample and seeds is not None and decoding.num_beams == 1:
            decoding, given["logits_processor"] = own_draws(decoding, seeds)
        shared = (
            seeds if decoding.sample else None
        )  # beams pick among each other's draws: one seed for all rows
        devices = [self.device] if self.device.type == "cuda" else []
        with no_advice(), torch.random.fork_rng(devices, enabled=shared is not None):
            if shared is not None:
                torch.manual_seed(shared[0])
            return self.language_model.generate(
                **given, generation_config=generation_config(decoding, self.tokenizer)
            )

    def without_cache(self, embeddings: Tensor, mask: Tensor, decoding: Decoding) -> Tensor:
        """Greedy decoding that computes every position anew for each token: what the cache is compared with.

        `generate` always caches when it begins from embeddings, whatever its configuration says.

        Raises:
            ValueError: Beams, drawing, or other settings than a length.
        """
        if decoding != Decoding(max_new_tokens=decoding.max_new_tokens):
            raise ValueError(
                "without a cache texts are written greedily and plainly: leave the other settings out"
            )
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        embed = self.language_model.get_input_embeddings()
        going = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
        written: list[Tensor] = []
        while len(written) < decoding.max_new_tokens and bool(going.any()):
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=places,
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
            token = torch.where(going, logits.argmax(dim=-1), torch.full_like(logits[:, 0], pad).long())
            written.append(token)
            going = going & token.ne(end)
            embeddings = torch.cat([embeddings, embed(token)[:, None].to(embeddings.dtype)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.stack(written, dim=1)

    def check_room(self, rows: Sequence[Sequence[int | list[int]]], decoding: Decoding) -> None:
        """Refuse rows that would not fit.

        Raises:
            ValueError: The longest does not, with room to write.
        """

        def positions(row: Sequence[int | list[int]]) -> tuple[int, int]:
            pictures = self.prefix_length * sum(isinstance(part, int) for part in row)
            return pictures, sum(len(part) for part in row if not isinstance(part, int))

        pictures, words = max(map(positions, rows), key=sum)
        needed = pictures + words + decoding.max_new_tokens
        if needed > self.context:
            raise ValueError(
                f"the prompt does not fit: {pictures} positions for the picture + {words} for the prompt + "
                f"{decoding.max_new_tokens} to write = {needed}, the language model has {self.context}. "
                "Shorten it, or lower decoding.max_new_tokens"
            )


@contextmanager
def no_advice() -> Iterator[None]:
    """Hold back what `generate` says of padding behind a finished text, and of n-grams counted in the answer alone.

    Both are meant.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Passing `no_repeat_ngram_size` with `inputs_embeds`")
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


def generation_config(decoding: Decoding, tokenizer: Any) -> GenerationConfig:
    """transformers' own words for how text is written."""
    sampling = (
        {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.sample else {}
    )
    beams = {"length_penalty": decoding.length_penalty} if decoding.num_beams > 1 else {}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        num_beams=decoding.num_beams,
        do_sample=decoding.sample,
        no_repeat_ngram_size=decoding.no_repeat_ngram or None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
        **beams,
    )
