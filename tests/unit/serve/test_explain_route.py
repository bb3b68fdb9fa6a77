"""`/v1/explain`: the library's maps over a socket, beside other requests, and clear refusals."""

from __future__ import annotations

import base64
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from explain.methods import explain_pair
from explain.tasks import explain_answer, explain_caption, explain_label
from serve.app import create_app
from serve.cli import explain_methods
from serve.explaining import twin
from serve.settings import Batching, Limits, Settings


@pytest.fixture
def content(make_picture):
    return make_picture(5, (60, 40))


def ask(live, content, picture_field, **fields):
    status, answer, _ = live.ask("/v1/explain", {"image": picture_field(content), **fields})
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("method", ["chefer", "gradcam", "occlusion"])
def test_a_text_s_map_and_words_are_the_library_s(live, models, content, picture_field, method):
    answer = ask(live, content, picture_field, text="a red cat", method=method)
    expected = explain_pair(models.encoder, content, "a red cat", method=method)
    (found,) = answer["maps"]
    np.testing.assert_allclose(found["heat"], expected.heat, rtol=1e-4, atol=1e-6)
    assert found["score"] == pytest.approx(expected.score, abs=1e-5)
    assert [each["word"] for each in found["words"]] == ["a", "red", "cat"]
    values = [value for _, value in expected.words]
    assert [each["relevance"] for each in found["words"]] == pytest.approx(values, abs=1e-5)
    assert answer["method"] == method
    assert answer["model"] == {"name": "model", "fingerprint": models.encoder.fingerprint}
    assert answer["picture"] is None
    assert found["png"] is None


def test_a_caption_is_explained_word_by_word(live, models, content, picture_field):
    answer = ask(live, content, picture_field, of="caption", text="two blue dogs", png=True)
    expected = explain_caption(models.captioner[0], content, caption="two blue dogs")
    assert [each["title"] for each in answer["maps"]] == ["two", "blue", "dogs"]
    for found, wanted in zip(answer["maps"], expected, strict=True):
        np.testing.assert_allclose(found["heat"], wanted.heat, rtol=1e-4, atol=1e-6)
        assert found["score"] == pytest.approx(wanted.score, abs=1e-4)
        picture = Image.open(io.BytesIO(base64.b64decode(found["png"])))
        assert (picture.format, picture.size) == ("PNG", (320, 320))
    assert Image.open(io.BytesIO(base64.b64decode(answer["picture"]))).size == (320, 320)
    assert answer["model"] == models.captioner[1].model_dump()
    own = models.captioner[0].caption([content])[0]
    answer = ask(live, content, picture_field, of="caption")
    assert answer["said"] == " ".join(own.split())
    assert [each["title"] for each in answer["maps"]] == own.split()


def test_answers_and_labels(live, models, content, picture_field):
    question = "how many cats are there?"
    answer = ask(live, content, picture_field, of="answer", question=question)
    expected = explain_answer(models.vqa[0], content, question)
    assert answer["said"] == models.vqa[0].answer([content], [question])[0]
    np.testing.assert_allclose(answer["maps"][0]["heat"], expected.heat, rtol=1e-4, atol=1e-6)
    assert [each["word"] for each in answer["maps"][0]["words"]] == question.split()
    answer = ask(live, content, picture_field, of="label", text="a red cat", label="neutral")
    expected = explain_label(models.classifier[0], content, "a red cat", label="neutral")
    assert answer["said"] == expected.title
    np.testing.assert_allclose(answer["maps"][0]["heat"], expected.heat, rtol=1e-4, atol=1e-6)
    assert answer["model"]["name"] == "classifier"


def test_a_twin_shares_tensors_and_no_module(models):
    for model in (models.encoder, models.captioner[0], models.classifier[0]):
        found = twin(model)
        ours, theirs = (getattr(each, "model", each) for each in (model, found))
        if isinstance(ours, torch.nn.Module):
            for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert one is other
            assert not set(ours.modules()) & set(theirs.modules())


