"""The report of a curation: what each rule dropped, with pictures, what changed, and how well copies are found."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.curate.decide import METHODS, Decision
from data.curate.filters import MISSING
from data.curate.look import BALANCE, DUPLICATES, LEAK, NO_ENTRY, causes, open_shard
from data.curate.plant import KINDS
from data.curate.recipe import CurateRecipe
from data.curate.records import UNUSABLE, Records
from data.faults import Fault
from data.pictures import Picture
from data.samples import RawSample, read_sample
from data.tar import ShardIndex, ShardReader
from pairstream.recipe import Config
from pairstream.report import Card, Report, show

THUMBNAIL = 240  # pixels of the longer side
BINS = 30
COPIES = 5  # copies that are shown beside the picture that stays
HIDDEN = ("punsafe",)  # nobody wants to meet these in a report
SAID = {
    UNUSABLE: "damaged: no picture, no JSON, cannot be decoded",
    MISSING: "a rule needs a key of the JSON that is not there",
    LEAK: "the evaluation set has this picture",
    "duplicate_exact": "the same bytes as another picture",
    "duplicate_perceptual": "looks the same as another picture",
    "duplicate_semantic": "shows the same as another picture",
    NO_ENTRY: "no word of the balancing list in the captions",
    BALANCE: "one of many with the same words, not drawn",
}
HISTOGRAMS = {
    "shorter side": ("pixels", lambda rows: np.minimum(rows.width, rows.height)),
    "aspect ratio": (
        "longer / shorter side",
        lambda rows: np.maximum(rows.width, rows.height) / np.maximum(1, np.minimum(rows.width, rows.height)),
    ),
    "caption length": ("characters", lambda rows: rows.characters),
    "caption words": ("words", lambda rows: rows.words),
    "punsafe": ("probability", lambda rows: rows.punsafe),
    "pwatermark": ("probability", lambda rows: rows.pwatermark),
    "similarity": ("cosine of the metadata", lambda rows: rows.similarity),
    "CLIP score": ("cosine of the encoder", lambda rows: rows.score),
}


def summarise(recipe: CurateRecipe, records: Records, decision: Decision) -> dict[str, Any]:
    """The figures of a curation as plain data; nothing in it depends on time or machine."""
    names = causes(recipe)
    counts = np.bincount(decision.verdicts, minlength=len(names)).tolist()
    faults: Counter[str] = Counter()
    for fault in records.faults:
        faults[fault.cause] += fault.count
    return {
        "samples": len(records),
        "kept": counts[0],
        "dropped": {
            name: count for name, count in zip(names[1:], counts[1:], strict=True) if asked(recipe, name)
        },
        "captions_shortened": sum(int(decision.verdicts[row] == 0) for row in records.captions),
        "faults": dict(faults.most_common()),
        **decision.said,
        "histograms": {
            name: found
            for name, (unit, measure) in HISTOGRAMS.items()
            if (found := histogram(measure(records), unit, records, decision.verdicts == 0)) is not None
        },
    }


def asked(recipe: CurateRecipe, cause: str) -> bool:
    """Whether a recipe can drop a sample for this cause."""
    copies = recipe.duplicates
    return {
        MISSING: any(hasattr(rule, "missing") for rule in recipe.filters),
        LEAK: bool(recipe.leaks and recipe.leaks.drop),
        DUPLICATES[0]: bool(copies and copies.exact),
        DUPLICATES[1]: bool(copies and copies.perceptual),
        DUPLICATES[2]: bool(copies and copies.semantic),
        BALANCE: recipe.balance is not None,
        NO_ENTRY: bool(recipe.balance and recipe.balance.unmatched == "drop"),
    }.get(cause, True)


def histogram(values: np.ndarray, unit: str, records: Records, kept: np.ndarray) -> dict[str, Any] | None:
    """Counts in equal steps up to the 99th percentile; what lies above counts in the last step.

    Args:
        values: A number of each sample; (n,).
        unit: What it is in.
        records: The samples; damaged ones are left out.
        kept: Those that stay; bool (n,).

    Returns:
        `edges` (steps + 1), `before` and `after` (steps), and `same`, the number that all samples have (None when
        they differ); None when no sample has such a number.
    """
    known = (records.width > 0) & np.isfinite(values)
    if not known.any():
        return None
    values = values.astype(np.float64)
    low, high = float(values[known].min()), float(np.percentile(values[known], 99))
    lowest = low
    if unit == "probability":  # whose whole range says more
        low, high = 0.0, 1.0
    whole = bool((values[known] == np.round(values[known])).all())
    step = (high - low) / BINS or 1.0
    if whole:
        step = float(np.ceil((high - low + 1) / BINS))
        low -= 0.5
    edges = low + step * np.arange(BINS + 1)
    clipped = np.clip(values, edges[0], edges[-1])
    before, after = (np.histogram(clipped[known & which], edges)[0].tolist() for which in (known, kept))
    same = lowest if (values[known] == values[known][0]).all() else None
    return {
        "edges": [round(float(edge), 6) for edge in edges],
        "before": before,
        "after": after,
        "same": same,
    }


class Pictures:
    """Samples read again for the report, a shard at a time."""

    def __init__(self) -> None:
        self.name = ""
        self.opened: tuple[ShardIndex, ShardReader] | None = None

    def read(self, records: Records, row: int) -> tuple[RawSample | None, str]:
        """A sample, or why it cannot be read."""
        shard, sample = records.place(row)
        if self.opened is None or self.name != records.shards[shard]:
            self.close()
            self.name, self.opened = records.shards[shard], open_shard(records.shards[shard])
        index, reader = self.opened
        if sample >= len(index):
            return None, "the shard holds fewer samples than when it was read"
        try:
            return read_sample(index, sample, sample, reader), ""
        except Fault as fault:
            return None, str(fault)

    def card(self, records: Records, row: int, *lines: str, hide: bool = False) -> Card:
        """A sample as the report shows it."""
        raw, fault = self.read(records, row)
        image, captions = None, []
        if raw is not None:
            try:
                captions = raw.captions()
                image = None if hide else thumbnail(raw.image)
            except Fault as error:
                fault = str(error)
        size = f"{records.width[row]} × {records.height[row]} px, {records.bytes[row] / 1000:.1f} kB"
        told = [*lines, *([size] if records.width[row] else []), *([fault] if fault and not hide else [])]
        title = captions[0] if captions else f"(sample {records.key(row)}, no caption)"
        return Card(image, title[:300], told)

    def close(self) -> None:
        if self.opened is not None:
            self.opened[1].close()


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of a picture."""
    picture = Picture(data)
    pixels = picture.pixels(max(1.0, min(picture.width, picture.height) / THUMBNAIL))
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def write_report(
    out: Path,
    recipe: CurateRecipe,
    records: Records,
    evaluation: Records | None,
    decision: Decision,
    metrics: dict[str, Any],
) -> None:
    """Write `report.html` and `report.json`."""
    samples, kept = metrics["samples"], metrics["kept"]
    shards = [recipe.shards] if isinstance(recipe.shards, str) else recipe.shards
    report = Report("Curation", f"{', '.join(shards)} → {recipe.out}")
    copies = sum(metrics["dropped"].get(cause, 0) for cause in DUPLICATES)
    tiles: list[tuple[str, Any, str]] = [
        ("samples in", samples, f"{len(records.shards):,} shards"),
        ("samples kept", kept, f"{kept / max(samples, 1):.1%} of all"),
        ("copies", copies, "of pictures that stay")
        if recipe.duplicates
        else ("rules", len(recipe.filters), ""),
        ("damaged", metrics["dropped"][UNUSABLE], "dropped as unusable"),
    ]
    if "leaks" in metrics:
        leaks = metrics["leaks"]
        note = f"of {leaks['evaluation_samples']:,} evaluation samples were met"
        tiles.append(("evaluation leaks", leaks["evaluation_samples_leaked"], note))
    report.numbers(tiles)
    steps(report, recipe, metrics)
    report.heading("Before and after")
    same = [name for name, found in metrics["histograms"].items() if found["same"] is not None]
    if same:
        words = (f"{name} {show(metrics['histograms'][name]['same'])}" for name in same)
        report.text(f"The same for all samples: {', '.join(words)}.")
    for name, found in metrics["histograms"].items():
        if name not in same:
            curves = {which: outline(found["edges"], found[which]) for which in ("before", "after")}
            report.curves(name, curves, HISTOGRAMS[name][0], "samples")
    pictures = Pictures()
    try:
        examples(report, recipe, records, decision, pictures)
        copies_shown(report, recipe, records, evaluation, decision, metrics, pictures)
    finally:
        pictures.close()
    if metrics.get("balance"):
        balance(report, recipe, metrics["balance"])
    report.write(out)


