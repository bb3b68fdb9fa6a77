"""The filters: what each one asks of a sample. Each is a small pure function behind a maker of its own.

A new filter is a configuration class in `data.curate.recipe`, a maker here and a line in `PICTURE_RULES` (asks the
whole sample) or `CAPTION_RULES` (asks each caption).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.curate.hashes import Digests, distances, grey_of, hash_greys, sha256_of
from data.curate.recipe import (
    AspectRatio,
    CaptionLength,
    ImageSize,
    Language,
    PictureHashes,
    Punsafe,
    Pwatermark,
    Similarity,
    TextPatterns,
    UrlDomains,
    WordCount,
)
from data.pictures import MAX_PIXELS, Picture
from pairstream.errors import require


class MissingMetadataError(Exception):
    """A rule needs a key that the sample's JSON has not, or has as something else."""


@dataclass
class Facts:
    """What rules may ask about one sample; what costs something is found out when it is asked for.

    Attributes:
        image: The encoded picture.
        captions: The captions that are left.
        record: The sample's JSON.
        max_pixels: Larger pictures are faults.
    """

    image: bytes
    captions: list[str]
    record: dict[str, Any] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS

    @cached_property
    def picture(self) -> Picture:
        return Picture(self.image, max_pixels=self.max_pixels)

    @cached_property
    def sha256(self) -> bytes:
        return sha256_of(self.image)

    @cached_property
    def grey(self) -> Any:
        """The small grey picture that is hashed; float32 (32, 32)."""
        return grey_of(self.picture)

    def number(self, key: str) -> float:
        """A number of the JSON.

        Raises:
            MissingMetadataError: It is not there, or no number.
        """
        value = as_number(self.record.get(key))
        if value is None:
            raise MissingMetadataError(key)
        return value


def as_number(value: Any) -> float | None:
    """A number of JSON; None for what is none, which the infinite ones of a broken writer are not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None


def within(number: float, smallest: float, largest: float | None) -> bool:
    return number >= smallest and (largest is None or number <= largest)


def image_size(config: ImageSize) -> Callable[[Facts], bool]:
    def passes(facts: Facts) -> bool:
        sides = facts.picture.width, facts.picture.height
        return min(sides) >= config.min_side and (config.max_side is None or max(sides) <= config.max_side)

    return passes


def aspect_ratio(config: AspectRatio) -> Callable[[Facts], bool]:
    def passes(facts: Facts) -> bool:
        sides = facts.picture.width, facts.picture.height
        return max(sides) <= config.max * min(sides)

    return passes


def probability(config: Punsafe | Pwatermark) -> Callable[[Facts], bool]:
    return lambda facts: facts.number(config.kind) <= config.max


def similarity(config: Similarity) -> Callable[[Facts], bool]:
    return lambda facts: facts.number("similarity") >= (float("-inf") if config.min is None else config.min)


def url_domains(config: UrlDomains) -> Callable[[Facts], bool]:
    blocked = {listed_domain(name, "block") for name in config.block}
    for path in config.files:
        blocked |= {listed_domain(line, str(path)) for line in read_list(path, "filters: url_domains")}

    def passes(facts: Facts) -> bool:
        url = facts.record.get("url")
        if not isinstance(url, str) or not url:
            raise MissingMetadataError("url")
        return not is_below(domain_of(url), blocked)

    return passes


def domain_of(url: str) -> str:
    """The host of a URL, or of a bare domain, in lower case without port, `www.` and the last dot.

    Example:
        >>> domain_of("https://Img.Example.com:8080/a.jpg"), domain_of("www.example.com")
        ('img.example.com', 'example.com')
    """
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:  # such as a bracket that is not closed
        return ""
    host = host.rstrip(".")
    with suppress(UnicodeError):
        host = host.encode("idna").decode("ascii")  # so that both spellings of a name are one
    return host.removeprefix("www.")


def listed_domain(name: str, where: str) -> str:
    """The domain of an entry of a list.

    Raises:
        ValueError: It has none.
    """
    domain = domain_of(name.strip())
    if not domain:
        raise ValueError(
            f"filters: url_domains: {where} has {name!r}, which names no domain: expected one such as example.com"
        )
    return domain


def is_below(host: str, domains: set[str]) -> bool:
    """Whether a host is one of some domains or below one.

    Example:
        >>> is_below("img.example.com", {"example.com"}), is_below("myexample.com", {"example.com"})
        (True, False)
    """
    parts = host.split(".")
    return any(".".join(parts[first:]) in domains for first in range(len(parts)))


def read_list(path: Path, what: str) -> list[str]:
    """The lines of a list, without comments and blanks.

    Raises:
        ValueError: It cannot be read, or holds nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: cannot read the list {path}: {error}") from error
    found = [text for line in lines if (text := line.partition("#")[0].strip())]
    if not found:
        raise ValueError(f"{what}: {path} lists nothing; expected one entry a line")
    return found


def picture_hashes(config: PictureHashes) -> Callable[[Facts], bool]:
    exact, perceptual = split_hashes(config.files)

    def passes(facts: Facts) -> bool:
        if facts.sha256 in exact:
            return False
        if not len(perceptual.hashes):
            return True
        own = hash_greys([facts.grey])
        return not (own.valid[0] and (distances(own.hashes, perceptual.hashes) <= config.max_distance).any())

    return passes


