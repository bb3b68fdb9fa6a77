"""What a recipe says of the training pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pairstream.recipe import Config


class DataSource(Config):
    """Some shards of a mixture."""

    shards: str | tuple[str, ...]
    """A folder, glob, braces, URL or `pipe:` command; or several."""
    name: str = ""
    """What the log calls it; the first of its shards' names when empty."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples relative to the other sources' weights; give it to all sources or to none."""
    replacement: bool = False
    """Draw its shards with replacement rather than each once per epoch."""
    captions: Literal["random", "first", "longest"] | None = None
    """Which caption of an image with several a step takes; None as `data.captions`."""
    rewritten_key: str | None = None
    """JSON key of captions that a model wrote anew: a text or a list of texts."""
    rewritten_share: float | None = Field(default=None, gt=0, le=1)
    """How often a step takes a rewritten caption in place of the image's own."""

    @model_validator(mode="after")
    def complete(self) -> DataSource:
        if (self.rewritten_key is None) != (self.rewritten_share is None):
            raise ValueError("rewritten captions need both rewritten_key and rewritten_share")
        return self


class LabelPrompts(Config):
    """Texts made of class labels (FLYP): fine-tuning as zero-shot classification will ask."""

    key: str = "label"
    """JSON key of the label: a name, a number, or a list of either. Samples without one keep their captions, so that
    pairs can be mixed in."""
    templates: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    """Texts with {} for the class name; `captions: random` draws among them. To `loss: multi_positive` pictures of one
    class are no negatives where they drew the same text: with `captions_per_image` as many as templates, always."""
    classes: tuple[str, ...] = ()
    """Names of numbered classes, from 0; where they are given, labels must be among them."""

    @field_validator("templates")
    @classmethod
    def has_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} has no {{}} for the class name")
        return value


def train_kind(value: Any) -> str:
    """Which of the ways to name training data this is."""
    if isinstance(value, list | tuple) and not all(isinstance(word, str) for word in value):
        return "sources"
    return "shards" if isinstance(value, list | tuple) else "one"


Train = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[tuple[str, ...], Tag("shards")]
    | Annotated[tuple[DataSource, ...], Tag("sources")],
    Discriminator(train_kind),
]


class Data(Config):
    """The training pairs and how they are read."""

    train: Train
    """Shards: a folder, glob, braces, URL or `pipe:` command; or several; or a list of sources to be mixed."""
    temperature: float | None = Field(default=None, gt=0)
    """Of sources without weights: these are samples ** (1 / temperature). 1 goes by size, a large one is even."""
    mix: Literal["samples", "batches"] = "samples"
    """`samples`: each batch holds its exact share of each source; `batches`: each batch is of one source."""
    cache_dir: str | None = None
    """Where shards from elsewhere are kept; ~/.cache/pairstream/shards when None."""
    cache_gb: float | None = Field(default=None, gt=0)
    """Most that they may take, in 10^9 bytes; the least recently used make room. None has no limit."""
    workers: int = Field(default=2, ge=0)
    """Loader processes of each rank; 0 loads in the training process."""
    shuffle: int = Field(default=10000, ge=0)
    """References in the shuffle buffer, samples; 0 keeps the order of the shards."""
    captions: Literal["random", "first", "longest"] = "random"
    """Which caption of an image with several a step takes."""
    captions_per_image: int = Field(default=1, ge=1)
    """How many captions of an image a step takes; more than one want `loss: {kind: multi_positive}`."""
    labels: LabelPrompts | None = None
    """Train on prompts of the samples' class labels instead of captions; None takes captions."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the area that the random crop keeps, least and most."""
    hflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring; captions that say left or right forbid it."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Strength of random brightness, contrast and saturation."""
    word_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each caption's words that is left out at random; holds back learning small sets by heart."""
    scaled_decode: bool = False
    """Decode large JPEGs at half, quarter or eighth size where the crop stays as large as the model's input:
    1.7 times as fast at 1024 px, 1.3 at 512; pixels differ by up to 2.5 of 255 on average."""
    max_faults: float = Field(default=0.01, ge=0, lt=1)
    """Share of bad samples past which the run stops."""

    @field_validator("train")
    @classmethod
    def not_empty(cls, value: Any) -> Any:
        if not value:
            raise ValueError("the shard list is empty: give a folder, glob or URL of .tar shards")
        return value

    @property
    def names(self) -> str:
        """What `train` means, in few words."""
        words = (self.train,) if isinstance(self.train, str) else self.train
        return ", ".join(word if isinstance(word, str) else word.name or str(word.shards) for word in words)
