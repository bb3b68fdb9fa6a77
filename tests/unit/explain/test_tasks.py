"""Explanations of captioners, VQA models and classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explain.cli import main
from explain.targets import score
from explain.tasks import LabelTarget, TextTarget, explain_answer, explain_caption, explain_label, text_pieces
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ChooseTask, ClassifyTask
from finetune.language_models import small_language_model
from finetune.model import VisionLanguageModel
from finetune.recipe_model import Mlp, SmallLanguageModel
from finetune.recipe_task import CaptionTask, Decoding, VqaTask
from finetune.text import make_pair, pack, train_tokenizer

WORDS = ["a red cat on the left", "two blue dogs", "Is there a dog?", "yes", "no"]
CAPTION = "two blue unicorns"


def task_model(encoder, task) -> VisionLanguageModel:
    tokenizer = train_tokenizer(WORDS, 300)
    torch.manual_seed(1)
    config = SmallLanguageModel(width=32, layers=2, heads=2, context=64, dropout=0.0, vocabulary=300)
    language_model = small_language_model(config, tokenizer)
    torch.nn.init.normal_(language_model.get_input_embeddings().weight, std=1.0)
    decoding = Decoding(max_new_tokens=6)
    return VisionLanguageModel(encoder, Mlp(merge=1), language_model, tokenizer, task, decoding).eval()


@pytest.fixture(scope="module", autouse=True)
def thaw(explained):
    yield
    for encoder in explained.values():
        encoder.model.requires_grad_(True)  # the encoders are shared; task models froze their towers


@pytest.mark.parametrize(("kind", "method"), [("vit", "chefer"), ("resnet", "occlusion")])
def test_a_captions_words_add_up_to_the_loss_it_was_trained_with(explained, pictures, kind, method):
    model = task_model(explained[kind], CaptionTask())
    images = pictures(model.encoder, 1)
    ids, words, spans = text_pieces(model.tokenizer, CAPTION, behind_prompt=False)
    assert words == CAPTION.split()
    assert [stop - start for start, stop in spans][2] > 1  # an unknown word of several pieces
    pixels = model.encoder.pixels(images)
    with torch.no_grad():
        each = [float(score(TextTarget(model, [], ids, span), pixels)[0]) for span in spans]
        batch = pack([make_pair(model.tokenizer, "", CAPTION)], model.tokenizer.pad_token_id)
        batch["labels"][batch["labels"] == model.tokenizer.eos_token_id] = -100  # the end is no word
        loss = float(model(image_of_text=torch.zeros(1, dtype=torch.int64), images=images, **batch))
    assert sum(each) == pytest.approx(-loss, abs=1e-3)
    found = explain_caption(model, images[0], caption=CAPTION, method=method)
    assert [one.title for one in found] == CAPTION.split()
    assert [one.score for one in found] == pytest.approx(each, abs=1e-4)
    assert len({one.heat.tobytes() for one in found}) == 3  # each word has a map of its own
    for one in found:
        assert np.isfinite(one.heat).all()
        assert np.abs(one.heat).max() > 0
    own = explain_caption(model, images[0], method="gradcam")
    assert [one.title for one in own] == model.caption([images[0]])[0].split()


def test_an_answer_and_its_question(explained, pictures):
    model = task_model(explained["vit"], VqaTask())
    image = pictures(model.encoder, 1)[0]
    found = explain_answer(model, image, "Is there a dog?")
    assert [word for word, _ in found.words] == ["Is", "there", "a", "dog?"]
    assert found.title.startswith("Is there a dog? ")
    assert found.heat.shape == (4, 4)
    answer = model.answer([image], ["Is there a dog?"])[0]
    pair = make_pair(model.tokenizer, model.prompt("Is there a dog?"), answer)
    target = TextTarget(model, pair.prompt, pair.answer[:-1], (0, len(pair.answer) - 1))
    with torch.no_grad():
        assert found.score == pytest.approx(
            float(score(target, model.encoder.pixels(image[None]))[0]), abs=1e-4
        )


@pytest.mark.parametrize(("kind", "picture"), [("vit", "tokens"), ("timm_cnn", "finer_tokens")])
def test_an_answer_that_is_chosen_from_a_list(explained, pictures, kind, picture, tmp_path, make_picture):
    torch.manual_seed(1)
    fusion = {"kind": "cross_attention", "width": 16, "heads": 2, "picture": picture}
    model = FusionClassifier(
        explained[kind], ChooseTask.model_validate({"fusion": fusion}), ("no", "yes", "2")
    )
    image = pictures(model.eval().encoder, 1)[0]
    question = "Is there a dog?"
    found = explain_answer(model, image, question)
    assert found.title == f"{question} {model.answer([image], [question])[0]}"
    assert [word for word, _ in found.words] == ["Is", "there", "a", "dog?"]
    for answer in ("no", "2"):
        one = explain_answer(model, image, question, answer=answer)
        logit = model.scores([image], [question])[0, model.labels.index(answer)].logit()
        assert one.score == pytest.approx(float(logit), abs=1e-4)
        assert np.abs(one.heat).max() > 0
    with pytest.raises(ValueError, match="no answer 'three' in the model's list of 3"):
        explain_answer(model, image, question, answer="three")
    folder = model.save(tmp_path / "chooser")
    (tmp_path / "cat.jpg").write_bytes(make_picture(1))
    call = ["--image", str(tmp_path / "cat.jpg"), "--out", str(tmp_path / "cat.png"), "--device", "cpu"]
    assert main(["--vqa", str(folder), *call, "--question", question]) == 0
    classifier = (
        FusionClassifier(explained[kind], ClassifyTask(), ("no", "yes")).eval().save(tmp_path / "posts")
    )
    with pytest.raises(ValueError, match="was trained for classify: expected a model for questions"):
        main(["--vqa", str(classifier), *call, "--question", question])


@pytest.mark.parametrize(
    "fusion",
    [
        {"kind": "tanh"},
        {"kind": "tanh", "picture": "mean_max"},
        {"kind": "co_attention", "width": 16, "heads": 2},
        {"kind": "cross_attention", "width": 16, "heads": 2},
        {"kind": "cross_attention", "width": 16, "heads": 2, "picture": "finer_tokens"},
    ],
)
def test_a_label_with_and_without_a_text(explained, pictures, fusion):
    torch.manual_seed(1)
    task = ClassifyTask.model_validate({"fusion": fusion, "labels": ("bad", "good")})
    tower = "timm_cnn" if fusion.get("picture") == "finer_tokens" else "vit"
    model = FusionClassifier(explained[tower], task, ("bad", "good")).eval()
    image = pictures(model.encoder, 1)[0]
    found = explain_label(model, image, "what a day", label="good")
    assert [word for word, _ in found.words] == ["what", "a", "day"]
    other = explain_label(model, image, "what a day", label="bad")
    expected = model.classify([image], ["what a day"])[0]
    share = 1 / (1 + np.exp(other.score - found.score))
    assert share == pytest.approx(expected["good"], abs=1e-4)
    with torch.no_grad():
        pixels = model.encoder.pixels(image[None])
        gap = score(LabelTarget(model, ["what a day"], 1), pixels) - score(
            LabelTarget(model, ["what day"], 1), pixels
        )
    assert dict(found.words)["a"] == pytest.approx(float(gap[0]), abs=1e-4)
    assert explain_label(model, image, None).words == []
    with pytest.raises(ValueError, match="no label 'great': expected one of bad, good"):
        explain_label(model, image, None, label="great")


def test_the_wrong_task_and_nothing_to_explain(explained, pictures, tmp_path, make_picture, capsys):
    model = task_model(explained["vit"], CaptionTask())
    folder = model.save(tmp_path / "captioner")
    (tmp_path / "cat.jpg").write_bytes(make_picture(1))
    call = ["--image", str(tmp_path / "cat.jpg"), "--out", str(tmp_path / "cat.png"), "--device", "cpu"]
    assert main(["--captioner", str(folder), *call, "--text", CAPTION]) == 0
    assert (tmp_path / "cat.png").stat().st_size > 1000
    assert "unicorns: score" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"was trained for caption: expected a model for questions \(vqa, mixed or choose\)"
    ):
        main(["--vqa", str(folder), *call, "--question", "why?"])
    with pytest.raises(ValueError, match="the text has no words"):
        explain_caption(model, pictures(model.encoder, 1)[0], caption=" ")