def split_hashes(files: Sequence[Path]) -> tuple[set[bytes], Digests]:
    """SHA-256 and perceptual hashes of some lists.

    Raises:
        ValueError: A line is neither.
    """
    exact: set[bytes] = set()
    perceptual: list[int] = []
    for path in files:
        for line in read_list(path, "filters: picture_hashes"):
            if re.fullmatch(r"[0-9a-fA-F]{64}", line):
                exact.add(bytes.fromhex(line))
            elif re.fullmatch(r"[0-9a-fA-F]{16}", line):
                perceptual.append(int(line, 16))
            else:
                raise ValueError(
                    f"filters: picture_hashes: {path} has {line[:80]!r}; expected 64 hexadecimal digits (SHA-256) or "
                    "16 (perceptual hash) a line"
                )
    return exact, Digests.of(perceptual)


def caption_length(config: CaptionLength) -> Callable[[str], bool]:
    return lambda text: within(len(text), config.min, config.max)


def word_count(config: WordCount) -> Callable[[str], bool]:
    return lambda text: within(len(text.split()), config.min, config.max)


def language(config: Language) -> Callable[[str], bool]:
    identify = identifier()
    unknown = sorted(set(config.allow) - set(identify.labels))
    if unknown:
        raise ValueError(
            f"filters: language: allow has {unknown[0]!r}; py3langid knows {', '.join(sorted(identify.labels))}"
        )

    def passes(text: str) -> bool:
        found, certainty = identify.classify(text.casefold() if text.isupper() else text)
        return found in config.allow or certainty < config.certainty

    return passes


@lru_cache(maxsize=1)
def identifier() -> Any:
    """The language identifier with the model that its package carries; half a second to load."""
    module = require("py3langid.langid", "curate", "the language filter")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


EMAIL = re.compile(
    r"[\w.+-]{1,64}(?:@|\s?(?:\(at\)|\[at\])\s?)(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}\b",
    re.IGNORECASE,
)
# Digits in groups as people write them: an international prefix, a bracketed area code, or three groups and more.
PHONE = re.compile(
    r"""(?<![\w.,/:-])(?:
        \+\d{1,3}[\s.-]?(?:\(0?\d{1,4}\)[\s.-]?)?\d{1,4}(?:[\s.-]?\d{2,4}){2,4}   # +49 30 1234567
        | \(0?\d{2,5}\)[\s.-]?\d{3,4}[\s.-]?\d{3,4}                                # (555) 123-4567
        | 0\d{2,4}[\s./-]\d{3,4}[\s.-]?\d{3,5}                                     # 030 123 4567
        | (?:1[\s.-])?[2-9]\d{2}[.-][2-9]\d{2}[.-]\d{4}                            # 555-234-4567
        | (?:1\s)?[2-9]\d{2}\s[2-9]\d{2}[\s-]\d{4}                                 # 555 234 4567
    )(?![\w/:]|[.,-]\d)""",
    re.VERBOSE,
)


def has_email(text: str) -> bool:
    """Whether a text holds an e-mail address."""
    return ("@" in text or "at" in text.casefold()) and EMAIL.search(text) is not None


def has_phone(text: str) -> bool:
    """Whether a text holds what looks like a phone number; dates, sizes, years and prices are none."""
    return PHONE.search(text) is not None


BUILT_IN: dict[str, Callable[[str], bool]] = {"email": has_email, "phone": has_phone}


def text_patterns(config: TextPatterns) -> Callable[[str], bool]:
    finders = [BUILT_IN[name] for name in config.find]
    finders += [lambda text, own=re.compile(regex): own.search(text) is not None for regex in config.regexes]
    return lambda text: not any(finds(text) for finds in finders)


PICTURE_RULES: dict[str, Callable[[Any], Callable[[Facts], bool]]] = {
    "image_size": image_size,
    "aspect_ratio": aspect_ratio,
    "punsafe": probability,
    "pwatermark": probability,
    "similarity": similarity,
    "url_domains": url_domains,
    "picture_hashes": picture_hashes,
}
CAPTION_RULES: dict[str, Callable[[Any], Callable[[str], bool]]] = {
    "caption_length": caption_length,
    "word_count": word_count,
    "language": language,
    "text_patterns": text_patterns,
}
NEED_A_CAPTION = ("caption_length", "word_count")
MISSING = "missing_metadata"


class Rules:
    """The filters of a recipe that look at one sample alone, in their order.

    Args:
        filters: The configurations.
        labels: Their names.

    Raises:
        ValueError: A list cannot be read, or a language is unknown.
        ImportError: A filter's library is absent.
    """

    def __init__(self, filters: Iterable[Any], labels: Iterable[str]):
        self.steps: list[tuple[str, Any, Any]] = []
        for config, label in zip(filters, labels, strict=True):
            maker = PICTURE_RULES.get(config.kind) or CAPTION_RULES.get(config.kind)
            if maker is not None:  # a CLIP score is found for many at a time
                self.steps.append((label, config, maker(config)))

    def judge(self, facts: Facts) -> str | None:
        """The first rule that a sample fails; None when it passes all.

        A caption that fails a rule is taken out of `facts.captions`; a sample that loses its last one fails.

        Raises:
            Fault: The picture cannot be opened or decoded.
        """
        for label, config, passes in self.steps:
            if config.kind in CAPTION_RULES:
                left = [text for text in facts.captions if passes(text)]
                if not left and (facts.captions or config.kind in NEED_A_CAPTION):
                    return label
                facts.captions = left
                continue
            try:
                if not passes(facts):
                    return label
            except MissingMetadataError:
                if config.missing == "drop":
                    return MISSING
        return None
