"""The API over a real socket: its answers are the library's."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pairstream.errors import require
from serve.app import create_app
from serve.models import folder_hash, load_models
from serve.settings import Batching, Settings


def test_embeddings_are_the_library_s(live, models, make_picture, picture_field):
    contents = [make_picture(seed, (60, 40), kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP"])]
    status, answer, headers = live.ask("/v1/embed/image", {"images": [picture_field(c) for c in contents]})
    assert status == 200
    expected = models.encoder.encode_images(contents).numpy()
    np.testing.assert_allclose(np.array(answer["embeddings"]), expected, rtol=0, atol=1e-5)
    assert answer["model"] == {
        "name": "model",
        "fingerprint": models.encoder.fingerprint,
        "dim": models.encoder.embed_dim,
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    texts = ["a red cat", "", "two dogs — naïve café 日本"]
    status, answer, _ = live.ask("/v1/embed/text", {"texts": texts})
    assert status == 200
    expected = models.encoder.encode_texts(texts).numpy()
    np.testing.assert_allclose(np.array(answer["embeddings"]), expected, rtol=0, atol=1e-5)


def test_a_request_larger_than_a_batch_keeps_its_order(models, run_app):
    texts = [f"thing {number}" for number in range(50)]
    with run_app(create_app(models, Settings(embedding=Batching(batch=7)))) as live:
        _, answer, _ = live.ask("/v1/embed/text", {"texts": texts})
    expected = models.encoder.encode_texts(texts).numpy()
    np.testing.assert_allclose(np.array(answer["embeddings"]), expected, rtol=0, atol=1e-5)


def test_search_by_words_and_by_picture(live, models, make_picture, picture_field):
    index, identity = models.index
    status, answer, _ = live.ask(
        "/v1/search", {"image": picture_field(make_picture(5)), "among": "images", "k": 3}
    )
    assert status == 200
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
    assert (answer["hits"][0]["key"], answer["hits"][0]["row"], answer["hits"][0]["text"]) == (
        "00005",
        5,
        None,
    )
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert answer["index"] == identity.model_dump()
    assert answer["model"]["fingerprint"] == index.fingerprint
    _, answer, _ = live.ask("/v1/search", {"image": picture_field(make_picture(5))})
    assert answer["among"] == "texts"
    assert all(hit["text"] for hit in answer["hits"])
    status, answer, _ = live.ask("/v1/search", {"text": "thing 3", "k": 100})
    assert answer["among"] == "images"
    assert len(answer["hits"]) == 12
    scores = (
        models.encoder.encode_texts(["thing 3"])
        @ models.encoder.encode_images([make_picture(seed) for seed in range(12)]).T
    )
    assert answer["hits"][0]["row"] == int(scores.argmax())
    status, picture, headers = live.ask(f"/v1/pictures/{answer['hits'][0]['row']}")
    assert headers["X-Index-Fingerprint"] == answer["index"]["fingerprint"]
    assert Image.open(io.BytesIO(picture)).format == "JPEG"
    assert live.ask("/v1/pictures/12")[0] == 404
    assert live.ask("/v1/pictures/-1")[0] == 404


def test_zero_shot_labels_are_a_softmax_of_scaled_cosines(live, models, make_picture, picture_field):
    labels, content = ["cat", "dog", "boat"], make_picture(2)
    status, answer, _ = live.ask(
        "/v1/classify",
        {"images": [picture_field(content)], "labels": labels, "template": "a drawing of a {}"},
    )
    assert status == 200
    rows = models.encoder.encode_texts([f"a drawing of a {label}" for label in labels])
    scores = models.encoder.encode_images([content]) @ rows.T
    shares = (scores * models.encoder.model.logit_scale.detach().exp()).softmax(dim=-1)[0]
    given = {entry["label"]: entry for entry in answer["results"][0]}
    for place, label in enumerate(labels):
        assert given[label]["probability"] == pytest.approx(shares[place].item(), abs=1e-4)
        assert given[label]["score"] == pytest.approx(scores[0, place].item(), abs=1e-5)
    probabilities = [entry["probability"] for entry in answer["results"][0]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)


def test_captions_and_answers_are_the_library_s(live, models, make_picture, picture_field):
    contents = [make_picture(seed) for seed in range(3)]
    status, answer, _ = live.ask("/v1/caption", {"images": [picture_field(content) for content in contents]})
    assert status == 200
    assert answer["captions"] == models.captioner[0].caption(contents)
    assert answer["model"] == models.captioner[1].model_dump()
    questions = ["Is there a dog?", "how many cats are there?"]
    status, answer, _ = live.ask("/v1/vqa", {"image": picture_field(contents[0]), "questions": questions})
    assert status == 200
    assert answer["answers"] == models.vqa[0].answer([contents[0]] * 2, questions)
    assert answer["model"] == models.vqa[1].model_dump()


def test_answers_may_be_chosen_from_a_list(folders, tmp_path, run_app, make_picture, picture_field):
    from finetune.fusion.model import FusionClassifier
    from finetune.fusion.recipe import ChooseTask, CrossAttention
    from pretrain.encoder import load_encoder
    from serve.app import create_app
    from serve.settings import Settings

    encoder = load_encoder(folders["model"], device="cpu")
    task = ChooseTask(fusion=CrossAttention(width=16, heads=2))
    FusionClassifier(encoder, task, ["no", "yes", "2", "red"]).eval().save(tmp_path / "chooser")
    models = load_models(folders["model"], vqa=tmp_path / "chooser", device="cpu")
    questions = [f"Is there a {name}?" for name in ("dog", "cat", "cow")]
    contents = [make_picture(seed) for seed in range(2)]
    with run_app(create_app(models, Settings(rate=0))) as live:
        for content in contents:
            asked = {"image": picture_field(content), "questions": questions}
            status, answer, _ = live.ask("/v1/vqa", asked)
            assert status == 200
            assert answer["answers"] == models.vqa[0].answer([content] * 3, questions)
            assert answer["model"]["name"] == "chooser"
        status, answer, _ = live.ask("/v1/vqa", {"image": picture_field(contents[0]), "questions": [" "]})
        assert (status, answer["error"]["code"]) == (422, "empty_question")
        wish = {"image": picture_field(contents[0]), "of": "answer", "question": questions[0]}
        status, answer, _ = live.ask("/v1/explain", wish)
        assert status == 200, answer


def test_operations_and_the_document(live):
    assert live.ask("/healthz")[:2] == (200, {"status": "alive"})
    assert live.ask("/readyz")[:2] == (200, {"status": "ready"})
    live.ask("/v1/embed/text", {"texts": ["a"]})
    text = live.ask("/metrics")[1].decode()
    assert 'pairstream_requests_total{route="/v1/embed/text",status="200"}' in text
    assert 'pairstream_batch_items_count{queue="texts"}' in text
    assert 'pairstream_queue_items{queue="texts"} 0.0' in text
    document = live.ask("/openapi.json")[1]
    assert {"/v1/embed/image", "/v1/search", "/v1/caption", "/v1/vqa"} <= document["paths"].keys()
    assert all(
        schema.get("examples")
        for name, schema in document["components"]["schemas"].items()
        if name.endswith("Request")
    )
    info = live.ask("/v1/info")[1]
    assert info["pictures"] is True
    assert info["limits"]["texts"] == 256
    status, _, headers = live.ask("/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert live.ask("/", method="HEAD")[:2] == (200, b"")


@pytest.mark.parametrize(
    ("path", "body", "options", "message"),
    [
        ("/v1/serch", b"{}", {}, "GET /openapi.json lists those that there are"),
        ("/v1/search", None, {}, "expected the method POST"),
        ("/v1/search", b"{text: 1}", {}, "not JSON, at character 1: Expecting property name"),
        ("/v1/search", b'{"txt": "a"}', {}, "txt: Extra inputs are not permitted"),
        ("/v1/embed/text", b'{"texts": [1]}', {}, "texts.0: Input should be a valid string"),
        ("/v1/search", b"a=1", {"Content-Type": "text/plain"}, "application/json`, got `text/plain`"),
    ],
)
def test_errors_say_what_was_expected(live, path, body, options, message):
    status, answer, _ = live.ask(path, body, options)
    assert 400 <= status < 500
    assert message in answer["error"]["message"]


def test_routes_exist_only_for_what_is_loaded(folders, run_app):
    with run_app(create_app(load_models(folders["model"], device="cpu"))) as live:
        for name in ("captioner", "vqa", "index", "classifier"):
            path = {"captioner": "/v1/caption", "index": "/v1/search", "classifier": "/v1/sentiment"}.get(
                name
            )
            status, answer, _ = live.ask(path or f"/v1/{name}", {"images": []})
            assert status == 404
            assert answer["error"]["message"].endswith(f"it was started without --{name}")
        assert live.ask("/v1/info")[1]["captioner"] is None


def test_what_does_not_belong_together_is_refused(folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"--captioner .*: expected a model trained for caption, it is for vqa"
    ):
        load_models(folders["model"], captioner=folders["vqa"], device="cpu")
    with pytest.raises(ValueError, match="--data shows the pictures of an index: give --index"):
        load_models(folders["model"], data=(str(folders["shards"]),), device="cpu")
    with pytest.raises(ValueError, match="their scores would mean nothing"):
        load_models(folders["captioner"] / "encoder", index=other_index(folders, tmp_path), device="cpu")


def other_index(folders, tmp_path):
    import dataclasses

    from retrieval.index import Index

    return dataclasses.replace(Index.load(folders["index"]), fingerprint="0" * 16).save(tmp_path / "other")


def test_data_must_be_the_indexed_shards(folders, tiny_shards):
    with pytest.raises(ValueError, match="give the shards that were embedded"):
        load_models(folders["model"], index=folders["index"], data=(str(tiny_shards),), device="cpu")


def test_the_identity_of_a_task_model_is_its_files_content(folders, tmp_path):
    import shutil

    shutil.copytree(folders["vqa"], tmp_path / "copy")
    assert folder_hash(tmp_path / "copy") == folder_hash(folders["vqa"])
    (tmp_path / "copy/task.json").write_text("{}")
    assert folder_hash(tmp_path / "copy") != folder_hash(folders["vqa"])


def test_a_missing_extra_is_named_with_its_install_line(folders):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from pairstream.cli import main; sys.exit(main(['serve', '--model', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'pairstream[serve]'" in done.stderr
    assert require("json", "serve", "nothing") is not None


def test_listening_beyond_this_machine_needs_keys(folders, capsys):
    from pairstream.cli import main

    assert main(["serve", "--model", str(folders["model"]), "--host", "0.0.0.0"]) == 2
    assert "give --api-keys FILE, or --open-to-all" in capsys.readouterr().err


def test_run_time_errors_tell_nothing_of_the_inside(
    models, run_app, make_picture, picture_field, monkeypatch
):
    def broken(*_):
        raise RuntimeError("/secret/path and a stack")

    app = create_app(models)
    monkeypatch.setattr(app.state.service.images, "run", broken)
    with run_app(app) as live:
        status, answer, _ = live.ask("/v1/embed/image", {"images": [picture_field(make_picture(1))]})
        assert (status, answer["error"]["code"]) == (500, "internal")
        assert "secret" not in str(answer)
        assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200
        counted = b'pairstream_requests_total{route="/v1/embed/image",status="500"} 1.0'
        assert counted in live.ask("/metrics")[1]
