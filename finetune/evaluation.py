"""Reading a recipe's texts and judging a task model on its held-out pictures; in training, and after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.utils import gather_object

from data.stream import Batch, PairStream
from finetune.recipe import FinetuneRecipe
from finetune.recipe_task import MixedTask, VqaTask
from finetune.samples import EvalCollate, EvalLoad, TextLoad, TextRow
from finetune.tasks import Row, TaskKind
from pairstream.progress import ProgressBar

TOKENIZER_SAMPLES = 100_000  # samples whose texts the tokenizer and the baselines are made from
READ = 256


class Texts:
    """Collates rows of texts as they are."""

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        return {"rows": rows}


def text_batches(recipe: FinetuneRecipe, *, everything: bool = False) -> Iterator[Batch]:
    """Batches of the training texts (`rows`, each a `TextRow`); the pictures are not decoded.

    Args:
        recipe: Whose training shards and task.
        everything: All samples, and not the first `TOKENIZER_SAMPLES`.
    """
    stream = PairStream(
        recipe.data.train,
        TextLoad(recipe.task),
        Texts(),
        batch_size=READ,
        shuffle=False,
        workers=recipe.data.workers,
        max_faults=recipe.data.max_faults,
    )
    limit = stream.batches_per_epoch if everything else -(-TOKENIZER_SAMPLES // READ)
    return stream.iterate(0, min(stream.batches_per_epoch, limit))


def training_texts(recipe: FinetuneRecipe) -> list[TextRow]:
    """The training texts, for the tokenizer and the baselines."""
    return [row for batch in text_batches(recipe) for row in batch["rows"]]


def open_val(
    recipe: FinetuneRecipe, model: Any, *, shards: str | Sequence[str] = "", rank: int = 0, world: int = 1
) -> PairStream:
    """The held-out pictures of a rank, in the order of the shards.

    Args:
        recipe: How they are read.
        model: The task model that will see them.
        shards: Others than the recipe's.
        rank: This process.
        world: Number of processes.
    """
    encoder = model.encoder
    tokenizer, room = None, None
    if isinstance(recipe.task, VqaTask | MixedTask):
        tokenizer = model.tokenizer
        room = model.context - model.prefix_length - model.decoding.max_new_tokens
    return PairStream(
        shards or recipe.data.val,
        EvalLoad(recipe.task, encoder.transform, recipe.evaluate.wall, tokenizer, room),
        EvalCollate(encoder.image_size),
        batch_size=recipe.evaluate.batch_size,
        shuffle=False,
        rank=rank,
        world_size=world,
        workers=recipe.data.workers,
        max_faults=recipe.data.max_faults,
    )


def judge(
    recipe: FinetuneRecipe,
    model: Any,
    task: TaskKind,
    stream: PairStream,
    *,
    world: int = 1,
    main: bool = True,
) -> tuple[dict[str, Any], list[Row]]:
    """Write and judge texts of the held-out pictures, on all ranks.

    Args:
        recipe: How many pictures.
        model: The task model.
        task: Its task, which has learnt the training texts.
        stream: Of `open_val`.
        world: Number of processes.
        main: Whether this one shows the progress.

    Returns:
        The numbers, and the judged pictures in the order of the shards.
    """
    pictures = min(recipe.evaluate.pictures or stream.samples, stream.samples)
    batches = -(-pictures // stream.global_batch)
    rows: list[Row] = []
    with ProgressBar("evaluate", batches, show=main) as bar:
        for batch in stream.iterate(0, batches):
            chosen = [row for row in batch["rows"] if row["index"] < pictures]
            if chosen:
                task.write(model, batch["images"][: len(chosen)], chosen)
            rows += chosen
            bar.advance()
    if world > 1:
        rows = gather_object(rows)
    rows.sort(key=lambda row: row["index"])
    return task.score(rows), rows
