"""The recipe of a curation: which samples stay. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from data.pictures import MAX_PIXELS
from pairstream.recipe import Config

PATTERNS = ("email", "phone")
Missing: TypeAlias = Literal["keep", "drop"]


class ImageSize(Config):
    """Pictures by their shorter and longer side, as they are shown (EXIF orientation applied)."""

    kind: Literal["image_size"] = "image_size"
    min_side: int = Field(default=0, ge=0)
    """Pixels that the shorter side has at least."""
    max_side: int | None = Field(default=None, ge=1)
    """Pixels that the longer side has at most."""

    @model_validator(mode="after")
    def is_ordered(self) -> ImageSize:
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(
                f"max_side ({self.max_side}) is below min_side ({self.min_side}): nothing would stay"
            )
        return self


class AspectRatio(Config):
    """Pictures by longer side / shorter side."""

    kind: Literal["aspect_ratio"] = "aspect_ratio"
    max: float = Field(default=3.0, ge=1)
    """The largest ratio that stays; DataComp's basic filter takes 3."""


class Span(Config):
    """A smallest and a largest number, both of which stay."""

    min: int = Field(default=1, ge=0)
    """The smallest number that stays."""
    max: int | None = Field(default=None, ge=1)
    """The largest number that stays."""

    @model_validator(mode="after")
    def is_ordered(self) -> Span:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min}): nothing would stay")
        return self


class CaptionLength(Span):
    """Captions by their characters."""

    kind: Literal["caption_length"] = "caption_length"


class WordCount(Span):
    """Captions by their words, which are what white space divides."""

    kind: Literal["word_count"] = "word_count"


class Language(Config):
    """Captions by their language, as py3langid's own model (139 languages) tells it: about 0.05 ms a caption."""

    kind: Literal["language"] = "language"
    allow: tuple[str, ...] = Field(min_length=1)
    """ISO 639-1 codes of the languages that stay, such as `[en, de]`."""
    certainty: float = Field(default=0.5, ge=0, le=1)
    """How probable another language must be for a caption to go. Captions are short and many are in doubt, which
    keeps them; 0 goes by the best guess."""


