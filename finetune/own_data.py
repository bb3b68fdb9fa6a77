"""`pairstream finetune caption|classify|vqa --data my.csv --images DIR`: from a table of one's own to a task model."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from data.adapters.common import Row, Skipped, read_rows
from data.adapters.csv import IMAGE_COLUMNS, pick, read_csv, read_jsonl, source
from data.prepare import fit
from data.shards import Sample, ShardWriter
from finetune.recipe import FinetuneRecipe
from pairstream.atomic import new_folder
from pairstream.progress import ProgressBar
from pairstream.recipe import load_recipe, validate

Kind = Literal["caption", "classify", "vqa"]
COLUMNS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "caption": (("text", ("caption", "captions", "text", "title", "description")),),
    "classify": (
        ("text", ("text", "caption", "title", "post", "description")),
        ("label", ("label", "labels", "class", "category", "sentiment", "attribute")),
    ),
    "vqa": (("text", ("question", "text")), ("label", ("answer", "answers", "label"))),
}
WHAT = {"caption": "captions", "classify": "texts", "vqa": "questions"}
NAMED = 20  # bad rows that are named; the others are counted


@dataclass(frozen=True)
class OwnData:
    """Fine-tune a task model on a table of your own: no recipe and no Python to write.

    Further options are keys of the recipe: --steps 500, --language-model.width 512, --model.pretrained
    laion2b_s34b_b79k; all keys are listed by `pairstream finetune own_caption --help` (own_classify, own_vqa).
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
    """Labels (classify) or answers (vqa); the usual names are found."""
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
    usual = load_recipe(FinetuneRecipe, "finetune", name).schedule.warmup
    given = {word.split("=")[0] for word in further}
    # A fault in an option is told before any work; the warm-up is fitted to the steps below.
    short = [] if "--schedule.warmup" in given else ["--schedule.warmup", "0"]
    recipe = load_recipe(FinetuneRecipe, "finetune", name, [*short, *further])
    if not (own.resume and (shards / "val").is_dir()):
        write_shards(kind, own, shards)
    from finetune.trainer import Finetuner
    from pairstream.errors import require

    require("transformers", "finetune", "fine-tuning")
    pictures = count(shards / "train")
    batch = recipe.batch_size if "--batch-size" in given else min(recipe.batch_size, pictures)
    steps = recipe.steps if "--steps" in given else max(2, round(own.epochs * pictures / batch))
    warmup = recipe.schedule.warmup if "--schedule.warmup" in given else min(usual, steps // 10)
    content = recipe.model_dump(mode="json")
    content |= {"run": str(out), "batch_size": batch, "steps": steps}
    content["model"] |= {"name": own.model}
    content["data"] |= {"train": str(shards / "train"), "val": str(shards / "val")}
    content["schedule"] |= {"warmup": warmup}
    Finetuner(validate(FinetuneRecipe, content, name), resume=own.resume, overwrite=own.overwrite).train()
    return 0


def count(folder: Path) -> int:
    """Samples of a folder of shards."""
    from data.samples import index_shards

    return sum(map(len, index_shards(str(folder))))


def write_shards(kind: Kind, own: OwnData, shards: Path) -> None:
    """Write `train` and `val` below a folder, whole or not at all, and tell of the bad rows.

    Raises:
        FileExistsError: It is there, and not to be overwritten.
        ValueError: Too many bad rows, or too few pictures.
    """
    if shards.exists() and not own.overwrite:
        raise FileExistsError(
            f"{shards} exists: an earlier run made it. Continue that one with --resume, replace it with --overwrite, "
            "or give another --out"
        )
    if not 0 < own.val_share < 1:
        raise ValueError(f"--val-share {own.val_share}: expected a share between 0 and 1")
    faults: list[Skipped] = []
    rows = read_table(kind, own, own.data, faults)
    if own.val_data is None:
        parts = dict(zip(("train", "val"), split(rows, own.val_share), strict=True))
    else:
        parts = {"train": rows, "val": read_table(kind, own, own.val_data, faults)}
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
        tell(own, faults, total, written)


def tell(own: OwnData, faults: Sequence[Skipped], total: int, written: dict[str, int]) -> None:
    """Name the bad rows.

    Raises:
        ValueError: There are too many, or a part has no picture.
    """
    lines = [f"  {fault.where}: {fault.why}" for fault in faults[:NAMED]]
    lines += [f"  ... and {len(faults) - NAMED:,} more"] if len(faults) > NAMED else []
    said = "\n".join(["", *lines])
    if len(faults) > own.max_faults * total:
        raise ValueError(
            f"{own.data}: {len(faults):,} of {total:,} rows are bad, more than --max-faults {own.max_faults:g} allows; "
            f"nothing was written. Mend them, or allow a larger share:{said}"
        )
    for part, pictures in written.items():
        if not pictures:
            raise ValueError(
                f"{own.data}: no picture to {'train' if part == 'train' else 'measure'} on:{said}"
            )
    print(
        f"{own.data}: {written['train']:,} pictures to train on, {written['val']:,} to measure on, "
        f"{len(faults):,} bad rows{said if faults else ''}",
        file=sys.stderr,
    )


def read_table(kind: Kind, own: OwnData, table: Path, faults: list[Skipped]) -> list[Row]:
    """The pictures of a table with their texts; what is wrong with a row goes to `faults`, by line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such column, or a broken file.
    """
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}: expected a .csv, .tsv or .jsonl file")
    base = own.images or table.parent
    if not base.is_dir():
        raise FileNotFoundError(f"no folder {base}: expected --images to be where the pictures lie")
    columns, content = read_jsonl(table) if table.suffix in (".jsonl", ".ndjson") else read_csv(table, False)
    image = pick(table, columns, own.image_column, IMAGE_COLUMNS, "pictures", "--image-column")
    found: dict[str, str | None] = {}
    given = {"text": own.text_column, "label": own.label_column}
    for role, usual in COLUMNS[kind]:
        what = WHAT[kind] if role == "text" else {"classify": "labels", "vqa": "answers"}[kind]
        usual = tuple(name for name in usual if name not in (image, found.get("text")))
        absent = not any(name.lower() in usual for name in columns)
        if kind == "classify" and role == "text" and given[role] is None and absent:
            found[role] = None  # pictures with labels alone
            continue
        found[role] = pick(table, columns, given[role], usual, what, f"--{role}-column")
    rows: dict[str, Row] = {}
    for line, row in content:
        where = f"{table.name}:{line}"
        try:
            if isinstance(row, str):
                raise ValueError(row)
            name = row.get(image)
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"no picture in the column {image!r}")
            name = name.strip()
            meta, captions = values(kind, row, found)
        except ValueError as error:
            faults.append(Skipped("bad_row", where, str(error)))
            continue
        key = name if kind != "classify" else f"{line}/{name}"  # each post is a sample of its own
        before = rows.get(key)
        if before is None:
            rows[key] = Row(name, source(name, base), where, captions, meta, f"{len(rows):09d}")
            continue
        if "questions" in meta:
            meta = {"questions": [*before.meta["questions"], *meta["questions"]]}
        captions = [*before.captions, *(text for text in captions if text not in before.captions)]
        rows[key] = Row(name, before.source, before.where, captions, meta, before.key)
    return list(rows.values())


