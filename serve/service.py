"""What the server can do, without HTTP: pictures and texts in, answers out, through the queues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.faults import Fault
from finetune.fusion.model import FusionClassifier
from finetune.model import VisionLanguageModel
from finetune.opening import AnswerModel
from finetune.text import token_ids
from retrieval.search import Hit, search
from serve.batching import Batcher, deadline_passed
from serve.explaining import Explainer, Wish
from serve.fetch import Fetcher
from serve.metrics import Metrics
from serve.models import Models
from serve.pictures import decode, from_base64
from serve.pool import Pool
from serve.refusal import Refusal
from serve.schemas import Explained, ExplainRequest, Found, Label, Likelihood, Picture, Post
from serve.settings import Batching, Settings

Result = TypeVar("Result")


class Service:
    """The models behind their queues.

    Embedding passes run in one thread and decoding (captions, answers) in another: a long caption does not hold up an
    embedding; explanations have a third. Pictures are decoded by threads of their own, from places that the queue has
    already granted, so that pixels in memory are bounded as well.

    Args:
        models: What is served.
        settings: Limits, batches and deadlines.
        metrics: Receives the queues' measurements.
        fetcher: Gets pictures by address.
    """

    def __init__(self, models: Models, settings: Settings, metrics: Metrics, fetcher: Fetcher | None = None):
        self.models, self.settings = models, settings
        self.fetcher = fetcher or Fetcher(settings.fetching, settings.limits.picture_bytes)
        self.embedding = ThreadPoolExecutor(1, "embedding")
        self.writing = ThreadPoolExecutor(1, "writing")
        self.reasoning = ThreadPoolExecutor(1, "explanations")
        self.decoders = Pool(settings.decoders, "pictures")
        self.searching = ThreadPoolExecutor(1, "search")  # FAISS has threads of its own

        def queue(name: str, run: Any, config: Batching, executor: ThreadPoolExecutor) -> Batcher:
            return Batcher(f"the queue of {name}", run, config, executor, metrics.observer(name))

        self.images = queue("images", self.run_images, settings.embedding, self.embedding)
        self.texts = queue("texts", self.run_texts, settings.embedding, self.embedding)
        self.captions = queue("captions", self.run_captions, settings.decoding, self.writing)
        self.answers = queue("answers", self.run_answers, settings.decoding, self.writing)
        self.posts = queue("posts", self.run_posts, settings.embedding, self.embedding)
        self.explainer = Explainer(models, settings.explain_methods, settings.limits.maps)
        self.explanations = queue("explanations", self.explainer.run, settings.explaining, self.reasoning)
        self.scale = float(models.encoder.model.logit_scale.detach().exp())
        self.ready = True

    async def close(self) -> None:
        """Answer what was taken, then stop."""
        self.ready = False
        queues = (self.images, self.texts, self.captions, self.answers, self.posts, self.explanations)
        await asyncio.gather(*(each.close() for each in queues))
        for executor in (self.embedding, self.writing, self.reasoning, self.decoders, self.searching):
            executor.shutdown()

    # What runs in the worker threads

    def run_images(self, pictures: list[Tensor]) -> Sequence[np.ndarray]:
        return list(self.models.encoder.encode_images(torch.stack(pictures)).cpu().numpy())

    def run_texts(self, texts: list[str]) -> Sequence[np.ndarray]:
        return list(self.models.encoder.encode_texts(texts).cpu().numpy())

    def run_captions(self, pictures: list[Tensor]) -> list[str]:
        assert self.models.captioner is not None
        return self.models.captioner[0].caption(pictures)

    def run_answers(self, pairs: list[tuple[Tensor, str]]) -> list[str]:
        """Answers; a picture with several questions is encoded once."""
        assert self.models.vqa is not None
        model = self.models.vqa[0]
        places: dict[int, int] = {}
        pictures = []
        for picture, _ in pairs:
            if id(picture) not in places:
                places[id(picture)] = len(pictures)
                pictures.append(picture)
        owners = [places[id(picture)] for picture, _ in pairs]
        return model.answer_each(torch.stack(pictures), [question for _, question in pairs], owners)

    def run_posts(self, posts: list[tuple[Tensor | None, str | None]]) -> list[dict[str, float]]:
        assert self.models.classifier is not None
        return self.models.classifier[0].classify([image for image, _ in posts], [text for _, text in posts])

    # What requests ask for

    async def embed_images(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Unit rows float32 `(n, dim)`."""
        return np.stack(
            await self.with_pictures(
                self.images,
                pictures,
                self.models.encoder.preprocess,
                lambda pixels, expires: self.images.submit(pixels, expires),
            )
        )

    async def embed_texts(self, texts: Sequence[str], what: str = "texts") -> np.ndarray:
        """Unit rows float32 `(n, dim)`."""
        self.check_texts(texts, what)
        with self.texts.admit(len(texts)):
            return np.stack(await self.texts.submit(texts))

    async def caption(self, pictures: Sequence[Picture]) -> list[str]:
        """One caption a picture."""
        assert self.models.captioner is not None
        return await self.with_pictures(
            self.captions,
            pictures,
            self.models.captioner[0].encoder.preprocess,
            lambda pixels, expires: self.captions.submit(pixels, expires),
        )

    async def answer(self, picture: Picture, questions: Sequence[str]) -> list[str]:
        """One answer a question."""
        assert self.models.vqa is not None
        model = self.models.vqa[0]
        self.check_texts(questions, "questions")
        for place, question in enumerate(questions):
            check_question(model, question, place)
        return await self.with_pictures(
            self.answers,
            [picture],
            model.encoder.preprocess,
            lambda pixels, expires: self.answers.submit([(pixels[0], q) for q in questions], expires),
            places=len(questions),
        )

    async def sentiment(self, posts: Sequence[Post]) -> list[list[Likelihood]]:
        """Each post's labels, most probable first."""
        assert self.models.classifier is not None
        self.check_texts([post.text or "" for post in posts], "posts")

        def work(pixels: list[Tensor], expires: float) -> Awaitable[list[dict[str, float]]]:
            left = iter(pixels)
            pairs = [(next(left) if post.image else None, post.text) for post in posts]
            return self.posts.submit(pairs, expires)

        found = await self.with_pictures(
            self.posts,
            [post.image for post in posts if post.image],
            self.models.classifier[0].encoder.preprocess,
            work,
            places=len(posts),
        )
        return [
            [
                Likelihood(label=label, probability=share)
                for label, share in sorted(shares.items(), key=lambda pair: -pair[1])
            ]
            for shares in found
        ]

    async def classify(
        self, pictures: Sequence[Picture], labels: Sequence[str], template: str
    ) -> list[list[Label]]:
        """Each picture's labels, most probable first."""
        if "{}" not in template:
            raise Refusal(422, "bad_template", "expected {} in the template, where the label goes")
        self.check_texts([template], "template")
        self.check_texts(labels, "labels")
        texts = [template.replace("{}", label) for label in labels]
        text_rows, image_rows = await asyncio.gather(
            self.embed_texts(texts, "labels in the template"), self.embed_images(pictures)
        )
        scores = image_rows @ text_rows.T  # (pictures, labels)
        logits = scores.astype(np.float64) * self.scale
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [
            [
                Label(label=labels[int(place)], probability=float(share[place]), score=float(score[place]))
                for place in np.argsort(-share, kind="stable").tolist()
            ]
            for share, score in zip(shares, scores, strict=True)
        ]

    async def search(
        self, text: str | None, picture: Picture | None, among: str | None, k: int
    ) -> tuple[list[Found], str]:
        """Results, best first, and the side they are from."""
        assert self.models.index is not None
        index = self.models.index[0]
        if k > self.settings.limits.results:
            raise Refusal(413, "too_many_items", f"k is {k}: at most {self.settings.limits.results} results")
        name = among or ("texts" if text is None else "images")
        side = index.images if name == "images" else index.texts
        if side is None:
            raise Refusal(
                422, "not_indexed", f"this index holds no {name}: search the other side with `among`"
            )
        if picture is not None:
            rows = await self.embed_images([picture])
        else:
            rows = await self.embed_texts([text or ""], "text")

        def work() -> list[Hit]:
            return search(index, vectors=rows, among=name, k=min(k, side.alive))[0] if side.alive else []

        hits = await asyncio.get_running_loop().run_in_executor(self.searching, work)
        assert self.models.picture_rows is not None
        find = self.models.picture_rows.row
        return [
            Found(
                rank=hit.rank,
                score=hit.score,
                key=hit.key,
                text=hit.text,
                row=hit.row if name == "images" else find(hit.key),
            )
            for hit in hits
        ], name

    async def explain(self, request: ExplainRequest) -> Explained:
        """Heatmaps of one picture."""
        of = request.of
        self.explainer.check(of, request.method)
        for name in ("text", "question", "label"):
            self.check_texts([getattr(request, name) or ""], name)
        model = self.explainer.twins[of]
        if of == "answer":
            check_question(model, request.question or "", 0)
        if of == "caption" and request.text is not None:
            check_caption(model, request.text, self.settings.limits.maps)
        if of == "label" and request.label is not None and request.label not in model.labels:
            raise Refusal(
                422, "no_such_label", f"label: expected one of the classifier's: {', '.join(model.labels)}"
            )

        def work(pixels: list[Tensor], expires: float) -> Awaitable[list[Explained]]:
            wish = Wish(
                pixels[0], of, request.text, request.question, request.label, request.method, request.png
            )
            return self.explanations.submit([wish], expires)

        encoder = model if of == "text" else model.encoder
        return (await self.with_pictures(self.explanations, [request.image], encoder.preprocess, work))[0]

    async def thumbnail(self, row: int) -> bytes:
        """JPEG of a picture of the index."""
        gallery = self.models.gallery
        if gallery is None or row not in gallery:
            raise Refusal(404, "no_picture", "the index has no picture of that row here")
        try:
            return await self.decoders.submit(lambda: gallery.thumbnail(row))
        except Fault:
            raise Refusal(404, "no_picture", "this picture cannot be read any more") from None

    # Checks and pictures

    def check_texts(self, texts: Sequence[str], what: str) -> None:
        """Number and length of texts."""
        limits = self.settings.limits
        if len(texts) > limits.texts:
            raise Refusal(413, "too_many_items", f"{len(texts)} {what}: at most {limits.texts} in a request")
        for place, text in enumerate(texts):
            if len(text) > limits.characters:
                raise Refusal(
                    413,
                    "text_too_long",
                    f"{what}[{place}] has {len(text):,} characters: at most {limits.characters:,}",
                )

    async def with_pictures(
        self,
        queue: Batcher,
        pictures: Sequence[Picture],
        preprocess: Callable[[Tensor], Tensor],
        work: Callable[[list[Tensor], float], Awaitable[Result]],
        *,
        places: int | None = None,
    ) -> Result:
        """Take places in a queue, decode the pictures, and hand their pixels on, within the queue's deadline."""
        limits = self.settings.limits
        if len(pictures) > limits.pictures:
            raise Refusal(
                413, "too_many_items", f"{len(pictures)} pictures: at most {limits.pictures} in a request"
            )
        expires = time.monotonic() + queue.config.deadline
        with queue.admit(len(pictures) if places is None else places):
            pixels = await all_within(
                [self.pixels(picture, preprocess) for picture in pictures], queue.config.deadline
            )
            return await work(pixels, expires)

    def pixels(self, picture: Picture, preprocess: Callable[[Tensor], Tensor]) -> asyncio.Future[Tensor]:
        """A picture at a model's input size."""
        limits = self.settings.limits
        if picture.url is not None:
            return asyncio.ensure_future(self.fetched_pixels(picture.url, preprocess))
        text = picture.data or ""
        return self.decoders.submit(
            lambda: preprocess(decode(from_base64(text, limits), limits)), size=len(text)
        )

    async def fetched_pixels(self, url: str, preprocess: Callable[[Tensor], Tensor]) -> Tensor:
        """The same of a picture somewhere else."""
        content = await self.fetcher.fetch(url)
        return await self.decoders.submit(
            lambda: preprocess(decode(content, self.settings.limits)), size=len(content)
        )


