"""VQA accuracy: hand-worked cases, and figures that the official script gave for the same predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.vqa_accuracy import normalise, question_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    ("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_closed_form_of_ten_humans(agree, expected, mode):
    answers = ["yes"] * agree + [f"other{number}" for number in range(10 - agree)]
    assert question_accuracy("yes", answers, mode) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("none", "0"),
        ("A", ""),
        ("5.", "5"),
        ("3.5", "3.5"),
        ("well-known", "well known"),  # no space beside the mark: it becomes one
        ("red, blue", "red blue"),
        ("1,000 men/women", "1000 menwomen"),  # a comma between digits deletes all marks
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_the_two_modes_differ_where_the_script_has_its_quirks():
    same = ["two"] * 10
    assert question_accuracy("2", same, "official") == 0.0  # ten equal answers: nothing is normalised
    assert question_accuracy("2", same, "fixed") == 1.0
    no_id = [{"answer": "cat"}] * 8 + [{"answer": "dog"}] * 2
    assert question_accuracy("cat", no_id, "official") == pytest.approx(0.2)  # equal records vanish together
    assert question_accuracy("cat", no_id, "fixed") == 1.0
    with_id = [{**answer, "answer_id": number} for number, answer in enumerate(no_id)]
    assert question_accuracy("cat", with_id, "official") == 1.0


@pytest.mark.parametrize(
    ("keep_id", "style", "official", "fixed"),
    [
        # From the official script itself, run once on these files and predictions.
        (True, "{}", 97.003546, 97.003546),
        (True, "The {}.", 61.719858, 97.003546),
        (False, "{}", 23.374704, 97.003546),
    ],
)
def test_figures_of_the_official_script(shared: Path, keep_id, style, official, fixed):
    file = shared / "vqav2_small" / "v2_mscoco_val2014_annotations.json"
    rows = json.loads(file.read_text())["annotations"]
    guesses = [
        style.format(
            row["multiple_choice_answer"].capitalize() if style != "{}" else row["multiple_choice_answer"]
        )
        for row in rows
    ]
    answers = [
        [
            {key: value for key, value in answer.items() if keep_id or key != "answer_id"}
            for answer in row["answers"]
        ]
        for row in rows
    ]
    types = {"answer_type": [row["answer_type"] for row in rows]}
    result = vqa_accuracy(guesses, answers, mode="official", types=types)
    assert 100 * result["accuracy"] == pytest.approx(official, abs=1e-6)
    assert set(result["by_answer_type"]) == {"yes/no", "number", "other"}
    assert (result["questions"], result["mode"]) == (564, "official")
    assert 100 * vqa_accuracy(guesses, answers)["accuracy"] == pytest.approx(fixed, abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="without human answers"):
        question_accuracy("yes", [])
    with pytest.raises(ValueError, match="expected 'official' or 'fixed'"):
        question_accuracy("yes", ["yes"], "loose")  # pyright: ignore
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        vqa_accuracy(["yes"], [["yes"], ["no"]])
    with pytest.raises(ValueError, match="no questions"):
        vqa_accuracy([], [])
