"""Exported towers on a machine without torch: onnxruntime or openvino, tokenizers, numpy and Pillow are enough.

from serve.export.runtime import EdgeEncoder

encoder = EdgeEncoder("exported")
encoder.predict(["cat.jpg"], ["a cat", "a dog"])
"""

from __future__ import annotations

import html
import io
import json
import re
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

CARD = "export.json"
FORMAT = 1
MOST_FRAMES = 32  # as the Encoder's transform has it
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Picture = Image.Image | bytes | str | Path


class EdgeEncoder:
    """A folder that `pairstream export` wrote, ready to embed: the same rows as the Encoder it came from.

    Args:
        folder: What was exported.
        threads: Threads of the runtime; 0 lets it choose.

    Attributes:
        card: Content of export.json: identity of the model, parity figures, preprocessing.
        embed_dim: Width of the rows.

    Raises:
        FileNotFoundError: No export there.
        ValueError: An export of another version.
        ImportError: The runtime is not installed.

    Example:
        >>> EdgeEncoder("exported").encode_texts(["a cat"]).shape                  # doctest: +SKIP
        (1, 512)
    """

    def __init__(self, folder: str | Path, *, threads: int = 0):
        self.folder = Path(folder)
        self.card = read_card(self.folder, "encoder")
        self.embed_dim = int(self.card["embed_dim"])
        self.preprocess_cfg: dict[str, Any] = self.card["preprocess"]
        self.tokenizer = Tokenizer(self.folder / "tokenizer.json", self.card["text"])
        load = GRAPHS[self.card["runtime"]]
        self.image_tower, self.text_tower = (load(self.folder, name, threads) for name in ("image", "text"))

    def preprocess(self, picture: Picture) -> np.ndarray:
        """One picture (a PIL image, a file's bytes or its path) to uint8 `(3, h, w)`."""
        return preprocess(picture, self.preprocess_cfg)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to int64 `(n, context_length)`; longer ones are cut."""
        return self.tokenizer(texts)

    def encode_images(self, images: np.ndarray | Sequence[Picture]) -> np.ndarray:
        """Embed pictures.

        Args:
            images: uint8 `(b, 3, h, w)` as `preprocess` makes them, or PIL images, files' bytes or paths.

        Returns:
            float32 `(b, embed_dim)`, rows of length one.
        """
        pixels = as_pixels(images, self.preprocess_cfg)
        return self.image_tower(pixels) if len(pixels) else np.zeros((0, self.embed_dim), np.float32)

    def encode_texts(self, texts: np.ndarray | Sequence[str]) -> np.ndarray:
        """Embed texts (strings, or int64 tokens `(n, context_length)`): float32 `(n, embed_dim)`, unit rows."""
        tokens = texts if isinstance(texts, np.ndarray) else self.tokenize(texts)
        return self.text_tower(tokens) if len(tokens) else np.zeros((0, self.embed_dim), np.float32)

    def predict(
        self, images: np.ndarray | Sequence[Picture], labels: Sequence[str], template: str = "a photo of a {}"
    ) -> np.ndarray:
        """Zero-shot probabilities of labels, float32 `(images, labels)`; rows sum to one.

        Raises:
            ValueError: No labels.
        """
        if not len(labels):
            raise ValueError("labels is empty: expected the names of what a picture may show")
        texts = [template.replace("{}", label) for label in as_list(labels, "labels")]
        logits = self.encode_images(images) @ self.encode_texts(texts).T * self.card["logit_scale"]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)


class OnnxTower:
    """One tower in onnxruntime."""

    def __init__(self, folder: Path, name: str, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [each.name for each in self.session.get_inputs()]

    def __call__(self, *batches: np.ndarray) -> np.ndarray:
        return np.asarray(self.session.run(None, dict(zip(self.inputs, batches, strict=True)))[0])


class OpenVinoTower:
    """One tower in OpenVINO, told to compute in float32: by itself it takes bfloat16 where the CPU has it."""

    def __init__(self, folder: Path, name: str, threads: int):
        import openvino

        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        self.model = openvino.Core().compile_model(str(folder / f"{name}.xml"), "CPU", config)

    def __call__(self, *batches: np.ndarray) -> np.ndarray:
        return np.array(self.model(list(batches))[0])


GRAPHS = {"onnx": OnnxTower, "openvino": OpenVinoTower}


def read_card(folder: Path, kind: str) -> dict[str, Any]:
    """The card of an export.

    Args:
        folder: What `pairstream export` wrote.
        kind: `encoder` or `writer`.

    Raises:
        FileNotFoundError: No export there.
        ValueError: An export of another version, or of another kind of model.
    """
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder that `pairstream export` wrote")
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not the JSON of an export ({error}): export the model again") from error
    if card.get("format") != FORMAT:
        raise ValueError(f"{path}: format {card.get('format')!r}, this version reads {FORMAT}")
    found = card.get("kind", "encoder")
    if found != kind:
        opener = {"encoder": "serve.export.runtime.EdgeEncoder", "writer": "serve.export.writer.EdgeWriter"}
        raise ValueError(f"{folder} holds an exported {found}: open it with {opener[found]}")
    return card


def as_pixels(images: np.ndarray | Sequence[Picture], config: dict[str, Any]) -> np.ndarray:
    """Pictures, or what `preprocess` made of them, as uint8 `(b, 3, h, w)`.

    Raises:
        ValueError: An array of another kind, a single picture, or one that cannot be read.
    """
    if not isinstance(images, np.ndarray):
        pictures = [preprocess(image, config) for image in as_list(images, "images")]
        images = np.stack(pictures) if pictures else np.zeros((0, 3, *config["size"]), np.uint8)
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images (b, 3, h, w), got {images.dtype} {images.shape}")
    return images


def as_list(values: Any, name: str) -> list[Any]:
    """Several values as they were given; a single one, of which a text would be taken letter by letter, is refused."""
    if isinstance(values, str | bytes | Path | Image.Image):
        raise ValueError(f"{name}: expected a list, got a single {type(values).__name__}: put it into [ ]")
    return list(values)


def preprocess(picture: Picture, config: dict[str, Any]) -> np.ndarray:
    """The evaluation transform of the exported model, in Pillow.

    Args:
        picture: A PIL image, a file's bytes, or its path.
        config: `size` (height, width), `resize_mode`, `interpolation`, `fill_color`, as exported.

    Returns:
        uint8 `(3, h, w)`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is no picture, is damaged, or has more pixels than Pillow allows.
    """
    if not isinstance(picture, Image.Image):
        file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        name = f"{len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
        try:
            with Image.open(file) as opened:
                picture = ImageOps.exif_transpose(opened) or opened
                picture = to_rgb(picture)
        except FileNotFoundError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise ValueError(f"{name}: not a picture that can be read ({error})") from error
    picture = to_rgb(picture)
    target_h, target_w = config["size"]
    if config["resize_mode"] == "shortest":
        picture = middle(picture, target_h, target_w)
    width, height = picture.size
    mode, filter_ = config["resize_mode"], INTERPOLATIONS[config["interpolation"]]
    if mode == "squash":
        resized = (target_h, target_w)
    elif mode == "shortest" and target_h == target_w:
        resized = (
            (target_h, int(target_h * width / height))
            if height <= width
            else (int(target_w * height / width), target_w)
        )
    else:
        ratios = (height / target_h, width / target_w)
        ratio = max(ratios) if mode == "longest" else min(ratios)
        resized = (max(round(height / ratio), 1), max(round(width / ratio), 1))
    if resized != (height, width):
        picture = picture.resize((resized[1], resized[0]), filter_)
    pixels = np.asarray(picture)  # (H, W, 3)
    pad_h, pad_w = max(target_h - resized[0], 0), max(target_w - resized[1], 0)
    if pad_h or pad_w:
        sides = ((pad_h // 2, (pad_h + 1) // 2), (pad_w // 2, (pad_w + 1) // 2), (0, 0))
        pixels = np.pad(pixels, sides, constant_values=config["fill_color"])
    top = round((pixels.shape[0] - target_h) / 2)
    left = round((pixels.shape[1] - target_w) / 2)
    pixels = pixels[top : top + target_h, left : left + target_w]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def middle(picture: Image.Image, target_h: int, target_w: int) -> Image.Image:
    """The middle of a picture that is very much longer than the frame that it is to fill; others as they are."""
    width, height = picture.size
    rows = min(height, max(MOST_FRAMES * width * target_h // target_w, 1))
    columns = min(width, max(MOST_FRAMES * height * target_w // target_h, 1))
    if (rows, columns) == (height, width):
        return picture
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture.crop((left, top, left + columns, top + rows))


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB as the Encoder makes it: alpha is dropped, 16-bit grey is scaled rather than clipped."""
    if picture.mode.startswith("I"):
        grey = np.asarray(picture)
        picture = Image.fromarray((grey // 257 if grey.max(initial=0) > 255 else grey).astype(np.uint8))
    elif picture.mode == "P":
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


class Tokenizer:
    """The text tower's tokenizer: the cleaning in Python, the pieces by `tokenizers`.

    Cleaning follows open_clip's: ftfy's rules for entities, quotes, ligatures, widths, line breaks, control
    characters and NFC, then HTML entities and blanks, and case or signs where the model wants it. Of ftfy's repairs of
    text that was decoded with the wrong character set, none is made: such text gives other pieces than open_clip's.

    Args:
        path: tokenizer.json.
        config: `kind` (`clip`, or `transformers`, whose file says itself where texts are cut and padded),
            `context_length`, `clean`, `blanked` (a token that is written as 0).
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        from tokenizers import Tokenizer as Backend

        self.backend = Backend.from_file(str(path))
        self.kind, self.cleaning = config.get("kind", "clip"), config["clean"]
        self.context_length, self.blanked = int(config["context_length"]), config.get("blanked")
        self.start, self.end = (
            self.backend.token_to_id(mark) for mark in ("<start_of_text>", "<end_of_text>")
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 `(n, context_length)`; longer texts are cut."""
        texts = as_list(texts, "texts")
        coded = self.backend.encode_batch([clean(text, self.cleaning) for text in texts])
        if self.kind != "clip":
            rows = np.array([found.ids for found in coded], dtype=np.int64).reshape(-1, self.context_length)
            return rows if self.blanked is None else np.where(rows == self.blanked, 0, rows)
        rows = np.zeros((len(texts), self.context_length), dtype=np.int64)  # zeros behind the end
        for row, found in zip(rows, coded, strict=True):
            pieces = [self.start, *found.ids, self.end][: self.context_length]
            if len(pieces) == self.context_length:
                pieces[-1] = self.end
            row[: len(pieces)] = pieces
        return rows


QUOTES = str.maketrans(
    {
        **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    }
)
LIGATURES = str.maketrans(
    {c: unicodedata.normalize("NFKC", c) for c in map(chr, [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD)])}
    | {c: unicodedata.normalize("NFKC", c) for c in map(chr, [*range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)])}
    | {"\ufb05": "\u017ft"}
)
WIDTHS = str.maketrans(
    {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFFF0)} | {"\u3000": " "}
)
UNWANTED = dict.fromkeys(
    [*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
)
SIGNS = str.maketrans("", "", string.punctuation)
ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
ESCAPE = re.compile("\033\\[[0-9;]*[a-zA-Z]")
HIGH_CONTROL = re.compile("[\x80-\x9f]")
SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]")