def values(kind: Kind, row: dict[str, Any], found: dict[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """What a row says: JSON keys of its sample, and captions."""
    column = found["text"]
    text = row.get(column) if column else None
    if isinstance(text, list) and kind == "caption" and all(isinstance(entry, str) for entry in text):
        captions = [entry.strip() for entry in text if entry.strip()]
    elif text is not None and not isinstance(text, str):
        raise ValueError(f"expected text in the column {column!r}, got {text!r}")
    else:
        captions = [text.strip()] if text and text.strip() else []
    if kind != "classify" and not captions:
        raise ValueError(f"nothing in the column {column!r}")
    if kind == "caption":
        return {}, captions
    label = row.get(str(found["label"]))
    if label in (None, "", []) or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"nothing in the column {found['label']!r}")
    label = label.strip() if isinstance(label, str) else label
    if kind == "classify":
        return {"label": label, **({"text": captions[0]} if captions else {})}, []
    # One answer, written ten times: VQA accuracy, which is defined on ten people's answers, is exact match then.
    answers = label if isinstance(label, list) else [str(label)] * 10
    return {"questions": [{"question": captions[0], "answers": answers}]}, []


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Rows to train and to measure on; no picture is on both sides, and the same table is always split the same.

    Raises:
        ValueError: Fewer than two pictures.
    """
    names = sorted({row.name for row in rows}, key=lambda name: (zlib.crc32(name.encode()), name))
    if len(names) < 2:
        raise ValueError(
            f"{len(names)} good pictures: expected at least two, one to train and one to measure on"
        )
    held = set(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    return [row for row in rows if row.name not in held], [row for row in rows if row.name in held]
