"""Readers of compositional sets in the layouts in which they are given away, and their scores by a model.

| set | layout |
|---|---|
| winoground | `examples.jsonl` with `image_0`, `image_1`, `caption_0`, `caption_1`; pictures in `images/NAME.png` |
| sugarcrepe | `add_att.json`, ... : `{number: {filename, caption, negative_caption}}`; pictures of COCO val2017 |
| aro_relation, aro_attribute | `visual_genome_relation.json`, `visual_genome_attribution.json`: a list with `image_path`, `bbox_x/y/w/h`, `true_caption`, `false_caption`, and `relation_name`, or `attributes` |
| aro_order | `order.json`: a list with `image` and `caption_options`, the true caption first: what the authors' COCO_Order and Flickr30k_Order make in memory |
| winogavil | `winogavil.jsonl`: `cue`, `candidates`, `associations` (names of pictures) |
"""  # noqa: E501 - a table

from __future__ import annotations

import ast
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.faults import Fault
from pretrain.encoder import Encoder
from retrieval import compositional
from retrieval.embed import evaluating
from retrieval.labelled import spaced
from retrieval.provenance import text_hash
from retrieval.share import ALONE, Share

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Case:
    """One question: every picture is scored against every caption.

    Attributes:
        images: Files.
        texts: Captions.
        group: Kind, relation or attributes; empty where the set has none.
        box: Left, top, width and height of the part of the picture that is meant; None for all of it.
        right: Numbers of the right pictures of a cue (WinoGAViL).
    """

    images: tuple[Path, ...]
    texts: tuple[str, ...]
    group: str = ""
    box: tuple[int, int, int, int] | None = None
    right: tuple[int, ...] = ()


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It is no JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the set's annotations there")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one JSON object a line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the set's annotations there")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from error


def winoground_cases(folder: Path, images: Path) -> list[Case]:
    records = read_lines(folder / "examples.jsonl")
    return [
        Case((named(images, r["image_0"]), named(images, r["image_1"])), (r["caption_0"], r["caption_1"]))
        for r in records
    ]


def sugarcrepe_cases(folder: Path, images: Path) -> list[Case]:
    kinds = [kind for kind in SUGARCREPE if (folder / f"{kind}.json").is_file()]
    if not kinds:
        raise FileNotFoundError(f"{folder}: none of {', '.join(f'{kind}.json' for kind in SUGARCREPE)} there")
    return [
        Case((images / r["filename"],), (r["caption"], r["negative_caption"]), kind)
        for kind in kinds
        for r in read_json(folder / f"{kind}.json").values()
    ]


def aro_cases(folder: Path, images: Path, name: str, group: str) -> list[Case]:
    return [
        Case(
            (images / r["image_path"],),
            (r["true_caption"], r["false_caption"]),
            r[group] if isinstance(r[group], str) else "_".join(r[group]),
            (int(r["bbox_x"]), int(r["bbox_y"]), int(r["bbox_w"]), int(r["bbox_h"])),
        )
        for r in read_json(folder / f"{name}.json")
    ]


def order_cases(folder: Path, images: Path) -> list[Case]:
    return [
        Case((images / r["image"],), tuple(r["caption_options"])) for r in read_json(folder / "order.json")
    ]


def winogavil_cases(folder: Path, images: Path) -> list[Case]:
    cases = []
    for record in read_lines(folder / "winogavil.jsonl"):
        candidates, right = listed(record["candidates"]), listed(record["associations"])
        strange = [name for name in right if name not in candidates]
        if strange:
            raise ValueError(
                f"{folder}: the cue {record['cue']!r} has {strange[0]!r} that is no candidate of it"
            )
        article = "An" if record["cue"][:1].lower() in "aeiou" else "A"
        cases.append(
            Case(
                tuple(named(images, name) for name in candidates),
                (f"{article} {record['cue']}",),
                right=tuple(candidates.index(name) for name in right),
            )
        )
    return cases


def listed(value: Any) -> list[str]:
    """A list, also where a table holds it as its text."""
    try:
        return list(ast.literal_eval(value)) if isinstance(value, str) else list(value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"expected a list of pictures' names, got {value!r}") from error


def named(folder: Path, name: str) -> Path:
    """A picture that is named with or without its suffix."""
    path = folder / name
    if path.suffix.lower() in SUFFIXES:
        return path
    return next((folder / f"{name}{end}" for end in SUFFIXES if (folder / f"{name}{end}").is_file()), path)


READERS = {
    "winoground": winoground_cases,
    "sugarcrepe": sugarcrepe_cases,
    "aro_relation": lambda folder, images: aro_cases(
        folder, images, "visual_genome_relation", "relation_name"
    ),
    "aro_attribute": lambda folder, images: aro_cases(
        folder, images, "visual_genome_attribution", "attributes"
    ),
    "aro_order": order_cases,
    "winogavil": winogavil_cases,
}