async def all_within(works: Sequence[asyncio.Future[Result]], seconds: float) -> list[Result]:
    """Results of what runs side by side; with the first failure, the deadline or the caller, all of it ends.

    `asyncio.gather` would log an error for each request that is given up.

    Raises:
        Refusal: 504: the deadline passed.
        Exception: What the first that failed raised.
    """
    if not works:
        return []
    try:
        done, pending = await asyncio.wait(works, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for work in done:
            work.result()
        if pending:
            raise deadline_passed()
        return [work.result() for work in works]
    finally:
        for work in works:
            work.cancel()
        if not all(work.done() and (work.cancelled() or work.exception() is None) for work in works):
            await asyncio.gather(*works, return_exceptions=True)


def check_question(model: AnswerModel, question: str, place: int) -> None:
    """A question that cannot be asked is refused before it stands in a queue with others.

    Raises:
        Refusal: 422: no words, or too many for the language model's context.
    """
    if not question.strip():
        raise Refusal(422, "empty_question", f"questions[{place}] is empty: expected some words")
    if isinstance(model, FusionClassifier):
        return  # a text tower cuts what is too long, as it does a caption
    tokens = len(token_ids(model.tokenizer, model.prompt(question)))
    room = model.context - model.prefix_length - model.decoding.max_new_tokens
    if tokens > room:
        raise Refusal(
            422, "text_too_long", f"questions[{place}] has {tokens} tokens: the model has room for {room}"
        )


def check_caption(model: VisionLanguageModel, caption: str, words: int) -> None:
    """A caption that cannot be explained word by word is refused before it stands in the queue.

    Raises:
        Refusal: 413: too many words; 422: too many tokens for the language model's context.
    """
    count = len(caption.split())
    if count > words:
        raise Refusal(
            413, "text_too_long", f"text has {count} words: a caption of at most {words} is explained"
        )
    tokens = len(token_ids(model.tokenizer, f"{model.task.prompt} {caption}"))  # pyright: ignore
    room = model.context - model.prefix_length
    if tokens > room:
        raise Refusal(422, "text_too_long", f"text has {tokens} tokens: the model has room for {room}")
