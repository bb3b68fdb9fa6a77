"""Heatmaps of captioners, VQA models and classifiers held against what is asked, and against random weights."""

from __future__ import annotations

import json

import pytest
import torch

from explain import verify_tasks
from explain.cli import main
from explain.tasks import text_pieces
from explain.trials import Raw, read_trial, scene_samples
from explain.verify_tasks import (
    caption_questions,
    label_questions,
    named,
    question_about,
    verify_task,
    vqa_questions,
)
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ClassifyTask
from finetune.language_models import small_language_model
from finetune.model import VisionLanguageModel
from finetune.recipe_model import Mlp, SmallLanguageModel
from finetune.recipe_task import CaptionTask, Decoding, VqaTask
from finetune.text import train_tokenizer


@pytest.fixture
def task_model(explained):
    """`task_model(task)`: a tiny model for it behind the shared encoder."""

    def make(task):
        words = ["a red cat on the left", "two blue dogs", "Is there a dog?", "yes", "no"]
        tokenizer = train_tokenizer(words, 300)
        torch.manual_seed(1)
        config = SmallLanguageModel(width=32, layers=2, heads=2, context=64, dropout=0.0, vocabulary=300)
        language_model = small_language_model(config, tokenizer)
        torch.nn.init.normal_(language_model.get_input_embeddings().weight, std=1.0)
        encoder, decoding = explained["vit"], Decoding(max_new_tokens=6)
        return VisionLanguageModel(encoder, Mlp(merge=1), language_model, tokenizer, task, decoding).eval()

    yield make
    explained["vit"].model.requires_grad_(True)  # the encoder is shared; task models froze its tower


def two_kinds(encoder, count: int):
    """Samples of exactly two kinds of objects, and what they show."""
    found = [
        (sample, raw)
        for sample in scene_samples(60, 64, 0)
        if (raw := read_trial(encoder, *sample)) is not None
    ]
    return [sample for sample, _ in found[:count]], [raw for _, raw in found[:count]]


def test_the_words_of_a_kind_are_found_in_either_number(task_model):
    model = task_model(CaptionTask())
    ids, words, places = text_pieces(
        model.tokenizer, "Two piglets, and a slice of watermelon", behind_prompt=False
    )
    first = named(words, places, "pig")
    assert first is not None
    assert words[1] == model.tokenizer.decode(ids[first[0] : first[1]]).strip()
    last = named(words, places, "slice of watermelon")
    assert last == (places[4][0], len(ids))
    assert named(words, places, "cow") is None


def test_a_captioner_is_asked_about_what_it_names(task_model, monkeypatch):
    model = task_model(CaptionTask())
    samples, raws = two_kinds(model.encoder, 3)
    texts = iter([f"{raws[0].names[0]} and a {raws[0].names[1]}", "nothing", f"a {raws[2].names[1]}"])
    monkeypatch.setattr(model, "caption", lambda images: [next(texts) for _ in images])
    counts = [0, 0]
    found = list(caption_questions(model, samples, counts))
    assert counts == [3, 2]
    assert torch.equal(found[0].raw.image, raws[0].image)
    one, other = found[0].targets
    assert one.span[1] <= other.span[0]  # the words of the one come first


def raw_of(*names: str, colours=("", ""), counts=(1, 1)) -> Raw:
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    return Raw(torch.zeros(3, 4, 4, dtype=torch.uint8), names, names, nothing, nothing, colours, counts)


def test_questions_have_one_kind_for_their_answer():
    assert question_about(raw_of("cow", "car"), 0) == (
        "what animal is in the picture?",
        ("cow", "cows"),
    )
    assert question_about(raw_of("pig", "car"), 0)[1] == (
        *("pig", "piglet", "hog"),
        *("pigs", "piglets", "hogs"),
    )
    for others in (("cow", "pig"), ("cow", "stranger"), ("carrot", "banana"), ("key", "pig")):
        assert question_about(raw_of(*others), 0)[0].startswith("is there a")
    cars = raw_of("car", "bicycle", colours=("red", ""), counts=(2, 1))
    assert question_about(cars, 0) == ("what color are the cars?", ("red", "bright red"))
    balloon = raw_of("cow", "balloon", colours=("", "pink"))
    assert question_about(balloon, 1) == ("what color is the balloon?", ("pink", "rose"))


def right(raws, question: str) -> str:
    """The right answer, where a question may be about any of some pictures."""
    asked = {q: answers[0] for raw in raws for q, answers in (question_about(raw, 0), question_about(raw, 1))}
    return asked.get(question, "no")