class TextPatterns(Config):
    """Captions that hold what they should not, such as e-mail addresses and phone numbers."""

    kind: Literal["text_patterns"] = "text_patterns"
    find: tuple[Literal["email", "phone"], ...] = PATTERNS
    """Patterns that are built in."""
    regexes: tuple[str, ...] = ()
    """Further ones, in Python's syntax."""

    @field_validator("regexes")
    @classmethod
    def is_regex(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def finds_something(self) -> TextPatterns:
        if not self.find and not self.regexes:
            raise ValueError(f"give patterns in find ({', '.join(PATTERNS)}) or regexes: both are empty")
        return self


class MetadataRule(Config):
    """A rule that reads a key of the sample's JSON."""

    missing: Missing = "drop"
    """What becomes of samples without that key: `drop` counts them as `missing_metadata`."""


class Punsafe(MetadataRule):
    """Samples by `punsafe`, the probability that a picture is unsafe, as LAION and DataComp carry it."""

    kind: Literal["punsafe"] = "punsafe"
    max: float = Field(default=0.5, ge=0, le=1)
    """The largest probability that stays."""


class Pwatermark(MetadataRule):
    """Samples by `pwatermark`, the probability that a picture has a watermark."""

    kind: Literal["pwatermark"] = "pwatermark"
    max: float = Field(default=0.8, ge=0, le=1)
    """The largest probability that stays."""


class UrlDomains(MetadataRule):
    """Samples whose `url` is of a listed domain or of one below it."""

    kind: Literal["url_domains"] = "url_domains"
    block: tuple[str, ...] = ()
    """Domains, such as `example.com`, which means `img.example.com` as well."""
    files: tuple[Path, ...] = ()
    """Files of further ones, one a line; `#` starts a comment."""

    @model_validator(mode="after")
    def blocks_something(self) -> UrlDomains:
        if not self.block and not self.files:
            raise ValueError("give the domains in block, or files of them in files")
        return self


class PictureHashes(Config):
    """Pictures on a list of hashes: 64 hexadecimal digits are a SHA-256, 16 are a perceptual hash."""

    kind: Literal["picture_hashes"] = "picture_hashes"
    files: tuple[Path, ...] = Field(min_length=1)
    """Files of hashes, one a line; `#` starts a comment."""
    max_distance: int = Field(default=4, ge=0, le=16)
    """Bits of the 64 in which a perceptual hash may differ from a listed one."""


class Scored(Config):
    """Pairs by a score: those of at least `min`, or the best of all, or both."""

    min: float | None = Field(default=None, ge=-1, le=1)
    """The smallest cosine that stays."""
    top: float | None = Field(default=None, gt=0, le=1)
    """The share of the samples that stays, the best ones, once all other filters and the search for copies are
    done."""

    @model_validator(mode="after")
    def asks_something(self) -> Scored:
        if self.min is None and self.top is None:
            raise ValueError("give min (a threshold) or top (a share of the best)")
        return self


class Similarity(Scored, MetadataRule):
    """Pairs by `similarity`, the cosine that a published set carries."""

    kind: Literal["similarity"] = "similarity"


class ClipScore(Scored):
    """Pairs by the cosine of picture and caption (the best one) under the recipe's `encoder`."""

    kind: Literal["clip_score"] = "clip_score"


Filter: TypeAlias = Annotated[
    ImageSize
    | AspectRatio
    | CaptionLength
    | WordCount
    | Language
    | TextPatterns
    | Punsafe
    | Pwatermark
    | UrlDomains
    | PictureHashes
    | Similarity
    | ClipScore,
    Field(discriminator="kind"),
]


class EncoderChoice(Config):
    """The dual encoder of `clip_score` and `semantic`, named by what makes it."""

    use: str = "pretrain.encoder:load_encoder"
    """`module:function`; it gives an object with `encode_images(list of bytes)` and `encode_texts(list of str)`,
    whose results are rows of length one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function, such as `{model: runs/flickr8k_cpu, device: cpu}`."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures that are embedded at a time."""

    @field_validator("use")
    @classmethod
    def is_import_string(cls, value: str) -> str:
        if value.count(":") != 1:
            raise ValueError("expected an import string such as 'pretrain.encoder:load_encoder'")
        return value


class Perceptual(Config):
    """Pictures that look the same: re-encoded, resized, slightly changed."""

    max_distance: int = Field(default=4, ge=0, le=16)
    """Bits of the 64-bit hash in which two may differ. 4 finds nearly all re-encoded and resized copies and hardly
    anything else; from 10 on different pictures meet."""
    flips: bool = True
    """Also find mirrored copies."""


class Semantic(Config):
    """Pictures that show the same, by the cosine of their embeddings: crops, other shots of one thing."""

    min_similarity: float = Field(default=0.95, gt=0, le=1)
    """The smallest cosine of two copies. It depends on the encoder: look at the report's examples."""


class Alike(Config):
    """Which pictures count as the same."""

    exact: bool = True
    """The same bytes, by SHA-256."""
    perceptual: Perceptual | None = Perceptual()
    """By a perceptual hash; null for not at all."""
    semantic: Semantic | None = None
    """By the recipe's `encoder`; null for not at all."""

    @model_validator(mode="after")
    def looks_somehow(self) -> Alike:
        if not self.exact and self.perceptual is None and self.semantic is None:
            raise ValueError(
                "exact, perceptual and semantic are all off: leave the whole section out instead"
            )
        return self


class Duplicates(Alike):
    """Of pictures that are the same the largest one stays (pixels, then bytes, then the first key)."""

    plant: float = Field(default=0.0, ge=0, le=1)
    """Share of the pictures of which copies are made (cut, encoded again, resized, mirrored) and searched for: the
    report then tells recall and precision on this very set. The copies are never written."""


class Leaks(Alike):
    """Pictures that an evaluation set has as well."""

    shards: str | tuple[str, ...]
    """The evaluation set."""
    drop: bool = True
    """Drop them; false only reports them."""


class Balance(Config):
    """Fewer samples of what there is too much of, after MetaCLIP (arXiv:2309.16671, algorithm 1).

    A sample is looked up under each entry that its captions have; an entry that more than `cap` samples have is
    drawn with probability cap / samples, and a sample stays when it is drawn under any of its entries.
    """

    entries: Path
    """A file of words and phrases, one a line."""
    cap: int = Field(ge=1)
    """Samples of one entry that are all kept; t in the paper (20,000 for 400 million pairs)."""
    unmatched: Missing = "drop"
    """What becomes of samples without any entry."""
    seed: int = 0
    """Another seed draws others."""


class CurateRecipe(Config):
    """All of a curation."""

    shards: str | tuple[str, ...]
    """What comes in: folders, tar files, globs, braces, URLs."""
    out: str = Field(min_length=1)
    """The folder of the result: shards, `manifest.json`, `report.html`, `metrics.json`, `dropped.csv.gz`."""
    filters: tuple[Filter, ...] = ()
    """Applied in this order; the first one that a sample fails is the one it counts under."""
    duplicates: Duplicates | None = None
    """Copies within the set; null leaves them."""
    leaks: Leaks | None = None
    """Copies of an evaluation set's pictures; null does not look."""
    balance: Balance | None = None
    """The last step; null for none."""
    encoder: EncoderChoice | None = None
    """Needed by `clip_score` and `semantic`."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Samples a shard of the result holds."""
    max_faults: float = Field(default=0.01, ge=0, lt=1)
    """Share of samples that may be damaged (they are dropped); past it the run stops and says so."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Larger pictures are faults, as in training."""
    examples: int = Field(default=6, ge=0, le=100)
    """Dropped samples of each rule that the report shows."""
    distributor: Literal["multiprocessing", "ray"] = "multiprocessing"
    """Where shards are read and written: processes of this machine, or a Ray cluster."""
    cluster: str | None = None
    """Address of a running Ray cluster (`auto` or HOST:PORT); null starts one on this machine."""
    processes: int = Field(default=1, ge=1)
    """Worker processes on this machine; a cluster decides by itself."""

    @model_validator(mode="after")
    def fits_together(self) -> CurateRecipe:
        sections = [section for section in (self.duplicates, self.leaks) if section is not None]
        needing = [f"filters: {rule.kind}" for rule in self.filters if isinstance(rule, ClipScore)]
        needing += [f"{type(section).__name__.lower()}.semantic" for section in sections if section.semantic]
        if needing and self.encoder is None:
            raise ValueError(
                f"{needing[0]} needs an encoder: add `encoder: {{options: {{model: RUN_OR_NAME}}}}`"
            )
        if self.cluster is not None and self.distributor != "ray":
            raise ValueError("cluster is the address of a Ray cluster: add distributor: ray")
        if not (self.filters or sections or self.balance):
            raise ValueError("nothing to do: give filters, duplicates, leaks or balance")
        return self

    def labels(self) -> list[str]:
        """The filters' names as the report has them: their kind, numbered where it comes again."""
        kinds = [rule.kind for rule in self.filters]
        return [
            kind if kinds.index(kind) == place else f"{kind}_{kinds[:place].count(kind) + 1}"
            for place, kind in enumerate(kinds)
        ]
