"""`pairstream explain consistency`: do encoder, captioner and VQA model say the same of the same pictures?

Each check has a value and what it would be by chance; where chance has no formula, a control with captions shuffled
among the pictures stands for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from explain.encoder_checks import encoder_checks
from explain.findings import Consistency, in_batches, read_pairs
from explain.task_checks import caption_checks, vqa_checks
from explain.tasks import load
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder, load_encoder


def check_consistency(
    model: str | Encoder,
    data: str | Sequence[str],
    *,
    captioner: Path | Any | None = None,
    vqa: Path | Any | None = None,
    limit: int = 200,
    batch_size: int = 32,
    pretrained: str | None = None,
    seed: int = 0,
    device: str = "auto",
    show: bool = False,
) -> Consistency:
    """Run all checks that the given models and data allow; the others are listed with the reason.

    Args:
        model: The dual encoder, or what `load_encoder` takes.
        data: Shards of pictures with captions.
        captioner: A captioner or its folder.
        vqa: A VQA model or its folder.
        limit: Only the first so many pictures.
        batch_size: Pictures at a time.
        pretrained: open_clip's tag of weights, for a name.
        seed: Of shuffles and probes.
        device: auto, cpu, cuda or cuda:N.
        show: Print progress.

    Returns:
        The numbers and the worst cases.

    Raises:
        ValueError: Fewer than two pictures with captions, or a model for another task.
        FileNotFoundError: No task model in a folder.
    """
    pairs = read_pairs(data, limit)
    encoder = load_encoder(model, pretrained=pretrained, device=device) if isinstance(model, str) else model
    writer = None if captioner is None else load(captioner, device, "caption")
    asked = None if vqa is None else load(vqa, device, "vqa")
    result = Consistency(
        {
            "model": encoder.name,
            "captioner": None if captioner is None else str(getattr(captioner, "name", captioner)),
            "vqa": None if vqa is None else str(getattr(vqa, "name", vqa)),
            "pictures": len(pairs),
            "seed": seed,
            "checks": {},
            "controls": {},
            "left_out": {},
            "chair": None,
        }
    )
    rng = random.Random(seed)
    pixels = torch.stack([encoder.preprocess(pair.file) for pair in pairs])
    with ProgressBar("consistency", 3, show=show) as bar:
        images = in_batches(encoder.encode_images, pixels, batch_size)
        mirrored = in_batches(encoder.encode_images, pixels.flip(-1), batch_size)
        encoder_checks(result, encoder, pairs, images, mirrored, rng)
        bar.advance(note="encoder")
        written = None
        if writer is None:
            for name in ("caption_finds_picture@1", "caption_gain", "caption_mirror_cosine", "chair"):
                result.leave_out(name, "no --captioner was given")
        else:
            written = caption_checks(result, encoder, writer, pairs, images, batch_size, rng)
        bar.advance(note="captioner")
        if asked is None:
            result.leave_out("vqa", "no --vqa was given")
        else:
            vqa_checks(result, asked, pairs, written, batch_size, rng)
        bar.advance(note="vqa")
    return result