def compositional_metrics(
    encoder: Encoder,
    name: str,
    folder: str | Path,
    images: str | Path | None = None,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    share: Share = ALONE,
) -> dict[str, Any]:
    """Numbers of a compositional set.

    Args:
        encoder: The model.
        name: One of `READERS`.
        folder: Where the annotations are.
        images: Where the pictures are; `folder/images` when None.
        batch_size: Pictures at a time.
        limit: Only so many cases, spread evenly over the set.
        share: This process's share of the embedding; all processes get the numbers.

    Returns:
        What the set's function in `retrieval.compositional` gives.

    Raises:
        FileNotFoundError: Annotations or a picture are absent.
        ValueError: An unknown set, damaged annotations, no cases, or a picture that cannot be decoded: a
            number over fewer cases would be another number.
    """
    cases = read_cases(name, folder, images, limit=limit)
    options = {len(case.texts) for case in cases}
    if len(options) > 1:
        raise ValueError(
            f"{folder}: expected as many captions in every case of {name}, found {sorted(options)}"
        )
    scores = case_scores(encoder, cases, batch_size, share)
    groups = [case.group for case in cases]
    if name == "winoground":
        return compositional.winoground(np.stack([each.T for each in scores]))  # caption by image
    if name == "winogavil":
        return compositional.winogavil([each[:, 0] for each in scores], [case.right for case in cases])
    rows = np.concatenate(scores)  # one picture a case
    if name == "aro_order":
        return compositional.accuracy(rows)
    if name == "sugarcrepe":
        return compositional.sugarcrepe(rows, groups)
    least = compositional.VG_A_LEAST if name == "aro_attribute" else 1
    return compositional.aro(rows, groups, least=least)


def read_cases(
    name: str, folder: str | Path, images: str | Path | None = None, *, limit: int | None = None
) -> list[Case]:
    """The cases of a set; see `compositional_metrics`."""
    if name not in READERS:
        raise ValueError(f"no compositional set {name!r}: expected one of {', '.join(READERS)}")
    folder = Path(folder)
    place = folder / "images" if images is None else Path(images)
    try:
        cases = READERS[name](folder, place)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not the layout of {name}: {error!r}") from error
    if not cases:
        raise ValueError(f"{folder}: no cases of {name}")
    return cases if limit is None else [cases[place] for place in spaced(len(cases), limit)]


def cases_hash(cases: Sequence[Case]) -> str:
    """A hash of what is asked: names of pictures, captions, groups, boxes and right answers."""
    return text_hash(
        repr(([path.name for path in case.images], case.texts, case.group, case.box, case.right))
        for case in cases
    )


def case_scores(
    encoder: Encoder, cases: Sequence[Case], batch_size: int, share: Share = ALONE
) -> list[np.ndarray]:
    """Cosines of each case, `(pictures, captions)` float64; every text and whole picture is embedded once."""
    texts = list(dict.fromkeys(text for case in cases for text in case.texts))
    pictures = list(dict.fromkeys((path, case.box) for case in cases for path in case.images))
    with evaluating(encoder):
        text_rows = list(
            share.together(
                encoder.encode_texts(texts[start : start + batch_size]).cpu()
                for start in share.part(range(0, len(texts), batch_size))
            )
        )
        image_rows = list(
            share.together(
                encoder.encode_images(
                    [read_part(*each) for each in pictures[start : start + batch_size]]
                ).cpu()
                for start in share.part(range(0, len(pictures), batch_size))
            )
        )
    x, y = (F.normalize(torch.cat(rows).double(), dim=1).numpy() for rows in (image_rows, text_rows))
    image_place = {each: row for row, each in enumerate(pictures)}
    text_place = {text: row for row, text in enumerate(texts)}
    return [
        np.array(
            [
                [float(x[image_place[path, case.box]] @ y[text_place[text]]) for text in case.texts]
                for path in case.images
            ]
        )
        for case in cases
    ]


def read_part(path: Path, box: tuple[int, int, int, int] | None) -> bytes:
    """A picture, or the part of it in a box, as an encoded file.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It cannot be decoded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a picture of the set there")
    content = path.read_bytes()
    try:
        from data.transforms import decode_image

        whole = decode_image(content)
    except Fault as fault:
        raise ValueError(f"{path}: {fault}") from fault
    if box is None:
        return content
    left, top, width, height = box
    part = whole[:, max(top, 0) : top + height, max(left, 0) : left + width]
    if not part.numel():
        raise ValueError(f"{path}: the box {box} lies outside the picture")
    file = io.BytesIO()
    Image.fromarray(part.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
