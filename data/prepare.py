"""`pairstream data prepare`: a data set as it is downloaded -> shards."""

from __future__ import annotations

import inspect
import io
import operator
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from data.adapters.common import Skipped
from data.shards import MANIFEST, Sample, ShardWriter
from pairstream.atomic import check_place, new_folder
from pairstream.errors import nearest
from pairstream.progress import ProgressBar

ADAPTERS: dict[str, str] = {
    "flickr8k": "data.adapters.flickr:flickr8k",
    "flickr30k": "data.adapters.flickr:flickr30k",
    "coco": "data.adapters.coco:samples",
    "nocaps": "data.adapters.nocaps:samples",
    "visual_genome": "data.adapters.visual_genome:samples",
    "conceptual_captions": "data.adapters.img2dataset:conceptual_captions",
    "laion": "data.adapters.img2dataset:laion",
    "sbu": "data.adapters.img2dataset:sbu",
    "vqav2": "data.adapters.vqav2:samples",
    "gqa": "data.adapters.gqa:samples",
    "okvqa": "data.adapters.okvqa:samples",
    "textvqa": "data.adapters.textvqa:samples",
    "vizwiz": "data.adapters.vizwiz:samples",
    "nlvr": "data.adapters.nlvr:nlvr",
    "nlvr2": "data.adapters.nlvr:nlvr2",
    "mvsa_single": "data.adapters.mvsa:single",
    "mvsa_multiple": "data.adapters.mvsa:multiple",
    "hateful_memes": "data.adapters.hateful_memes:samples",
    "easy_vqa": "data.adapters.easy_vqa:samples",
    "csv": "data.adapters.csv:samples",
    "hf": "data.adapters.hf:samples",
    "scenes": "data.adapters.scenes:samples",
}

