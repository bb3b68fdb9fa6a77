"""The HTTP application: routes, errors without internals, and the page."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from pairstream import __version__
from serve.direct import Direct, direct_routes, invalid
from serve.fetch import Fetcher
from serve.gate import Gate
from serve.keys import Keys
from serve.metrics import Metrics
from serve.models import Models
from serve.refusal import Refusal
from serve.schemas import (
    CaptionAnswer,
    ClassifyAnswer,
    ClassifyRequest,
    EmbeddingsAnswer,
    ErrorAnswer,
    ExplainAnswer,
    ExplainRequest,
    ImagesRequest,
    Info,
    ModelIdentity,
    SearchAnswer,
    SearchRequest,
    SentimentAnswer,
    SentimentRequest,
    TextsRequest,
    VqaAnswer,
    VqaRequest,
)
from serve.service import Service
from serve.settings import Settings

logger = logging.getLogger(__name__)
REFUSALS = {
    400: "Not JSON, or a Host header of another server",
    401: "No valid API key",
    403: "Not allowed: pictures by address, or a page of another site",
    404: "No such thing here",
    408: "The body came too slowly",
    413: "Too large, or too many",
    415: "Not `application/json`",
    422: "Not a valid request",
    429: "Too many requests; see Retry-After",
    503: "The queue is full; see Retry-After",
    504: "The deadline passed",
}
OPTIONS = {  # routes that exist only for what is loaded
    "/v1/search": "--index",
    "/v1/caption": "--captioner",
    "/v1/vqa": "--vqa",
    "/v1/sentiment": "--classifier",
    "/v1/explain": "methods to explain with",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in REFUSALS.items()
}


def create_app(
    models: Models,
    settings: Settings | None = None,
    *,
    keys: Keys | None = None,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """The application of one server.

    Routes exist only for what is loaded. `app.state.service` has the queues.

    Args:
        models: What is served.
        settings: Limits; the defaults are the safe ones.
        keys: API keys; none lets everybody in who reaches the address.
        fetcher: Gets pictures by address, where that is allowed.

    Returns:
        The FastAPI application, door included.
    """
    settings, metrics = settings or Settings(), Metrics()
    service = Service(models, settings, metrics, fetcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="PairStream",
        version=__version__,
        description="Embeddings, search, zero-shot labels, captions and answers about pictures.",
        lifespan=lifespan,
        docs_url=None,  # it would fetch its scripts from the network
        redoc_url=None,
        redirect_slashes=False,  # it would send callers to whatever name their Host header has
    )
    app.state.service, app.state.metrics = service, metrics
    direct: dict[str, Direct] = {}
    app.add_middleware(Gate, settings=settings, keys=keys or Keys(), metrics=metrics, direct=direct)  # pyright: ignore
    add_errors(app)
    add_operations(app, service, metrics)
    add_models(app, service)
    if models.captioner is not None:
        add_caption(app, service)
    if models.vqa is not None:
        add_vqa(app, service)
    if models.classifier is not None:
        add_sentiment(app, service)
    if models.index is not None:
        add_search(app, service)
    if service.explainer.offered:
        add_explain(app, service)
    direct |= direct_routes(app)
    return app


def add_errors(app: FastAPI) -> None:
    """One shape for every error; what went wrong inside goes to the log and not to the caller."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        app.state.metrics.refused.labels(error.code).inc()
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()[:5]]
        return JSONResponse(invalid(faults).body(), 422)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code, text = "bad_request", str(error.detail)
        if error.status_code == 404:
            code, text = "not_found", "there is no such route; GET /openapi.json lists those that there are"
            if request.url.path in OPTIONS:
                text = f"this server holds nothing for this route: it was started without {OPTIONS[request.url.path]}"
        if error.status_code == 405:
            code, text = (
                "wrong_method",
                f"expected the method {(error.headers or {}).get('Allow', 'of the document')}",
            )
        return JSONResponse(Refusal(error.status_code, code, text).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(Refusal(500, "internal", "something went wrong in the server").body(), 500)


def add_operations(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """The page, health and metrics."""
    page = files("serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = content_policy(page)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)  # balancers like to ask so
    @app.get("/readyz", tags=["operations"], responses={503: RESPONSES[503]})
    async def readyz() -> dict[str, str]:
        """Models are loaded and requests are taken."""
        if not service.ready:
            raise Refusal(503, "going_down", "the server is going down", {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def metrics_() -> Response:
        """Counters in Prometheus' text format."""
        return Response(metrics.text(), media_type=metrics.content_type)


def content_policy(page: str) -> str:
    """A Content-Security-Policy under which exactly the page's own script and style run."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def add_models(app: FastAPI, service: Service) -> None:
    """What every server has: information, embeddings, zero-shot labels."""
    models, settings = service.models, service.settings

    @app.get("/v1/info", tags=["models"], responses=RESPONSES)
    async def info() -> Info:
        """What is served: models, index, limits."""
        limits = settings.limits
        return Info(
            model=models.identity,
            captioner=models.captioner[1] if models.captioner else None,
            vqa=models.vqa[1] if models.vqa else None,
            classifier=models.classifier[1] if models.classifier else None,
            index=models.index[1] if models.index else None,
            pictures=models.gallery is not None,
            urls=settings.fetching.enabled,
            explain=service.explainer.offered,
            limits={
                name: getattr(limits, name)
                for name in (
                    "body_bytes",
                    "picture_bytes",
                    "pixels",
                    "pictures",
                    "texts",
                    "characters",
                    "results",
                    "maps",
                )
            },
        )

    @app.post("/v1/embed/image", tags=["models"], responses=RESPONSES)
    async def embed_image(request: ImagesRequest) -> EmbeddingsAnswer:
        """Unit rows of pictures."""
        rows = await service.embed_images(request.images)
        return EmbeddingsAnswer(embeddings=rows.tolist(), model=models.identity)

    @app.post("/v1/embed/text", tags=["models"], responses=RESPONSES)
    async def embed_text(request: TextsRequest) -> EmbeddingsAnswer:
        """Unit rows of texts."""
        rows = await service.embed_texts(request.texts)
        return EmbeddingsAnswer(embeddings=rows.tolist(), model=models.identity)

    @app.post("/v1/classify", tags=["models"], responses=RESPONSES)
    async def classify(request: ClassifyRequest) -> ClassifyAnswer:
        """Zero-shot labels: which of the given words fits each picture best."""
        results = await service.classify(request.images, request.labels, request.template)
        return ClassifyAnswer(results=results, model=models.identity)


def add_caption(app: FastAPI, service: Service) -> None:
    """Captions."""
    assert service.models.captioner is not None
    identity = service.models.captioner[1]

    @app.post("/v1/caption", tags=["models"], responses=RESPONSES)
    async def caption(request: ImagesRequest) -> CaptionAnswer:
        """A caption for each picture."""
        return CaptionAnswer(captions=await service.caption(request.images), model=identity)


def add_vqa(app: FastAPI, service: Service) -> None:
    """Questions."""
    assert service.models.vqa is not None
    identity = service.models.vqa[1]

    @app.post("/v1/vqa", tags=["models"], responses=RESPONSES)
    async def vqa(request: VqaRequest) -> VqaAnswer:
        """An answer to each question about a picture."""
        return VqaAnswer(answers=await service.answer(request.image, request.questions), model=identity)


def add_sentiment(app: FastAPI, service: Service) -> None:
    """Labels of posts, by a classifier that was trained for them."""
    assert service.models.classifier is not None
    identity = service.models.classifier[1]

    @app.post("/v1/sentiment", tags=["models"], responses=RESPONSES)
    async def sentiment(request: SentimentRequest) -> SentimentAnswer:
        """Labels of posts: pictures, texts, or pictures with their texts."""
        return SentimentAnswer(results=await service.sentiment(request.posts), model=identity)


def add_search(app: FastAPI, service: Service) -> None:
    """Search, and the pictures that it finds."""
    assert service.models.index is not None
    identity = service.models.index[1]

    @app.post("/v1/search", tags=["models"], responses=RESPONSES)
    async def search(request: SearchRequest) -> SearchAnswer:
        """The nearest pictures or captions of the index."""
        hits, side = await service.search(request.text, request.image, request.among, request.k)
        return SearchAnswer(hits=hits, among=side, model=service.models.identity, index=identity)  # pyright: ignore

    @app.get("/v1/pictures/{row}", tags=["models"], response_class=Response, responses=RESPONSES)
    async def picture(row: int) -> Response:
        """A small JPEG of a picture of the index, which a header names."""
        headers = {"Cache-Control": "private, max-age=3600", "X-Index-Fingerprint": identity.fingerprint}
        return Response(await service.thumbnail(row), media_type="image/jpeg", headers=headers)


def add_explain(app: FastAPI, service: Service) -> None:
    """Heatmaps."""
    models = service.models
    identities: dict[str, ModelIdentity] = {"text": models.identity}
    for of, found in (
        ("caption", models.captioner),
        ("answer", models.vqa),
        ("label", models.classifier),
    ):
        if found is not None:
            identities[of] = found[1]

    @app.post("/v1/explain", tags=["models"], responses=RESPONSES)
    async def explain(request: ExplainRequest) -> ExplainAnswer:
        """Which parts of a picture, and which words, made a model's score; for a caption, word by word."""
        found = await service.explain(request)
        identity = identities[request.of]
        return ExplainAnswer(
            **dict(found), model=ModelIdentity(name=identity.name, fingerprint=identity.fingerprint)
        )
