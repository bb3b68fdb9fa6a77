"""Published lists of URLs and captions: their columns, and where they are to be had."""

from __future__ import annotations

from dataclasses import dataclass

URL_COLUMNS = ("url", "image_url", "image_urls", "urls", "img_url", "photo_url", "src")
CAPTION_COLUMNS = ("caption", "text", "title", "captions", "raw_caption", "alt_text", "alt", "description")


@dataclass(frozen=True)
class Preset:
    """How a published list is laid out.

    Attributes:
        about: What it is, with its size, in a line.
        get: Where the list is to be had.
        url: Column of URLs.
        caption: Column of captions.
        unnamed: Names of the columns of a file without a line of names; empty when it has one.
        verify: Whether its `sha256` is of the picture and a changed picture should be left out.
        boxes: Column of boxes to blur (faces), relative to the picture's size.
    """

    about: str
    get: str
    url: str = "url"
    caption: str = "caption"
    unnamed: tuple[str, ...] = ()
    verify: bool = False
    boxes: str | None = None


LAION = "URL", "TEXT"
PRESETS: dict[str, Preset] = {
    "cc3m": Preset(
        "Conceptual Captions, 3.3 million rows (TSV without column names: caption, url)",
        "https://ai.google.com/research/ConceptualCaptions/download",
        unnamed=("caption", "url"),
    ),
    "cc12m": Preset(
        "Conceptual 12M, 12.4 million rows (TSV without column names: url, caption)",
        "https://github.com/google-research-datasets/conceptual-12m",
        unnamed=("url", "caption"),
    ),
    "laion400m": Preset(
        "LAION-400M, 413 million rows (parquet)", "https://laion.ai/blog/laion-400-open-dataset/", *LAION
    ),
    "laion2b": Preset("LAION-2B-en, 2.3 billion rows (parquet)", "https://laion.ai/blog/laion-5b/", *LAION),
    "relaion2b": Preset(
        "Re-LAION-2B-en research and research-safe, 2.1 billion rows (parquet)",
        "https://laion.ai/blog/relaion-5b/",
        *LAION,
    ),
    "datacomp": Preset(
        "DataComp pools of 12.8 million to 12.8 billion rows (parquet); faces are blurred, changed pictures left out",
        "https://github.com/mlfoundations/datacomp",
        caption="text",
        verify=True,
        boxes="face_bboxes",
    ),
    "sbu": Preset(
        "SBU captioned photographs, 1 million rows (JSON)",
        "https://www.cs.rice.edu/~vo9/sbucaptions/",
        "image_urls",
        "captions",
    ),
    "redcaps": Preset(
        "RedCaps, 12 million rows (JSON files by subreddit and year)",
        "https://redcaps.xyz",
        "image_url",
        "caption",
    ),
}