MAX_PIXELS = 50_000_000
EXAMPLES = 3  # rows named per cause
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass
class Summary:
    """What a preparation wrote and what it left out.

    Attributes:
        samples: Pictures written.
        captions: Texts written.
        questions: Questions written.
        shards: Tar files.
        skipped: Rows left out, by cause.
        examples: The first few of them by cause, as `where: why`.
    """

    samples: int = 0
    captions: int = 0
    questions: int = 0
    shards: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def faults(self) -> int:
        """All skipped rows."""
        return sum(self.skipped.values())

    def skip(self, row: Skipped) -> None:
        """Count a skipped row."""
        self.skipped[row.cause] = self.skipped.get(row.cause, 0) + 1
        examples = self.examples.setdefault(row.cause, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{row.where}: {row.why}")

    def lines_of_faults(self) -> list[str]:
        """A line per cause, with its first examples."""
        return [
            f"  {cause} {count:,}: {'; '.join(self.examples[cause])}{' ...' if count > EXAMPLES else ''}"
            for cause, count in sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
        ]

    def __str__(self) -> str:
        shards = "1 shard" if self.shards == 1 else f"{self.shards:,} shards"
        rows = "1 row" if self.faults == 1 else f"{self.faults:,} rows"
        head = (
            f"{self.samples:,} samples, {self.captions:,} captions, {self.questions:,} questions "
            f"in {shards}; {rows} skipped"
        )
        return "\n".join([head, *self.lines_of_faults()])


def prepare(
    name: str,
    /,
    *,
    out: Path,
    root: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    samples_per_shard: int = 1000,
    image_size: int | None = None,
    max_faults: float = 0.05,
    overwrite: bool = False,
    quiet: bool = False,
    table: Path | None = None,
    image_column: str | None = None,
    caption_columns: tuple[str, ...] | None = None,
    keep_columns: tuple[str, ...] | None = None,
    seed: int | None = None,
    count: int | None = None,
    size: int | None = None,
    kinds: int | None = None,
    crops: bool = False,
) -> Summary:
    """Write a data set as shards that every stage reads.

    Every picture is decoded once on the way, so that what was written can be read. The bytes are kept as they
    are unless `image_size` asks for smaller pictures (training at 64 px from 500 px photographs then decodes
    about ten times faster; it costs one JPEG generation, at quality 95).

    Args:
        name: A set by its name (`pairstream data list` has all; docs/data.md the layout of each), or
            hf:ID-or-folder for any set that the library `datasets` opens.
        out: The folder of the shards. It appears when all is written, and not at all when something fails.
        root: The folder of the unpacked set (csv: where relative picture paths start; easy_vqa and scenes
            need none).
        split: Which part of the set; `train` when not given.
        limit: Write at most so many samples.
        samples_per_shard: Samples in one tar.
        image_size: Shorter side in pixels that larger pictures are brought to.
        max_faults: Share of bad rows (0 to 1) past which it stops instead of skipping them.
        overwrite: Replace the shards that `out` holds.
        quiet: No progress and no summary.
        table: csv: the .csv, .tsv or .jsonl file.
        image_column: csv: the column of picture paths or URLs; hf: of pictures.
        caption_columns: csv and hf: one or several columns of captions.
        keep_columns: csv and hf: columns to copy into the samples' JSON, such as label or similarity.
        seed: scenes: the seed of the drawing.
        count: scenes: how many pictures.
        size: scenes: side of the pictures, pixels (`image_size` would leave its boxes and masks behind).
        kinds: scenes: how many kinds of objects occur (all when not given; fewer are learnt sooner).
        crops: visual_genome: every described region as a picture of its own.

    Returns:
        What was written and what was left out.

    Raises:
        FileNotFoundError: The set's files are not there.
        FileExistsError: `out` holds shards and `overwrite` is False.
        ValueError: An unknown set or split, an option of another set, a broken annotation file, too many bad
            rows, or no sample at all.

    Example:
        >>> prepare("flickr8k", root=Path("flickr8k"), out=Path("shards/train")).samples    # doctest: +SKIP
        6000
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size must be at least 1 pixel, got {image_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1 sample, got {limit}")
    if not 0 <= max_faults <= 1:
        raise ValueError(f"--max-faults is a share between 0 and 1, got {max_faults}")
    out = Path(out).resolve()  # so that a link to a folder stays one
    check_out(out, overwrite)
    options = {
        "root": root,
        "split": split,
        "table": table,
        "image_column": image_column,
        "caption_columns": caption_columns,
        "keep_columns": keep_columns,
        "seed": seed,
        "count": count,
        "size": size,
        "kinds": kinds,
        "crops": crops or None,
    }
    if image_size is not None and name == "scenes":
        raise ValueError("scenes draws at any --size; --image-size would leave its boxes and masks behind")
    items = open_set(name, {key: value for key, value in options.items() if value is not None})
    check_place(out, "--out")
    total = operator.length_hint(items, count or limit or 0)
    summary = Summary()
    with new_folder(out) as folder:
        with ShardWriter(folder, samples_per_shard=samples_per_shard) as writer:
            write_samples(name, items, writer, summary, total, limit, image_size, max_faults, quiet)
        judge(name, summary, max_faults)
        summary.shards = len(writer.shards)
    if not quiet:
        print(f"{name} -> {out}: {summary}", file=sys.stderr)
    return summary


def write_samples(
    name: str,
    items: Iterable[Sample | Skipped],
    writer: ShardWriter,
    summary: Summary,
    total: int,
    limit: int | None,
    image_size: int | None,
    max_faults: float,
    quiet: bool,
) -> None:
    """Write what can be written and count the rest; stop early when too much of it is bad."""
    with ProgressBar(f"prepare {name}", min(total, limit or total), show=not quiet and total > 0) as bar:
        for item in items:
            if isinstance(item, Sample):
                item = fit(item, image_size)
            if isinstance(item, Sample) and item.key in writer.keys:
                item = Skipped("duplicate_key", named(item), f"another sample has the key {item.key!r}")
            if isinstance(item, Sample):
                writer.write(item)
                summary.samples += 1
                summary.captions += len(item.captions)
                questions = item.meta.get("questions")
                summary.questions += len(questions) if isinstance(questions, list) else 0
            else:
                summary.skip(item)
            bar.advance(note=f"skipped {summary.faults}" if summary.faults else "")
            hopeless = total and summary.faults > max_faults * total
            if summary.samples == limit or hopeless:
                break


def judge(name: str, summary: Summary, max_faults: float) -> None:
    """Refuse a result with too many bad rows, or with no sample.

    Raises:
        ValueError: With the counts and the first examples.
    """
    rows = summary.samples + summary.faults
    lines = "\n".join(["", *summary.lines_of_faults()])
    if summary.faults > max_faults * rows:
        raise ValueError(
            f"{name}: {summary.faults:,} of {rows:,} rows are bad, more than --max-faults {max_faults:g} "
            f"allows; nothing was written. Mend them, or allow a larger share:{lines}"
        )
    if not summary.samples:
        raise ValueError(f"{name} gave no sample, so nothing was written{lines}")


def check_out(out: Path, overwrite: bool) -> None:
    """Make sure that writing to `out` destroys nothing but shards that the user gave up."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file: expected a folder")
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    other = [entry for entry in held if entry != MANIFEST and not entry.endswith((".tar", ".tar.idx"))]
    if other:
        raise FileExistsError(
            f"--out {out} holds other files than shards ({other[0]} ...), which would be lost: "
            "choose another folder"
        )
    if held and not overwrite:
        raise FileExistsError(
            f"--out {out} holds {len(held)} files of shards already: choose another folder, "
            "or replace them with --overwrite"
        )


