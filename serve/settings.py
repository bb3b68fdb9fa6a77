"""What is served, what the server allows, and how many of it there are; no torch here. Every default is safe."""

from __future__ import annotations

from pydantic import Field, model_validator

from pairstream.recipe import Config

MiB = 1 << 20


class Limits(Config):
    """Bounds of one request. What is past one of them is refused before it costs memory or time."""

    body_bytes: int = Field(default=32 * MiB, ge=1024)
    """Bytes of a request's body, counted while it arrives."""
    bodies_bytes: int = Field(default=256 * MiB, ge=1024)
    """Bytes of all bodies that are held at one moment, over all callers."""
    body_seconds: float = Field(default=20.0, gt=0)
    """Time in which a body must have arrived."""
    picture_bytes: int = Field(default=12 * MiB, ge=1)
    """Bytes of one encoded picture."""
    pixels: int = Field(default=25_000_000, ge=1)
    """Width times height of a picture, read from its header before anything is decoded."""
    pictures: int = Field(default=64, ge=1)
    """Pictures in a request."""
    texts: int = Field(default=256, ge=1)
    """Texts, labels or questions in a request."""
    characters: int = Field(default=2000, ge=1)
    """Characters of one text."""
    results: int = Field(default=100, ge=1)
    """Results of a search."""
    maps: int = Field(default=32, ge=1)
    """Heatmaps of one explanation: words of a caption."""
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")
    """Picture formats, by Pillow's names; no other decoder is ever asked."""


class Fetching(Config):
    """Pictures named by their address. Off unless it is switched on."""

    enabled: bool = False
    seconds: float = Field(default=10.0, gt=0)
    """Time for one picture, redirects included."""
    redirects: int = Field(default=3, ge=0)
    ports: tuple[int, ...] = (80, 443)


class Batching(Config):
    """How requests share forward passes."""

    batch: int = Field(default=32, ge=1)
    """Items of one forward pass at the most."""
    wait: float = Field(default=0.01, ge=0)
    """Seconds that a pass waits at the most for half of what is being decoded; a lone request never waits."""
    queue: int = Field(default=256, ge=1)
    """Items that may wait or be worked on; past it the answer is 503 with Retry-After."""
    deadline: float = Field(default=30.0, gt=0)
    """Seconds after which a request is answered 504; what has not begun by then is dropped."""


class Settings(Config):
    """All of a server's settings."""

    limits: Limits = Limits()
    fetching: Fetching = Fetching()
    embedding: Batching = Batching()
    decoding: Batching = Batching(batch=16, queue=64, deadline=60.0)
    explaining: Batching = Batching(batch=1, queue=16, deadline=60.0)
    explain_methods: tuple[str, ...] = ("chefer", "gradcam", "rollout", "occlusion")
    """Methods of heatmaps that may be asked for; none switches /v1/explain off. The others cost hundreds of passes."""
    rate: float = Field(default=100.0, ge=0)
    """Requests a second that one key (or, without keys, one address) may send in the long run; 0 is no limit."""
    burst: float = Field(default=200.0, ge=1)
    """Requests that it may send at once after a pause."""
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    """Names by which the server may be addressed; `*` allows any. It stops pages that rebind their own name."""
    decoders: int = Field(default=2, ge=1)
    """Threads that decode pictures."""


class Sources(Config):
    """What is served, and where it lies; on a cluster, paths that all machines see. See `serve.models.load_models`."""

    model: str
    captioner: str | None = None
    vqa: str | None = None
    classifier: str | None = None
    index: str | None = None
    data: tuple[str, ...] = ()
    pretrained: str | None = None
    device: str = "auto"


class Scaling(Config):
    """How many replicas there are, and what each takes of the cluster."""

    least: int = Field(default=1, ge=1)
    """Replicas that are always there."""
    most: int = Field(default=1, ge=1)
    """Replicas that there may be."""
    ongoing: float = Field(default=8.0, gt=0)
    """Requests in progress or waiting for each replica that their number is steered by: more of them start another."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs that a replica takes."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs that a replica takes; a fraction shares one."""
    up_seconds: float = Field(default=10.0, ge=0)
    """Seconds of load before a replica is added."""
    down_seconds: float = Field(default=300.0, ge=0)
    """Seconds without it before one is taken away."""

    @model_validator(mode="after")
    def ordered(self) -> Scaling:
        if self.most < self.least:
            raise ValueError(
                f"at most {self.most} replicas and at least {self.least}: expected no more at least"
            )
        return self
