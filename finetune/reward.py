"""Self-critical training: captions that the model draws are learnt as far as they beat what it writes greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune import ptb
from finetune.metrics import DocumentFrequencies, cider
from finetune.model import VisionLanguageModel
from finetune.recipe_task import Decoding, Reward
from finetune.text import Pair, pack, token_ids

SOURCE = "training captions"


class SelfCritic:
    """Draws captions and says how much each is to be learnt.

    The weight of a drawn caption is its CIDEr-D less that of the greedy caption of the same picture: better ones become
    more probable, worse ones less. Document frequencies are those of the training captions, never of a batch, whose
    few pictures would make every word look rare.

    Args:
        captions: Of each training sample, by its index.
        config: How many are drawn.

    Raises:
        ValueError: Fewer than two pictures have captions, so that no word could be rare.

    Reference:
        Rennie et al. 2017, Self-critical Sequence Training; the baseline is greedy decoding.
    """

    def __init__(self, captions: Mapping[int, Sequence[str]], config: Reward):
        if len(captions) < 2:
            raise ValueError(
                f"{len(captions)} training pictures have captions: the reward needs at least two, since words are "
                "weighed by how rare they are"
            )
        self.config = config
        self.references = {
            index: [ptb.tokenize(caption) for caption in row] for index, row in captions.items()
        }
        self.frequencies = DocumentFrequencies.of(list(self.references.values()), SOURCE)

    def rewards(self, written: Sequence[str], indices: Sequence[int]) -> np.ndarray:
        """CIDEr-D of raw captions of these samples: float64 `(n,)`."""
        references = [self.references[index] for index in indices]
        return np.array(cider([ptb.tokenize(text) for text in written], references, self.frequencies)[1])

    def inputs(
        self, model: VisionLanguageModel, batch: Mapping[str, Tensor], indices: Sequence[int]
    ) -> dict[str, Tensor]:
        """What the model's forward is given to learn from a batch.

        Args:
            model: The model as it is.
            batch: With `images` or `tokens`.
            indices: Of the batch's samples.

        Returns:
            The pictures, the drawn captions as rows to learn, and `weights` float `(b * samples,)`.
        """
        decoding, count = model.decoding, self.config.samples
        assert model.caption_task is not None, "the recipe allows it for captions only"
        prompt = token_ids(model.tokenizer, model.caption_task.prompt)
        with torch.no_grad():
            tokens = batch["tokens"] if "tokens" in batch else model.image_tokens(batch["images"])
            seen = model.connector(tokens)
        # Greedy and drawn with nothing forbidden: the gradient below is that of the plain distribution.
        plain = Decoding(max_new_tokens=decoding.max_new_tokens)
        greedy = model.generate_ids(seen, [[place, prompt] for place in range(len(indices))], plain)
        owners = [place for place in range(len(indices)) for _ in range(count)]
        drawn = model.generate_ids(
            seen, [[place, prompt] for place in owners], plain.model_copy(update={"sample": True})
        )
        baseline = self.rewards(said(model, greedy), indices)
        found = self.rewards(said(model, drawn), [indices[place] for place in owners])
        pairs = [Pair(prompt, until_end(row, model.tokenizer.eos_token_id)) for row in drawn.tolist()]
        device = seen.device
        rows: dict[str, Any] = pack(pairs, model.tokenizer.pad_token_id)
        pictures = {name: batch[name] for name in ("images", "tokens") if name in batch}
        return {
            **pictures,
            **{name: value.to(device) for name, value in rows.items()},
            "image_of_text": torch.tensor(owners, device=device),
            "weights": torch.tensor(found - baseline[owners], dtype=torch.float32, device=device),
        }


def said(model: VisionLanguageModel, ids: Tensor) -> list[str]:
    """Token ids as texts."""
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def until_end(ids: Sequence[int], end: int) -> list[int]:
    """Ids up to the first end, that included."""
    return list(ids[: ids.index(end) + 1]) if end in ids else list(ids)
