"""Visual Genome: photographs with dozens of described regions each, and questions."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    find_file,
    need_file,
    need_folder,
    one_answer,
    read_list,
    read_rows,
)
from data.faults import Fault
from data.pictures import open_picture
from data.shards import Sample

SMALLEST = 16  # pixels; sides of the smallest region that is cut out


@dataclass
class Photograph:
    """What the files say of one photograph."""

    where: str
    regions: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)


def samples(root: Path, *, crops: bool = False) -> Counted:
    """Visual Genome: 108,077 photographs, 5.4 million region descriptions, 1.7 million questions.

    A sample is a whole photograph with the descriptions of its regions as captions (each once), as vision-language
    pretraining uses the set; its JSON also has `regions` (`region_id`, `phrase`, `box` as x, y, width, height in
    pixels) and, where `question_answers.json` is there, `questions` (the one answer written ten times). With
    `crops` each region is a sample of its own: the part of the picture and its phrase. The set has no splits;
    about half of its pictures are COCO's too (`coco_id` in `image_data.json`): mind that when COCO is what you
    test on.

    Args:
        root: Holds `region_descriptions.json` or `question_answers.json` or both, and the pictures in `VG_100K/` and
            `VG_100K_2/`. `image_data.json`, where it is, adds `coco_id`.
        crops: Cut the regions out; those under 16 pixels are left out, and there are no questions then.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: A broken file.
    """
    root = Path(root)
    described = find_file(root, "region_descriptions.json")
    asked = find_file(root, "question_answers.json")
    if described is None and (asked is None or crops):
        described = need_file(root, "region_descriptions.json", what="regions of Visual Genome")
    folders = [need_folder(root, "VG_100K", "VG_100K_2", "images")]
    if find_folder(root, "VG_100K_2"):
        folders.append(need_folder(root, "VG_100K_2"))
    faults: list[Skipped] = []
    photographs: dict[int, Photograph] = {}
    if described is not None:
        read_regions(described, photographs, faults)
    if asked is not None and not crops:
        read_questions(asked, photographs, faults)
    coco = read_coco_ids(find_file(root, "image_data.json"))

    def place(image_id: int) -> Path:
        paths = [folder / f"{image_id}.jpg" for folder in folders]
        return next((path for path in paths if path.is_file()), paths[0])

    if crops:
        total = len(faults) + sum(len(photograph.regions) for photograph in photographs.values())
        return Counted(total, cut_out(photographs, place, faults))
    rows = []
    for image_id, photograph in photographs.items():
        captions = list(dict.fromkeys(region["phrase"] for region in photograph.regions))
        meta: dict[str, Any] = {"image_id": image_id, **coco.get(image_id, {})}
        meta |= {"regions": photograph.regions} if photograph.regions else {}
        meta |= {"questions": photograph.questions} if photograph.questions else {}
        path = place(image_id)
        rows.append(Row(path.name, path, photograph.where, captions, meta))
    return read_rows(rows, faults, captioned=asked is None)


def find_folder(root: Path, name: str) -> bool:
    """Whether a folder lies in `root` or one level below."""
    return any(path.is_dir() for path in (*root.glob(name), *root.glob(f"*/{name}")))


def read_regions(path: Path, photographs: dict[int, Photograph], faults: list[Skipped]) -> None:
    """Add the described regions."""
    for number, image in enumerate(read_list(path, "photographs with regions")):
        where = f"{path.name}[{number}]"
        image_id, regions = image.get("id", image.get("image_id")), image.get("regions")
        if not isinstance(image_id, int) or not isinstance(regions, list):
            faults.append(Skipped("bad_row", where, "expected id and regions"))
            continue
        photograph = photographs.setdefault(image_id, Photograph(where))
        for place, region in enumerate(regions):
            try:
                phrase = " ".join(region["phrase"].split())
                box = [int(region[key]) for key in ("x", "y", "width", "height")]
            except (KeyError, TypeError, ValueError, AttributeError):
                faults.append(
                    Skipped("bad_row", f"{where}.regions[{place}]", "expected phrase, x, y, width and height")
                )
                continue
            if phrase:
                photograph.regions.append(
                    {"region_id": region.get("region_id"), "phrase": phrase, "box": box}
                )


def read_questions(path: Path, photographs: dict[int, Photograph], faults: list[Skipped]) -> None:
    """Add the questions with their answers."""
    for number, image in enumerate(read_list(path, "photographs with questions")):
        where = f"{path.name}[{number}]"
        image_id, asked = image.get("id", image.get("image_id")), image.get("qas")
        if not isinstance(image_id, int) or not isinstance(asked, list):
            faults.append(Skipped("bad_row", where, "expected id and qas"))
            continue
        photograph = photographs.setdefault(image_id, Photograph(where))
        for place, row in enumerate(asked):
            try:
                question, answer = row["question"].strip(), row["answer"].strip().rstrip(".")
                entry = {"question_id": row["qa_id"], "question": question, "answers": one_answer(answer)}
            except (KeyError, TypeError, AttributeError):
                faults.append(
                    Skipped("bad_row", f"{where}.qas[{place}]", "expected qa_id, question and answer")
                )
                continue
            photograph.questions.append({**entry, "question_type": question.lower().split(" ")[0]})


def read_coco_ids(path: Path | None) -> dict[int, dict[str, int]]:
    """The COCO id of those photographs that COCO has too."""
    if path is None:
        return {}
    found: dict[int, dict[str, int]] = {}
    for row in read_list(path, "photographs"):
        image_id = row.get("image_id", row.get("id"))
        if isinstance(image_id, int) and row.get("coco_id"):
            found[image_id] = {"coco_id": row["coco_id"]}
    return found


def cut_out(
    photographs: dict[int, Photograph], place: Any, faults: list[Skipped]
) -> Iterator[Sample | Skipped]:
    """Each region as a picture of its own; a photograph is decoded once."""
    yield from faults
    for image_id, photograph in photographs.items():
        path = place(image_id)
        try:
            picture = open_picture(path.read_bytes()).convert("RGB")
        except FileNotFoundError:
            yield Skipped("missing_image", photograph.where, f"no picture {path}")
            continue
        except Fault as fault:
            yield Skipped(fault.cause, photograph.where, f"{path.name}: {fault.detail}")
            continue
        except (OSError, SyntaxError, ValueError) as error:
            yield Skipped("undecodable_image", photograph.where, f"{path.name}: {error}")
            continue
        for number, region in enumerate(photograph.regions):
            x, y, width, height = region["box"]
            left, top = max(x, 0), max(y, 0)
            right, bottom = min(x + width, picture.width), min(y + height, picture.height)
            if min(right - left, bottom - top) < SMALLEST:
                continue
            file = io.BytesIO()
            picture.crop((left, top, right, bottom)).save(file, "JPEG", quality=95)
            meta = {"image_id": image_id, "region_id": region["region_id"], "box": region["box"]}
            yield Sample(f"{image_id}-{number:03d}", file.getvalue(), "jpg", [region["phrase"]], meta)