def steps(report: Report, recipe: CurateRecipe, metrics: dict[str, Any]) -> None:
    """What each step dropped, of how many that reached it."""
    report.heading("What each rule dropped")
    left, rows = metrics["samples"], []
    rules = dict(zip(recipe.labels(), recipe.filters, strict=True))
    # The best share is taken after the search for copies, wherever its rule stands.
    late = {name for name, rule in rules.items() if getattr(rule, "top", None) is not None}
    order = {cause: (cause in late) + 2 * (cause in (BALANCE, NO_ENTRY)) for cause in metrics["dropped"]}
    for cause, count in sorted(metrics["dropped"].items(), key=lambda item: order[item[0]]):
        words = SAID.get(cause) or in_words(rules[cause])
        rows.append([cause, words, count, f"{count / max(metrics['samples'], 1):.1%}", left])
        left -= count
    rows.append(["kept", "", left, f"{left / max(metrics['samples'], 1):.1%}", left])
    report.table(
        ["rule", "what it asks", "dropped", "of all", "reached it"],
        rows,
        "A sample counts under the first rule that it fails. Leaks, copies, best shares (top) and the balance are "
        "settled when all shards are read.",
    )
    if metrics["captions_shortened"]:
        report.text(
            f"Samples that stay without those of their captions that failed a rule: {metrics['captions_shortened']:,}."
        )
    if metrics["faults"]:
        report.table(
            ["damage", "samples"],
            list(metrics["faults"].items()),
            "Also counts samples that a cut shard lost.",
        )


