"""The Encoder: what every later stage takes, whatever the model behind it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from data.transforms import EvalTransform, decode_image
from pairstream.atomic import new_folder, write_text
from pretrain.adapters import plain_state
from pretrain.checkpoint import save_tensors
from pretrain.recipe_model import Model, OpenClipModel, TowersModel
from pretrain.resolution import as_size, resize_image_tower
from pretrain.short_texts import text_features
from pretrain.towers import CONFIG, WEIGHTS, Built, build_named, build_towers, read_checkpoint


class Encoder:
    """A dual encoder: pictures and texts in, unit-norm float32 rows of one space out.

    Args:
        built: The model, tokenizer and configuration.
        name: What it was loaded from, for reports.
        device: A torch device, or `auto` for a GPU where there is one.

    Attributes:
        model: open_clip's module, in evaluation mode.
        embed_dim: Width of the rows.
        image_size: Height and width of the image input, pixels.
        transform: Decoded pictures to the input size, as open_clip does in evaluation.
        token_dim: Width of the image tower's tokens.

    Example:
        >>> encoder = load_encoder("runs/quickstart/pretrain")                     # doctest: +SKIP
        >>> scores = encoder.encode_images([picture]) @ encoder.encode_texts(["a cat", "a dog"]).T
    """

    def __init__(self, built: Built, name: str, device: str | torch.device = "auto"):
        self.name = name
        self.device = pick_device(device)
        self.model: Any = built.model.to(self.device).eval()
        self.layout = torch.contiguous_format
        if not isinstance(self.model.visual, VisionTransformer) and channels_last_is_safe(
            self.model.visual, self.device
        ):
            # Convolutions are 10 to 25 % faster on channels-last pixels, on CPU as on GPU.
            self.layout = torch.channels_last
            self.model.visual.to(memory_format=self.layout)
        self.tokenizer = built.tokenizer
        self.model_cfg, self.preprocess_cfg = built.model_cfg, built.preprocess_cfg
        self.image_size = as_size(built.preprocess_cfg["size"])
        self.embed_dim = int(built.model_cfg["embed_dim"])
        self.transform = EvalTransform(
            self.image_size,
            interpolation=built.preprocess_cfg["interpolation"],
            resize_mode=built.preprocess_cfg["resize_mode"],
            fill_color=built.preprocess_cfg["fill_color"],
        )
        self.normalize = Normalize(built.preprocess_cfg["mean"], built.preprocess_cfg["std"], self.layout)
        self.normalize.to(self.device)

    def set_image_size(self, size: tuple[int, int]) -> None:
        """Take pictures of another size from now on, here and in checkpoints; positions are interpolated.

        Args:
            size: (height, width), pixels.

        Raises:
            ValueError: A size that the image tower cannot take.
        """
        if size == self.image_size:
            return
        resize_image_tower(self.model.visual, size)
        self.image_size = size
        self.transform = replace(self.transform, size=size)
        # Squares are one number in open_clip's configurations.
        plain = size[0] if size[0] == size[1] else list(size)
        self.model_cfg = {
            **self.model_cfg,
            "vision_cfg": {**self.model_cfg["vision_cfg"], "image_size": plain},
        }
        self.preprocess_cfg = {**self.preprocess_cfg, "size": list(size)}

    def preprocess(self, image: Image.Image | bytes | Tensor) -> Tensor:
        """One picture, encoded, opened or decoded, to the model's input.

        Args:
            image: A PIL image, the bytes of a file, or uint8 `(3, H, W)`.

        Returns:
            uint8 `(3, h, w)`.

        Raises:
            data.faults.Fault: The bytes are no picture or too large.
        """
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W)
        elif isinstance(image, bytes | bytearray):
            image = decode_image(bytes(image))
        return self.transform(image)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts to int64 `(n, context_length)`; longer ones are cut."""
        return self.tokenizer(list(texts))

    @torch.no_grad()
    def encode_images(self, images: Tensor | Sequence[Image.Image | bytes]) -> Tensor:
        """Embed pictures.

        Args:
            images: uint8 `(b, 3, h, w)` as `preprocess` makes them, or PIL images or file contents.

        Returns:
            float32 `(b, embed_dim)`, rows of length one, on the encoder's device.
        """
        if not isinstance(images, Tensor):
            images = torch.stack([self.preprocess(image) for image in images])
        self.model.eval()
        return F.normalize(self.model.encode_image(self.pixels(images)).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Tensor | Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: Strings, or int64 tokens `(n, context_length)`.

        Returns:
            float32 `(n, embed_dim)`, rows of length one, on the encoder's device.
        """
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        self.model.eval()
        return F.normalize(text_features(self.model, tokens.to(self.device)).float(), dim=-1)

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 `(b, 3, h, w)` to the normalised float input of the image tower, on the device."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 images (b, 3, h, w), got {images.dtype} {tuple(images.shape)}")
        return self.normalize(images.to(self.device, non_blocking=True))

    def image_tokens(self, images: Tensor) -> Tensor:
        """The image tower's last tokens, before pooling and projection; gradients flow where parameters train.

        Args:
            images: uint8 `(b, 3, h, w)`.

        Returns:
            float `(b, n, token_dim)`, row by row over the picture.
        """
        return self.tokens_of(self.pixels(images))

    def tokens_of(self, pixels: Tensor, *, finer: bool = False) -> Tensor:
        """`image_tokens` of normalised pixels, for those who want gradients as far as the picture.

        Args:
            pixels: Float `(b, 3, h, w)` as `pixels` makes them.
            finer: Take the map in front of a convolutional tower's last stage: four times as many tokens, of fewer
                channels and with less of their surroundings.

        Returns:
            float `(b, n, token_dim)`; of finer tokens `(b, n, d)`.

        Raises:
            ValueError: Finer tokens of a tower that has one grid throughout.
        """
        visual = self.model.visual
        if finer and not narrows(visual):
            raise ValueError(
                f"{self.name}: finer tokens are those in front of the last stage of a convolutional tower, and a "
                f"{type(getattr(visual, 'trunk', visual)).__name__} has one grid throughout: take its last tokens"
            )
        if isinstance(visual, VisionTransformer):
            found = visual.forward_intermediates(
                pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
            )
            return found["image_intermediates"][-1]
        if isinstance(visual, ModifiedResNet):
            grid = visual.stem(pixels)
            for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)[: 3 if finer else 4]:
                grid = stage(grid)
        elif isinstance(visual, TimmModel):
            trunk: Any = visual.trunk
            if finer:
                grid = trunk.forward_intermediates(pixels, indices=2, intermediates_only=True)[0]
            else:
                grid = channels_first(visual, trunk.forward_features(pixels))
        else:
            raise TypeError(f"{self.name}: no image tokens known for an image tower {type(visual).__name__}")
        return grid.flatten(2).transpose(1, 2) if grid.ndim == 4 else grid  # (b, n, token_dim)

    @cached_property
    def token_dim(self) -> int:
        """Width of the image tower's tokens."""
        with torch.no_grad():
            return self.image_tokens(torch.zeros(1, 3, *self.image_size, dtype=torch.uint8)).shape[-1]

    @property
    def fingerprint(self) -> str:
        """A hash of weights and configuration: equal for equal models, wherever they lie."""
        config = {"model": without_paths(self.model_cfg), "preprocess": self.preprocess_cfg}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
        for name, value in sorted(plain_state(self.model).items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path, card: str = "") -> Path:
        """Write a checkpoint that stock open_clip opens as `local-dir:FOLDER`.

        Args:
            folder: Replaced as a whole when it exists.
            card: Markdown for its README.md.

        Returns:
            The folder.

        Raises:
            OSError: The disk is full or not writable; what was there before is untouched.
        """
        folder = Path(folder)
        with new_folder(folder) as temporary:
            self.write_into(temporary, final=folder, card=card)
        return folder

    def write_into(
        self, folder: Path, *, final: Path, card: str = "", weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the checkpoint's files into an existing folder that will be known as `final`.

        `weights` are the model's own when None; a copy can be written while the model trains on.
        """
        model_cfg = dict(self.model_cfg)
        if model_cfg["text_cfg"].get("hf_model_name"):
            # open_clip reads a transformers tower's configuration from the place that is named here.
            model_cfg["text_cfg"] = {**model_cfg["text_cfg"], "hf_model_name": str(final.resolve())}
            self.model.text.config.save_pretrained(folder)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)  # pyright: ignore
        config = {"model_cfg": model_cfg, "preprocess_cfg": self.preprocess_cfg}
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        own: Mapping[str, Tensor] = plain_state(self.model) if weights is None else weights
        state = {name: value.detach().cpu().contiguous() for name, value in own.items()}
        save_tensors(state, folder / WEIGHTS)
        write_text(folder / "README.md", card or f"# {final.name}\n\nA dual encoder saved by PairStream.\n")


def channels_last_is_safe(visual: nn.Module, device: torch.device) -> bool:
    """Whether a tower's backward pass can run on channels-last pixels.

    On CPUs oneDNN (torch 2.15) writes past its memory, and the process dies, in the backward pass of strided 1 x 1
    convolutions of fewer than 8 channels. Towers of MobileOne's blocks begin with one: FastViT, MobileCLIP, RepVGG.
    """
    return device.type != "cpu" or not any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels < 8
        for layer in visual.modules()
    )


class Normalize(nn.Module):
    """uint8 pixels to the floats an image tower expects: `(x / 255 - mean) / std` in one multiply-add."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        layout: torch.memory_format = torch.contiguous_format,
    ):
        super().__init__()
        self.layout = layout
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `(b, 3, h, w)` to float `(b, 3, h, w)`."""
        pixels = images.to(self.scale.dtype, memory_format=self.layout)  # pyright: ignore
        return torch.addcmul(self.shift, pixels, self.scale)  # pyright: ignore


def load_encoder(model: str | Path, *, pretrained: str | None = None, device: str = "auto") -> Encoder:
    """Load a dual encoder from wherever it is.

    Args:
        model: A checkpoint folder, `local-dir:PATH`, a run folder of `pretrain` (its newest checkpoint) or of
            `finetune` (the encoder of its newest task model), a name of open_clip's, or `hf-hub:ORG/REPO`.
        pretrained: open_clip's tag of weights, for a name.
        device: A torch device, or `auto`.

    Returns:
        The Encoder, in evaluation mode.

    Raises:
        FileNotFoundError: `local-dir:` names no folder.
        ValueError: No such model, or a damaged checkpoint.

    Example:
        >>> load_encoder("ViT-B-32", pretrained="laion2b_s34b_b79k")              # doctest: +SKIP
    """
    return build_encoder(OpenClipModel(name=str(model), pretrained=pretrained), device=device)


def build_encoder(config: Model, *, device: str | torch.device = "auto") -> Encoder:
    """Build the Encoder that a recipe's `model` describes; see `load_encoder` for names."""
    if isinstance(config, TowersModel):
        return Encoder(build_towers(config), "towers", device)
    folder = checkpoint_folder(config.name)
    return Encoder(build_named(config) if folder is None else read_checkpoint(folder), config.name, device)


def checkpoint_folder(name: str) -> Path | None:
    """The checkpoint that a path or `local-dir:` means; None for other names.

    Raises:
        FileNotFoundError: `local-dir:` names no folder.
        ValueError: A folder without a checkpoint.
    """
    explicit = name.startswith("local-dir:")
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if not path.is_dir():
        if explicit or (len(path.parts) > 1 and not name.startswith("hf-hub:")):
            raise FileNotFoundError(f"no folder {path}: expected a checkpoint ({CONFIG}) or a run folder")
        return None
    steps = sorted((path / "checkpoints").glob("step-*"), reverse=True)
    for candidate in (path, path / "model", *(step / "model" for step in steps)):
        for folder in (candidate, candidate / "encoder"):  # the latter is a task model's
            if (folder / CONFIG).is_file():
                return folder
    raise ValueError(
        f"{path}: no checkpoint there: expected {CONFIG}, or checkpoints/step-*/model in a run folder"
    )


def channels_first(visual: Any, found: Tensor) -> Tensor:
    """What a module of an image tower gives, with a map as `(b, c, rows, columns)`: Swin's have their channels last."""
    last = getattr(getattr(visual, "trunk", None), "output_fmt", "NCHW") == "NHWC" and found.ndim == 4
    return found.permute(0, 3, 1, 2) if last else found


def narrows(visual: Any) -> bool:
    """Whether an image tower's last stage has fewer cells than the one in front of it."""
    if isinstance(visual, ModifiedResNet):
        return True
    stages = list(getattr(getattr(visual, "trunk", None), "feature_info", None) or ())
    return len(stages) > 1 and stages[-1]["reduction"] > stages[-2]["reduction"]


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` means a GPU where there is one.

    Raises:
        ValueError: No such device, or none here.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {str(device)!r}: expected auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"device {str(device)!r}: torch finds {count} GPUs on this machine; take auto or cpu"
        )
    return found


def without_paths(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the names of places, for comparing."""
    text = {
        key: value
        for key, value in model_cfg["text_cfg"].items()
        if not key.startswith("hf_") or "name" not in key
    }
    return {**model_cfg, "text_cfg": text}
