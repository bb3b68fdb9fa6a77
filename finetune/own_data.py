"""`pairstream finetune caption|classify|vqa|retrieval|flyp --data my.csv --images DIR`: from a table to a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from data.adapters.common import Skipped, read_rows
from data.prepare import fit
from data.shards import Sample, ShardWriter
from finetune.fusion.recipe import ClassifyTask
from finetune.own_table import Kind, check_labels, classes_of, labels_of, lonely, read_table, split
from finetune.recipe import FinetuneRecipe
from finetune.recipe_task import Task
from pairstream.atomic import new_folder, write_text
from pairstream.progress import ProgressBar
from pairstream.recipe import load_recipe, validate
from pretrain.recipe import PretrainRecipe

CONTRASTIVE = ("retrieval", "flyp")  # both towers train as in pretraining, from a recipe of `pretrain`
CLASSES, TEMPLATES = "classes.txt", "templates.txt"  # beside the shards of `flyp`, for its evaluation
NAMED = 20  # bad rows that are named; the others are counted


@dataclass(frozen=True)
class OwnData:
    """Fine-tune on a table of your own: no recipe and no Python to write.

    Further options are keys of the recipe: --steps 500, --language-model.width 512, --model.pretrained
    laion2b_s34b_b79k; all keys are listed by `pairstream finetune own_caption --help` (own_classify, own_vqa) and
    `pairstream pretrain own_retrieval --help` (own_flyp).
    """

    data: Path
    """A .csv, .tsv or .jsonl file with one row a picture and text (several rows of a picture are taken together)."""
    model: str
    """The dual encoder: a run or checkpoint folder, an open_clip name, `local-dir:` or `hf-hub:`."""
    images: Path | None = None
    """Folder where relative picture paths start; that of --data when not given."""
    out: Path | None = None
    """The run folder, runs/own_KIND when not given; shards go beside it, into OUT-shards."""
    val_data: Path | None = None
    """Another table, to measure on."""
    val_share: float = 0.1
    """Without --val-data, the share of pictures that is kept apart to measure on."""
    image_column: str | None = None
    """Picture paths or URLs; the usual names are found."""
    text_column: str | None = None
    """Captions, texts or questions; the usual names are found. classify takes a table without texts, too."""
    label_column: str | None = None
    """Labels (classify, flyp) or answers (vqa); the usual names are found."""
    epochs: float = 10.0
    """Passes over the training pictures, unless --steps says otherwise."""
    max_faults: float = 0.05
    """Share of bad rows past which it stops; each is named by its line and left out."""
    resume: bool = False
    """Continue a killed run; the shards are taken as they are."""
    overwrite: bool = False
    """Replace an earlier run and its shards."""


def run(kind: Kind, words: Sequence[str]) -> int:
    """The command.

    Raises:
        FileNotFoundError: The table or the model is not there.
        ValueError: A missing column, too many bad rows, too few pictures, or a fault in the options.
    """
    parsed, further = tyro.cli(
        OwnData, args=list(words), prog=f"pairstream finetune {kind}", return_unknown_args=True
    )
    own: OwnData = parsed
    name = f"own_{kind}"
    out = own.out or Path("runs") / name
    shards = out.with_name(f"{out.name}-shards")
    stage, recipe_of = ("pretrain", PretrainRecipe) if kind in CONTRASTIVE else ("finetune", FinetuneRecipe)
    usual = load_recipe(recipe_of, stage, name).schedule.warmup
    given = {word.split("=")[0] for word in further}
    # A fault in an option is told before any work; the warm-up is fitted to the steps below.
    short = [] if "--schedule.warmup" in given else ["--schedule.warmup", "0"]
    recipe = load_recipe(recipe_of, stage, name, [*short, *further])
    check_model(own.model, getattr(recipe.model, "pretrained", None))
    if not (own.resume and (shards / "val").is_dir()):
        write_shards(kind, own, shards, recipe.task if isinstance(recipe, FinetuneRecipe) else None)
    pictures = count(shards / "train")
    batch = recipe.batch_size if "--batch-size" in given else min(recipe.batch_size, pictures)
    steps = recipe.steps if "--steps" in given else max(2, round(own.epochs * pictures / batch))
    warmup = recipe.schedule.warmup if "--schedule.warmup" in given else min(usual, steps // 10)
    content = recipe.model_dump(mode="json")
    content |= {"run": str(out), "batch_size": batch, "steps": steps}
    content["model"] |= {"name": own.model}
    content["schedule"] |= {"warmup": warmup}
    content["data"] |= {"train": str(shards / "train")}
    if "--data.max-faults" not in given:
        # What the towers or the language model cannot take is a bad row as well.
        content["data"] |= {"max_faults": max(min(own.max_faults, 0.99), content["data"]["max_faults"])}
    if kind in CONTRASTIVE:
        from pretrain.trainer import Trainer

        measure_on(kind, content, shards)
        Trainer(validate(PretrainRecipe, content, name), resume=own.resume, overwrite=own.overwrite).train()
        return 0
    from finetune.trainer import Finetuner
    from pairstream.errors import require

    require("transformers", "finetune", "fine-tuning")
    content["data"] |= {"val": str(shards / "val")}
    Finetuner(validate(FinetuneRecipe, content, name), resume=own.resume, overwrite=own.overwrite).train()
    return 0


def check_model(name: str, pretrained: str | None) -> None:
    """Refuse an encoder that is not there before the pictures are read, which may take hours.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No checkpoint in it, or no such name.
    """
    from pretrain.encoder import checkpoint_folder
    from pretrain.towers import check_name

    if checkpoint_folder(name) is None:
        check_name(name, pretrained)


def measure_on(kind: Kind, content: dict[str, Any], shards: Path) -> None:
    """Fill the pictures that were kept apart into a recipe of `pretrain`; of `flyp`, the classes and prompts too."""
    if kind == "retrieval":
        content["evaluate"][0]["options"] |= {"shards": str(shards / "val")}
        return
    labels = content["data"]["labels"]
    labels["classes"] = (shards / CLASSES).read_text(encoding="utf-8").splitlines()
    write_text(shards / TEMPLATES, "\n".join(labels["templates"]) + "\n")
    content["evaluate"][0]["options"] |= {
        "data": str(shards / "val"),
        "classes": str(shards / CLASSES),
        "templates": str(shards / TEMPLATES),
    }


def count(folder: Path) -> int:
    """Samples of a folder of shards."""
    from data.samples import index_shards

    return sum(map(len, index_shards(str(folder))))


def write_shards(kind: Kind, own: OwnData, shards: Path, task: Task | None = None) -> None:
    """Write `train` and `val` below a folder, whole or not at all, and tell of the bad rows.

    Args:
        kind: What is trained.
        own: The options.
        shards: The folder.
        task: What the recipe says of labels.

    Raises:
        FileExistsError: It is there, and not to be overwritten.
        ValueError: Too many bad rows, or too few pictures.
    """
    if shards.exists() and not own.overwrite:
        raise FileExistsError(
            f"{shards} exists: an earlier run made it. Continue that one with --resume, replace it with --overwrite, "
            "or give another --out"
        )
    if not 0 < own.epochs < math.inf:
        raise ValueError(f"--epochs {own.epochs:g}: expected a number above 0")
    if not 0 < own.val_share < 1:
        raise ValueError(f"--val-share {own.val_share}: expected a share between 0 and 1")
    faults: list[Skipped] = []
    rows = read_table(kind, own, own.data, faults)
    labelled = task if isinstance(task, ClassifyTask) else None
    separator = labelled.separator if labelled and labelled.several else None
    if own.val_data is None:
        try:
            labels = partial(labels_of, separator=separator) if kind == "classify" else None
            train, val = split(rows, own.val_share, labels)
        except ValueError as error:
            raise ValueError(f"{own.data}: {error}{named(faults)}") from error
    else:
        train, val = rows, read_table(kind, own, own.val_data, faults)
    parts = {"train": train, "val": val}
    if kind == "classify":
        check_labels(own.data, parts, labelled.labels if labelled else (), separator, faults)
        if single := lonely([row for chosen in parts.values() for row in chosen], separator):
            print(
                f"{own.data}: labels of one row alone, a typo? {', '.join(single[:NAMED])}", file=sys.stderr
            )
    total = sum(map(len, parts.values())) + len(faults)
    written = dict.fromkeys(parts, 0)
    with new_folder(shards) as folder, ProgressBar("read pictures", total - len(faults)) as bar:
        for part, chosen in parts.items():
            with ShardWriter(folder / part) as writer:
                for item in read_rows(chosen, captioned=False):
                    if isinstance(item, Sample):
                        item = fit(item, None)
                    if isinstance(item, Sample):
                        writer.write(item)
                        written[part] += 1
                    else:
                        faults.append(item)
                    bar.advance()
        if kind == "flyp":
            try:
                names = classes_of([row for chosen in parts.values() for row in chosen])
            except ValueError as error:
                raise ValueError(f"{own.data}: {error}") from error
            write_text(folder / CLASSES, "\n".join(names) + "\n")
        tell(own, faults, total, written)


def named(faults: Sequence[Skipped]) -> str:
    """The first bad rows, each on a line of its own."""
    lines = [f"  {fault.where}: {fault.why}" for fault in faults[:NAMED]]
    lines += [f"  ... and {len(faults) - NAMED:,} more"] if len(faults) > NAMED else []
    return "\n".join(["", *lines])


def tell(own: OwnData, faults: Sequence[Skipped], total: int, written: dict[str, int]) -> None:
    """Name the bad rows.

    Raises:
        ValueError: There are too many, or a part has no picture.
    """
    said = named(faults)
    if len(faults) > own.max_faults * total:
        raise ValueError(
            f"{own.data}: {len(faults):,} of {total:,} rows are bad, more than --max-faults {own.max_faults:g} allows; "
            f"nothing was written. Mend them, or allow a larger share:{said}"
        )
    for part, pictures in written.items():
        if not pictures:
            table = own.val_data if part == "val" and own.val_data else own.data
            raise ValueError(f"{table}: no picture to {'train' if part == 'train' else 'measure'} on:{said}")
    print(
        f"{own.data}: {written['train']:,} pictures to train on, {written['val']:,} to measure on, "
        f"{len(faults):,} bad rows{said if faults else ''}",
        file=sys.stderr,
    )