def clean(text: str, kind: str = "lower") -> str:
    """Text as the text tower's pieces are made from; see `Tokenizer`.

    Args:
        text: As people write it.
        kind: open_clip's word for it: `whitespace`, `lower` (and case), or `canonicalize` (and signs).
    """
    entities = "<" not in text
    while True:
        before = text
        if entities:
            text = ENTITY.sub(entity, text)
        text = HIGH_CONTROL.sub(windows_character, text)
        text = text.translate(LIGATURES).translate(WIDTHS).translate(QUOTES)
        text = re.sub("\r\n|[\r\u2028\u2029\u0085]", "\n", text)
        text = SURROGATES.sub(joined, text)
        text = ESCAPE.sub("", text).translate(UNWANTED)
        text = unicodedata.normalize("NFC", text)
        if text == before:
            break
    text = html.unescape(html.unescape(text))
    if kind == "canonicalize":
        text = text.replace("_", " ").translate(SIGNS)
    text = " ".join(text.split())
    return text if kind == "whitespace" else text.lower()


def entity(match: re.Match[str]) -> str:
    """The character of an entity that is known as a whole."""
    found = html.unescape(match[0])
    return match[0] if ";" in found else found


def windows_character(match: re.Match[str]) -> str:
    """What a C1 control character is in windows-1252, where it mostly comes from."""
    try:
        return match[0].encode("latin-1").decode("cp1252")
    except UnicodeDecodeError:
        return match[0]


def joined(match: re.Match[str]) -> str:
    """A pair of surrogates is one character; a single one is none."""
    return match[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")[:1]
