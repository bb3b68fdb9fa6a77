"""Tiny models behind a real server."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from data.shards import Sample, ShardWriter
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ClassifyTask, Pooled
from finetune.language_models import small_language_model
from finetune.model import VisionLanguageModel
from finetune.recipe_model import Mlp, SmallLanguageModel
from finetune.recipe_task import CaptionTask, Decoding, VqaTask
from finetune.text import train_tokenizer
from pretrain.encoder import build_encoder, load_encoder
from pretrain.recipe_model import TextTransformer, TowersModel, ViT
from retrieval.embed import embed_shards
from retrieval.index import Index
from serve.models import Models, load_models

WORDS = ["a red cat on the left", "two blue dogs", "Is there a dog?", "how many cats are there?", "yes", "no"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory, make_picture) -> dict[str, Any]:
    """Folders of a tiny dual encoder, captioner, VQA model, classifier, index and its shards."""
    root = tmp_path_factory.mktemp("served")
    with ShardWriter(root / "shards", samples_per_shard=8) as writer:
        for number in range(12):
            writer.write(Sample(f"{number:05d}", make_picture(number), "jpg", [f"thing {number}", "another"]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder(
            TowersModel(
                embed_dim=16,
                image_tower=ViT(image_size=32, patch_size=8, width=32, layers=2, head_width=16),
                text_tower=TextTransformer(context_length=16, width=32, heads=2, layers=2),
            ),
            device="cpu",
        )
        encoder.save(root / "model")
        tokenizer = train_tokenizer(WORDS, 300)
        for name, task in (("captioner", CaptionTask()), ("vqa", VqaTask())):
            torch.manual_seed(1)
            config = SmallLanguageModel(width=32, layers=2, heads=2, context=64, dropout=0.0, vocabulary=300)
            language_model = small_language_model(config, tokenizer)
            torch.nn.init.normal_(language_model.get_input_embeddings().weight, std=1.0)
            VisionLanguageModel(
                encoder, Mlp(merge=2), language_model, tokenizer, task, Decoding(max_new_tokens=8)
            ).eval().save(root / name)
        task = ClassifyTask(fusion=Pooled(width=16))
        FusionClassifier(encoder, task, ["negative", "neutral", "positive"]).eval().save(root / "classifier")
    found = embed_shards(load_encoder(root / "model", device="cpu"), str(root / "shards"))
    Index.build(found).save(root / "index")
    return {name: root / name for name in ("model", "captioner", "vqa", "classifier", "index", "shards")}


@pytest.fixture(scope="session")
def models(folders) -> Models:
    return load_models(
        folders["model"],
        captioner=folders["captioner"],
        vqa=folders["vqa"],
        classifier=folders["classifier"],
        index=folders["index"],
        data=(str(folders["shards"]),),
        device="cpu",
    )


def as_picture(content: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(content).decode()}


@dataclass
class Live:
    """A server on a port of this machine."""

    port: int
    app: Any
    server: Any

    def ask(self, path: str, content: Any = None, headers: dict[str, str] | None = None, **options: Any):
        """`(status, decoded answer, headers)` of one request; POST when there is content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
            headers = {**({} if body is None else {"Content-Type": "application/json"}), **(headers or {})}
            method = options.get("method", "GET" if body is None else "POST")
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(text) if text and "json" in kind else text, answer.headers
        finally:
            connection.close()


@contextmanager
def running(app: Any) -> Iterator[Live]:
    """The application behind a real uvicorn in a thread."""
    from serve.server import make_server

    ports, ready = [], threading.Event()

    def listening(port: int) -> None:
        ports.append(port)
        ready.set()

    server = make_server(app, port=0, listening=listening)
    server.capture_signals = lambda: __import__(
        "contextlib"
    ).nullcontext()  # signals belong to the main thread
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20), "the server did not start"
        yield Live(ports[0], app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def run_app():
    """`with run_app(app) as live`: a real server of this application."""
    return running


@pytest.fixture(scope="session")
def picture_field():
    """`picture_field(bytes)`: a picture as requests carry it."""
    return as_picture


@pytest.fixture(scope="module")
def live(models) -> Iterator[Live]:
    from serve.app import create_app
    from serve.settings import Settings

    with running(create_app(models, Settings(rate=0))) as found:
        yield found