def test_explanations_beside_embeddings_disturb_neither(live, models, content, picture_field):
    expected = models.encoder.encode_images([content]).numpy()
    wanted = explain_pair(models.encoder, content, "a red cat", method="gradcam").heat
    wrong: list[str] = []

    def embed():
        for _ in range(12):
            status, answer, _ = live.ask("/v1/embed/image", {"images": [picture_field(content)]})
            if status != 200 or np.abs(np.array(answer["embeddings"]) - expected).max() > 1e-5:
                wrong.append(str(answer)[:200])

    thread = threading.Thread(target=embed)
    thread.start()
    for method in ["gradcam", "chefer"] * 4:
        answer = ask(live, content, picture_field, text="a red cat", method=method)
        if method == "gradcam":
            np.testing.assert_allclose(answer["maps"][0]["heat"], wanted, rtol=1e-4, atol=1e-6)
    thread.join()
    assert not wrong


def test_what_cannot_be_explained_is_refused(live, content, picture_field):
    def refusal(status, **fields):
        found, answer, _ = live.ask("/v1/explain", {"image": picture_field(content), **fields})
        assert found == status, answer
        return answer["error"]["message"]

    assert "some words in text" in refusal(422, text="  ")
    assert "some words in question" in refusal(422, of="answer")
    assert "question goes with of=answer" in refusal(422, text="a", question="b")
    assert "text does not go with of=answer" in refusal(422, of="answer", question="a", text="b")
    assert "or no text for the model's own" in refusal(422, of="caption", text=" ")
    assert "expected auto or one of chefer" in refusal(422, text="a", method="lime")
    assert "expected one of the classifier's: negative" in refusal(422, of="label", label="angry")
    assert "characters" in refusal(413, text="a" * 3000)
    assert "33 words" in refusal(413, of="caption", text="a " * 33)
    assert "room for" in refusal(422, of="caption", text="zqxjkvbw" * 30)
    assert "room for" in refusal(422, of="answer", question="zqxjkvbw " * 30)
    assert "no words to explain" in refusal(422, text="\x01\x02")
    assert refusal(422, text="a", of="feeling")


def test_the_queue_of_explanations_is_bounded_and_the_routes_follow_the_settings(
    models, run_app, content, picture_field, monkeypatch
):
    settings = Settings(
        explaining=Batching(batch=1, queue=1), explain_methods=("occlusion",), limits=Limits(maps=2)
    )
    app, go = create_app(models, settings), threading.Event()
    real = app.state.service.explanations.run
    monkeypatch.setattr(app.state.service.explanations, "run", lambda wishes: go.wait(20) and real(wishes))
    with run_app(app) as live:
        found = []
        body = {"image": picture_field(content), "of": "caption"}
        thread = threading.Thread(target=lambda: found.append(live.ask("/v1/explain", body)))
        thread.start()
        while not app.state.service.explanations.admitted:
            pass
        status, answer, headers = live.ask("/v1/explain", body)
        assert (status, answer["error"]["code"]) == (503, "busy")
        assert int(headers["retry-after"]) >= 1
        assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200
        go.set()
        thread.join()
        status, answer, _ = found[0]
        assert status == 200
        assert len(answer["maps"]) <= 2  # of a long caption, the first words
        assert live.ask("/v1/info")[1]["explain"]["text"] == ["occlusion"]
    with run_app(create_app(models, Settings(explain_methods=()))) as live:
        status, answer, _ = live.ask("/v1/explain", body)
        assert status == 404
        assert "without methods" in answer["error"]["message"]


def test_methods_of_the_command_are_checked(monkeypatch):
    assert explain_methods(("off",)) == ()
    assert explain_methods(("chefer", "occlusion")) == ("chefer", "occlusion")
    with pytest.raises(ValueError, match="no method 'chefr'"):
        explain_methods(("chefr",))
    monkeypatch.setitem(__import__("sys").modules, "shap", None)
    with pytest.raises(ImportError, match=r"heatmaps by shap needs .*pairstream\[explain\]"):
        explain_methods(("shap",))
