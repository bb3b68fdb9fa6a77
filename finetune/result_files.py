"""Result and annotation files of COCO captions and of VQA, read with every way of being wrong named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 3  # ids that a message names


@dataclass(frozen=True)
class Annotated:
    """One question of a VQA annotation file: `answers` are its records, `kinds` its types, `image` its picture."""

    answers: list[dict[str, Any]]
    kinds: dict[str, str]
    image: str


def read_json(path: Path) -> Any:
    """Any JSON, in UTF-8 with or without a byte-order mark.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not UTF-8, or not JSON; with the line.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and error.lineno > 1
        hint = (
            ". One object a line, as `predict` writes, is no results file: expected one list" if lines else ""
        )
        raise ValueError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}{hint}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply to be such a file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder: expected a .json file") from error


def entries(path: Path, content: Any, what: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with the place that a message names."""
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of {what}, got {type(content).__name__}")
    for number, entry in enumerate(content):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object ({what}), got {type(entry).__name__}")
        yield where, entry


def member(path: Path, content: Any, name: str, what: str) -> Any:
    """A list inside the object that a file holds."""
    if not isinstance(content, dict) or name not in content:
        found = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected {what} with the key {name!r}, found {found or 'nothing'}")
    return content[name]


def identity(where: str, entry: Mapping[str, Any], name: str) -> str:
    """An id, number or text, as a text."""
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{where}: expected {name}, a number or a text, got {value!r}")
    return str(value)


def text(where: str, entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected the text {name!r}, got {value!r}")
    return value


def read_predictions(path: Path, key: str, value: str, *, allow_empty: bool = False) -> dict[str, str]:
    """A results file: `[{"image_id": 1, "caption": "..."}]`, or `question_id` and `answer`.

    Args:
        path: The file.
        key: Name of the id.
        value: Name of the text.
        allow_empty: Take texts without a character as they are.

    Returns:
        Text by id, in the order of the file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, an id twice, or an empty text.
    """
    found: dict[str, str] = {}
    for where, entry in entries(path, read_json(path), f"{{{key!r}: ..., {value!r}: ...}}"):
        name = identity(where, entry, key)
        if name in found:
            raise ValueError(f"{where}: {key} {name} a second time; each needs exactly one {value}")
        written = text(where, entry, value)
        if not written.strip() and not allow_empty:
            raise ValueError(
                f"{where}: the {value} of {key} {name} is empty. If the model wrote nothing, --allow-empty counts it "
                "as it is"
            )
        found[name] = written
    if not found:
        raise ValueError(f"{path}: no predictions in it")
    return found


def read_captions(path: Path) -> dict[str, list[str]]:
    """A COCO caption annotation file: captions by image id.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, an image twice, a caption of an image that is not listed, an empty caption.
    """
    content = read_json(path)
    annotations = member(path, content, "annotations", "COCO captions")
    found: dict[str, list[str]] = {}
    listed = "images" in content
    if listed:
        for where, image in entries(path, content["images"], "images"):
            name = identity(f"{where} of images", image, "id")
            if name in found:
                raise ValueError(f"{where} of images: id {name} a second time")
            found[name] = []
    for where, entry in entries(path, annotations, "annotations"):
        name = identity(where, entry, "image_id")
        caption = text(where, entry, "caption")
        if not caption.strip():
            raise ValueError(f"{where}: the caption of image_id {name} is empty")
        if listed and name not in found:
            raise ValueError(f"{where}: image_id {name} is not among the file's images")
        found.setdefault(name, []).append(caption)
    if not any(found.values()):
        raise ValueError(f"{path}: no captions in it")
    return found


def read_answers(path: Path) -> dict[str, Annotated]:
    """A VQA annotation file: the humans' answers by question id, in the order of the file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, a question twice, or one without answers.
    """
    found: dict[str, Annotated] = {}
    content = member(path, read_json(path), "annotations", "VQA annotations")
    for where, entry in entries(path, content, "annotations"):
        name = identity(where, entry, "question_id")
        if name in found:
            raise ValueError(f"{where}: question_id {name} a second time")
        answers = entry.get("answers")
        if not isinstance(answers, list) or not answers:
            raise ValueError(
                f"{where}: question_id {name} has no answers: expected ten records with the key 'answer'"
            )
        for answer in answers:
            if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
                raise ValueError(f"{where}: expected answers like {{'answer': 'yes'}}, got {answer!r}")
        kinds = {kind: text(where, entry, kind) for kind in ("answer_type", "question_type") if kind in entry}
        found[name] = Annotated(answers, kinds, str(entry.get("image_id", name)))
    if not found:
        raise ValueError(f"{path}: no annotations in it")
    return found


def read_questions(path: Path) -> set[str]:
    """The ids of a VQA question file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, a question twice, or an empty one.
    """
    found: set[str] = set()
    content = member(path, read_json(path), "questions", "VQA questions")
    for where, entry in entries(path, content, "questions"):
        name = identity(where, entry, "question_id")
        if name in found:
            raise ValueError(f"{where}: question_id {name} a second time")
        if not text(where, entry, "question").strip():
            raise ValueError(f"{where}: the question of question_id {name} is empty")
        found.add(name)
    return found


def match(
    predicted: Iterable[str], expected: Iterable[str], key: str, files: tuple[Path, Path], *, subset: bool
) -> list[str]:
    """The ids to judge, in the order of the predictions.

    Args:
        predicted: Ids of the predictions.
        expected: Ids that have references.
        key: Their name, for messages.
        files: Predictions and references.
        subset: Judge only what was predicted, instead of asking for all.

    Raises:
        ValueError: Predictions without a reference; or, unless `subset`, references without a prediction.
    """
    predicted, known = list(predicted), list(expected)
    extra = sorted(set(predicted) - set(known), key=natural)
    missing = sorted(set(known) - set(predicted), key=natural)
    if extra:
        raise ValueError(
            f"{files[0]}: {len(extra)} of {len(predicted)} predictions are of a {key} that {files[1]} does not have: "
            f"{shown(extra)}"
        )
    if missing and not subset:
        raise ValueError(
            f"{files[0]}: no prediction for {len(missing)} of {len(known)} {key}s of {files[1]}: {shown(missing)}. "
            "--subset judges only what was predicted, which is another number"
        )
    return predicted


def natural(name: str) -> tuple[int, str]:
    """Numbers in their own order."""
    return (len(name), name) if name.isdecimal() else (1 << 30, name)


def shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