def test_a_vqa_model_is_asked_about_what_it_knows(task_model, monkeypatch):
    model = task_model(VqaTask())
    samples, raws = two_kinds(model.encoder, 12)
    closed = [any(question_about(raw, place)[1] == ("yes",) for place in (0, 1)) for raw in raws]
    assert 0 < sum(closed) < 12
    for answer, expected in (
        (lambda raw, question: right([raw], question), 12),
        (lambda raw, question: "nothing", 0),
        (
            lambda raw, question: "yes" if right([raw], question) == "no" else right([raw], question),
            12 - sum(closed),
        ),
    ):  # the last one says yes to what is not there, so that its yes is worth nothing

        def answers(images, questions, answer=answer):
            owners = [next(raw for raw in raws if raw.image is image) for image in images]
            return [answer(raw, question) for raw, question in zip(owners, questions, strict=True)]

        monkeypatch.setattr(
            model, "answer", lambda images, questions, a=answers: a(pick(images, raws), questions)
        )
        counts = [0, 0]
        found = list(vqa_questions(model, samples, counts))
        assert len(found) == expected
        assert counts == [12, 12 - expected]


def pick(images, raws):
    """The pictures of `raws` that equal others."""
    return [next(raw.image for raw in raws if torch.equal(raw.image, image)) for image in images]


def test_the_two_tests_are_held_and_rollout_fails_them(task_model, monkeypatch):
    model = task_model(VqaTask())
    samples, raws = two_kinds(model.encoder, 12)
    monkeypatch.setattr(model, "answer", lambda images, questions: [right(raws, each) for each in questions])
    monkeypatch.setattr(verify_tasks, "scene_samples", lambda *_: samples)
    result = verify_task(model, "vqa", pictures=2, methods=("rollout",))
    assert {each["gate"] for each in result["gates"]} == {"two_text_spearman", "random_weights_spearman"}
    assert result["trials"] == 4
    assert result["rollout_fails"]  # it reads the same tokens whatever the question is
    assert result["methods"]["rollout"]["two_text_spearman"] == pytest.approx(1)
    assert result["methods"]["chefer"]["two_text_spearman"] < 1
    assert 0 <= result["methods"]["chefer"]["target_over_distractor"] <= 1


@pytest.mark.parametrize("kind", ["tanh", "cross_attention"])
def test_a_classifier_is_asked_about_two_labels_by_the_command(explained, tmp_path, capsys, kind):
    torch.manual_seed(1)
    task = ClassifyTask.model_validate({"fusion": {"kind": kind}, "labels": ("bad", "good")})
    model = FusionClassifier(explained["vit"], task, ("bad", "good")).eval()
    counts = [0, 0]
    first = next(iter(label_questions(model, scene_samples(60, 64, 0), counts)))
    assert set(first.raw.names) == {"bad", "good"}
    folder = model.save(tmp_path / "classifier")
    call = [
        "verify",
        "--classifier",
        str(folder),
        "--pictures",
        "2",
        "--methods",
        "occlusion",
        "--device",
        "cpu",
    ]
    code = main([*call, "--json", str(tmp_path / "verify.json")])
    result = json.loads((tmp_path / "verify.json").read_text())
    assert code == (0 if result["passed"] else 1)
    assert result["methods"]["chefer"]["target_over_distractor"] is None
    assert result["methods"]["chefer"]["random_weights_spearman"] < 0.99  # another tower, other maps
    assert result["box_area"] is None
    assert "two_text_spearman" in capsys.readouterr().out
    explained["vit"].model.requires_grad_(True)


def test_nothing_to_ask_about(task_model, monkeypatch):
    model = task_model(CaptionTask())
    monkeypatch.setattr(verify_tasks, "scene_samples", lambda *_: two_kinds(model.encoder, 2)[0])
    monkeypatch.setattr(model, "caption", lambda images: [" "] * len(images))
    with pytest.raises(
        ValueError, match="2 were looked at, and the model names both kinds of objects of none"
    ):
        verify_task(model, "caption", pictures=2)
    with pytest.raises(ValueError, match="pictures 1: expected at least 2"):
        verify_task(model, "caption", pictures=1)
    with pytest.raises(ValueError, match="give one of --model, --captioner, --vqa, --classifier; got none"):
        main(["verify"])
    with pytest.raises(ValueError, match="--pretrained goes with --model"):
        main(["verify", "--captioner", "x", "--pretrained", "y"])
