"""Texts made of class labels: names, numbers, several at once, and what is no label."""

from __future__ import annotations

import numpy as np
import pytest

from data.faults import Fault
from data.labels import LabelTexts
from data.pairs import PairLoad
from data.samples import RawSample
from data.transforms import EvalTransform

PETS = LabelTexts(templates=("a {}.", "my {}, a pet"), classes=("cat", "dog"))


def sample(make_picture, **record) -> RawSample:
    return RawSample("k", "s.tar", 0, make_picture(0), "jpg", record, None)


@pytest.mark.parametrize("label", [1, "1", " 1 ", "dog", "dog\n", ["dog"]])
def test_a_label_fills_all_templates(make_picture, label):
    assert PETS.texts(sample(make_picture, label=label)) == ["a dog.", "my dog, a pet"]


def test_without_a_list_of_classes_names_are_taken_as_they_are(make_picture):
    assert LabelTexts().texts(sample(make_picture, label=["a fox", "Küche"])) == [
        "a photo of a a fox.",
        "a photo of a Küche.",
    ]
    assert LabelTexts("kind").texts(sample(make_picture, label="fox")) == []


@pytest.mark.parametrize(
    ("texts", "label", "message"),
    [
        (PETS, 2, "label should be one of 2 classes or its number, got 2"),
        (PETS, "fox", "one of 2 classes or its number, got 'fox'"),
        (LabelTexts(), 3, "label should be a class name, got 3"),
        (LabelTexts(), " ", "a class name, got ''"),
        (PETS, True, "got True"),
    ],
)
def test_bad_labels(make_picture, texts, label, message):
    with pytest.raises(Fault, match=message):
        texts.texts(sample(make_picture, label=label))


def test_templates_need_a_place():
    with pytest.raises(ValueError, match=r"expected templates with \{\} for the class name, got \['a pet'\]"):
        LabelTexts(templates=("a pet",))
    with pytest.raises(ValueError, match="got none"):
        LabelTexts(templates=())


def test_samples_without_a_label_keep_their_captions(make_picture):
    load, rng = PairLoad(EvalTransform(16), "all", labels=PETS), np.random.default_rng(0)
    assert load(sample(make_picture, label=0, caption="x"), rng)[1] == ["a cat.", "my cat, a pet"]
    assert load(sample(make_picture, caption="x"), rng)[1] == ["x"]
    with pytest.raises(Fault, match=r"no label and no caption in KEY\.json"):
        load(sample(make_picture), rng)