def in_words(rule: Config) -> str:
    """A rule's keys as the report shows them: `min 5, max 300`."""
    told = []
    for key, value in rule.model_dump(mode="json", exclude={"kind"}, exclude_none=True).items():
        if value not in ([], ""):
            told.append(f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(told)


def outline(edges: list[float], counts: list[int]) -> list[tuple[float, float]]:
    """A histogram as a line: up and down at the edges."""
    points = [(edges[0], 0.0)]
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        points += [(left, float(count)), (right, float(count))]
    return [*points, (edges[-1], 0.0)]


def examples(
    report: Report, recipe: CurateRecipe, records: Records, decision: Decision, pictures: Pictures
) -> None:
    """Some samples of each cause: those with the smallest digests, so that every run shows the same."""
    names = causes(recipe)
    shown = [name for name in (*recipe.labels(), MISSING, UNUSABLE, NO_ENTRY, BALANCE) if recipe.examples]
    faults = {(fault.shard, fault.key): fault for fault in records.faults if fault.key}
    blocks = []
    for cause in shown:
        rows = np.flatnonzero(decision.verdicts == names.index(cause))
        rows = rows[np.lexsort((rows, records.text[rows]))][: recipe.examples]
        cards = []
        for row in rows.tolist():
            lines = [f"{records.characters[row]} characters, {records.words[row]} words"]
            lines += [
                f"{name} {getattr(records, name)[row]:.3f}"
                for name in ("punsafe", "pwatermark", "similarity", "score")
                if np.isfinite(getattr(records, name)[row])
            ]
            if cause == UNUSABLE:
                fault = faults.get((records.shards[records.place(row)[0]], records.key(row)))
                lines = [f"{fault.cause}: {fault.detail}"[:200]] if fault else []
            hide = cause in (*HIDDEN, UNUSABLE) or any(cause.startswith(f"{hidden}_") for hidden in HIDDEN)
            cards.append(pictures.card(records, row, *lines, hide=hide))
        if cards:
            blocks.append((cause, cards))
    if blocks:
        report.heading("Examples of what was dropped")
    for cause, cards in blocks:
        report.cards(cause, cards)


def copies_shown(
    report: Report,
    recipe: CurateRecipe,
    records: Records,
    evaluation: Records | None,
    decision: Decision,
    metrics: dict[str, Any],
    pictures: Pictures,
) -> None:
    """Groups of copies and leaks as pictures, and how well planted copies are found."""
    if recipe.duplicates is not None:
        report.heading("Copies")
        if metrics.get("planted"):
            planted(report, metrics["planted"])
        names = causes(recipe)
        for cause in DUPLICATES:
            mine = np.flatnonzero(decision.verdicts == names.index(cause))
            groups, counts = np.unique(decision.copy_of[mine], return_counts=True)
            first = np.lexsort((records.text[groups], -counts))[: recipe.examples]
            entries = []
            for keeper in groups[first].tolist():
                rows = mine[decision.copy_of[mine] == keeper]
                rows = rows[np.argsort(records.text[rows], kind="stable")][:COPIES]
                stays = pictures.card(records, keeper, "stays")
                entries.append((stays, [pictures.card(records, row) for row in rows.tolist()]))
            if entries:
                report.results(f"{cause}: what stays, and what went for it", entries)
    if recipe.leaks is not None and evaluation is not None:
        report.heading("Evaluation set")
        leaks = metrics["leaks"]
        report.table(
            ["found by", "samples of this set"],
            list(leaks["by"].items()),
            f"Of the evaluation set's {leaks['evaluation_samples']:,} samples {leaks['evaluation_samples_leaked']:,} "
            f"were met; {leaks['samples']:,} copies {'were dropped' if recipe.leaks.drop else 'stay (drop: false)'}.",
        )
        rows = np.flatnonzero(decision.leak_of >= 0)
        rows = rows[np.lexsort((records.text[rows], -decision.leak_by[rows].astype(int)))][: recipe.examples]
        entries = [
            (
                pictures.card(evaluation, int(decision.leak_of[row]), "evaluation set"),
                [pictures.card(records, row, f"found by: {METHODS[decision.leak_by[row]]}")],
            )
            for row in rows.tolist()
        ]
        if entries:
            report.results("Evaluation pictures, and where this set has them", entries)


def planted(report: Report, table: list[dict[str, Any]]) -> None:
    """The precision and recall of the search for copies."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    cells = {(row["kind"], row["method"]): row for row in table}

    def percent(share: float | None) -> str | None:
        return None if share is None else f"{share:.1%}"

    recall, precision = [], []
    for kind, (_, what) in KINDS.items():
        own = [cells[kind, method] for method in methods]
        recall.append([kind, what, own[0]["planted"], *(percent(cell["recall"]) for cell in own)])
        precision.append([kind, *(percent(cell["precision"]) for cell in own)])
    report.table(
        ["planted copy", "made by", "planted", *methods],
        recall,
        "Recall: the share of copies that a search pairs with their picture. The copies were made of pictures of this "
        "set for these two tables, and not written.",
    )
    report.table(
        ["planted copy", *methods],
        precision,
        "Precision: of all pairs of a planted copy, the share that is with its picture or with a copy of that.",
    )


def balance(report: Report, recipe: CurateRecipe, found: dict[str, Any]) -> None:
    """The most common entries before and after."""
    report.heading("Balance")
    cap = recipe.balance.cap if recipe.balance else 0
    report.table(
        ["entry", "samples before", "after"],
        found["common"],
        f"The most common of {found['entries']:,} entries; {found['entries_found']:,} occur, "
        f"{found['entries_above_cap']:,} of them in more than {cap:,} samples. A sample that a rarer word keeps counts "
        "under all its words, so that common ones stay above the cap.",
    )