def open_set(name: str, options: dict[str, Any]) -> Iterable[Sample | Skipped]:
    """Call a set's adapter with the options that it takes.

    Raises:
        ValueError: An unknown set, an option that it does not take, or one that it needs and did not get.
    """
    kind, colon, source = name.partition(":")
    if colon and kind == "hf":
        name, options = kind, {**options, "source": source}
    if name not in ADAPTERS:
        raise ValueError(
            f"no data set {name!r}: expected one of {', '.join(ADAPTERS)}{nearest(name, ADAPTERS)}"
        )
    module, function = ADAPTERS[name].split(":")
    adapter: Callable[..., Iterable[Sample | Skipped]] = getattr(import_module(module), function)
    takes = inspect.signature(adapter).parameters
    if "split" in takes and takes["split"].default is takes["split"].empty:
        options = {"split": "train", **options}
    for option in options:
        if option not in takes:
            given = [flag(taken) for taken in takes if taken != "source"]
            raise ValueError(f"{name} takes no {flag(option)}: its options are {', '.join(given)}")
    for option, parameter in takes.items():
        if option == "source" and not options.get("source"):
            raise ValueError("hf: needs a name or a folder, as in hf:OWNER/NAME or hf:./my-folder")
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"{name} needs {flag(option)}; docs/data.md shows what it expects there")
    return adapter(**options)


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def named(sample: Sample) -> str:
    """How the set calls a sample: by its file or URL where it has one."""
    return str(sample.meta.get("name") or sample.meta.get("url") or sample.key)


def fit(sample: Sample, image_size: int | None) -> Sample | Skipped:
    """Make sure that a picture can be decoded, name it by its real format, and shrink it when asked.

    Args:
        sample: Its extension is only a claim.
        image_size: Shorter side in pixels; None keeps the bytes.

    Returns:
        The sample, or why it cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by MAX_PIXELS below
            image = Image.open(io.BytesIO(sample.image))
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise Image.DecompressionBombError
        target = image_size if image_size and min(image.size) > image_size else None
        # libjpeg decodes to 1/2, 1/4 or 1/8 of the size for less, and still walks through every byte.
        side = 2 * target if target else 1
        image.draft("RGB", (side, side))
        image.load()
    except Image.DecompressionBombError:
        return Skipped("too_large_image", named(sample), f"more than {MAX_PIXELS:,} pixels")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        return Skipped("undecodable_image", named(sample), f"{reason} ({len(sample.image):,} bytes)")
    extension = EXTENSIONS.get(str(image.format))
    if extension and target is None:
        return replace(sample, extension=extension)
    lossless = extension != "jpg"
    image = ImageOps.exif_transpose(image).convert("RGB")
    if target is not None:
        ratio = target / min(image.size)
        shape = (round(image.width * ratio), round(image.height * ratio))
        image = image.resize(shape, Image.Resampling.BICUBIC)
    meta = sample.meta
    if "width" in meta or "height" in meta:
        meta = {**meta, "width": image.width, "height": image.height}
    file = io.BytesIO()
    image.save(file, "PNG") if lossless else image.save(file, "JPEG", quality=95)
    return replace(sample, image=file.getvalue(), extension="png" if lossless else "jpg", meta=meta)
