"""Dual encoders from a recipe or a name, always built by open_clip itself."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pairstream.errors import nearest, require
from pretrain.recipe_model import OpenClipModel, TimmTower, TowersModel, TransformersText

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
Tokenizer = Callable[[Sequence[str]], torch.Tensor]


class Built(NamedTuple):
    """A dual encoder with everything that must travel with it."""

    model: nn.Module
    """open_clip's CLIP or CustomTextCLIP."""
    tokenizer: Tokenizer
    """Texts to int64 `(n, context_length)`."""
    model_cfg: dict[str, Any]
    """The architecture in open_clip's words."""
    preprocess_cfg: dict[str, Any]
    """Size, mean, std, interpolation and resize mode of the image input."""


def build_towers(config: TowersModel) -> Built:
    """Build a dual encoder from tower sizes, with random weights or the towers' own.

    Args:
        config: The recipe's `model` of kind `towers`.

    Returns:
        The dual encoder and its configuration.

    Raises:
        ValueError: An unknown timm model, one that takes pictures of another size, or tower weights that do not fit.
        ImportError: A `package:` of weights is not installed.
    """
    image, text = config.image_tower, config.text_tower
    model_cfg = config.model_cfg()
    preprocess_cfg: dict[str, Any] = {}
    if isinstance(image, TimmTower):
        timm = require("timm", "towers", "a timm image tower")
        if not timm.is_model(image.name):
            raise ValueError(
                f"model.image_tower.name: timm knows no {image.name!r}{nearest(image.name, timm.list_models())}"
            )
        preprocess_cfg = {"mean": image.mean, "std": image.std}
    folder = None
    if isinstance(text, TransformersText):
        folder = package_path(text.name)
        model_cfg["text_cfg"] |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    built = instantiate(model_cfg, preprocess_cfg, assets=folder, text_weights=folder is not None)
    begin_decoder(built.model)
    if isinstance(image, TimmTower):
        require_native_size(image, built.model)
        require_projection(image, built.model)
    if isinstance(image, TimmTower) and image.weights:
        own = classifier_name(built.model) if image.projection == "classifier" else None
        load_tower_weights(built.model.visual.trunk, package_path(image.weights), without=own)  # pyright: ignore
    return built


def require_native_size(config: TimmTower, model: Any) -> None:
    """Refuse a picture size that a timm transformer was not made for; open_clip leaves it at its own.

    Raises:
        ValueError: It would fail at its first picture.
    """
    patches = getattr(model.visual.trunk, "patch_embed", None)
    native, strict = getattr(patches, "img_size", None), getattr(patches, "strict_img_size", False)
    if native and strict and tuple(native) != (config.image_size, config.image_size):
        raise ValueError(
            f"model.image_tower.image_size {config.image_size}: timm's {config.name} takes pictures of "
            f"{native[0]} x {native[1]} pixels only"
        )


def require_projection(config: TimmTower, model: Any) -> None:
    """Refuse a projection that does not fit the features in front of it.

    Raises:
        ValueError: A linear one or an MLP behind hidden layers of another width, which open_clip does not count; or the
            classifier of a network that is not convolutional.
    """
    trunk = model.visual.trunk
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    if config.projection != "classifier" and width != trunk.num_features:
        raise ValueError(
            f"model.image_tower.projection: {config.projection}: timm's {config.name} has a hidden layer behind its "
            f"{trunk.num_features} pooled features ({width} come out): set projection: classifier"
        )
    if config.projection == "classifier" and not trunk.default_cfg.get("pool_size"):
        raise ValueError(
            f"model.image_tower.projection: classifier is for convolutional networks, timm's {config.name} is none: "
            "take linear or mlp"
        )


def classifier_name(model: Any) -> str:
    """The classifier's name in a timm trunk, which is the projection of one built so."""
    return model.visual.trunk.default_cfg["classifier"]


def check_name(name: str, pretrained: str | None) -> None:
    """Refuse a name or tag that open_clip does not know, without loading anything; a hub's names are not looked up.

    Raises:
        ValueError: No such model or tag.
    """
    if "://" not in name and not name.startswith("hf-hub:"):
        names = open_clip.list_models()
        if name not in names:
            raise ValueError(
                f"no model {name!r}: expected a checkpoint folder, a run folder, 'hf-hub:ORG/REPO' "
                f"or a name of open_clip's{nearest(name, names)}"
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained and pretrained not in tags and not Path(pretrained).is_file():
            raise ValueError(
                f"model {name!r} has no weights {pretrained!r}{nearest(pretrained, tags)}; "
                f"open_clip has: {', '.join(tags) or 'none'}"
            )


def build_named(config: OpenClipModel) -> Built:
    """Build a dual encoder that open_clip knows by name; names and tags are handed to it untouched.

    Raises:
        ValueError: No such model or tag.
    """
    name, pretrained = config.name, config.pretrained
    check_name(name, pretrained)
    # What open_clip says about real weights matters.
    with nullcontext() if pretrained or name.startswith("hf-hub:") else quiet():
        model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=bool(pretrained))
        tokenizer = open_clip.get_tokenizer(name)
    if not pretrained and not name.startswith("hf-hub:"):
        begin_decoder(model)
    model_cfg = open_clip.get_model_config(name)
    assert model_cfg is not None, "open_clip built the model from this configuration"
    return Built(model, tokenizer, model_cfg, dict(model.visual.preprocess_cfg))  # pyright: ignore


def begin_decoder(model: Any) -> None:
    """Give a CoCa model's decoder random first weights where open_clip leaves memory as it finds it.

    Its projection on the vocabulary is made by `torch.empty` and never filled (open_clip 3.3), so that a model from
    scratch begins with any numbers, NaN among them.
    """
    decoder = getattr(model, "text_decoder", None)
    if decoder is not None and decoder.text_projection is not None:
        nn.init.normal_(decoder.text_projection, std=len(decoder.text_projection) ** -0.5)


def read_checkpoint(folder: Path) -> Built:
    """Read a checkpoint folder (`open_clip_config.json` and `open_clip_model.safetensors`).

    Raises:
        ValueError: A file is missing, cut short, or does not fit the other.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: expected open_clip's configuration with 'model_cfg': {error}"
        ) from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / WEIGHTS}: not a whole safetensors file ({error}). The checkpoint is damaged or was cut; "
            "take an older one of the run, or copy it again."
        ) from error
    model_cfg = deepcopy(model_cfg)
    if model_cfg["text_cfg"].get("hf_model_name") and (folder / "config.json").is_file():
        model_cfg["text_cfg"]["hf_model_name"] = str(folder.resolve())  # the folder may have been moved
    built = instantiate(model_cfg, preprocess_cfg, assets=folder)
    try:
        built.model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit {CONFIG}: {error}") from error
    return built


def instantiate(
    model_cfg: dict[str, Any],
    preprocess_cfg: dict[str, Any],
    *,
    assets: Path | None = None,
    text_weights: bool = False,
) -> Built:
    """Let open_clip build an architecture that it has no name for.

    open_clip takes unnamed architectures from a folder, so one is written for the moment of building.

    Args:
        model_cfg: The architecture; a transformers text tower is named by a folder.
        preprocess_cfg: Overrides of open_clip's image preprocessing.
        assets: The folder of a transformers tokenizer.
        text_weights: Whether a transformers text tower brings its own weights.

    Raises:
        ValueError: open_clip refuses the configuration.
    """
    with tempfile.TemporaryDirectory() as temporary, quiet():
        folder = Path(temporary)
        content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=text_weights
            )
            if model_cfg["text_cfg"].get("hf_tokenizer_name") and assets is not None:
                for file in assets.resolve().glob("*.*"):
                    if file.suffix in (".json", ".txt", ".model") and file.name != CONFIG:
                        (folder / file.name).symlink_to(file)
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        except (TypeError, AssertionError, KeyError, RuntimeError) as error:
            raise ValueError(f"open_clip could not build this model: {error}") from error
    return Built(model, tokenizer, model_cfg, dict(model.visual.preprocess_cfg))  # pyright: ignore


def package_path(name: str) -> Path:
    """A file or folder given as a path, or as `package:NAME/path/in/it` of an installed package."""
    if not name.startswith("package:"):
        return Path(name)
    package, _, inside = name.removeprefix("package:").partition("/")
    require(package, "towers", f"the tower weights {name!r}")
    return Path(str(files(package))) / inside


def load_tower_weights(tower: nn.Module, path: Path, without: str | None = None) -> None:
    """Load an image tower's own weights, by name or, for the same architecture under other names, by order.

    Weights of one architecture that another library saved have the same tensors in the same order; they are
    taken only when every shape agrees.

    Args:
        tower: The trunk, without a classifier.
        path: A .safetensors file, or a .pth that holds tensors only.
        without: A layer that keeps what it has.

    Raises:
        ValueError: No such file, not tensors, or a tensor that does not fit.
    """
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise ValueError(f"{path}: could not read tower weights: {error}") from error
    own = {key: value for key, value in tower.state_dict().items() if key.rpartition(".")[0] != without}
    if not set(own) <= set(state):
        state = dict(zip(own, state.values(), strict=False))
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        came = tuple(state[name].shape) if name in state else "nothing"
        raise ValueError(
            f"{path}: these weights are of another architecture: {len(wrong)} of {len(own)} tensors differ, "
            f"first {name!r}: expected {tuple(own[name].shape)}, got {came}"
        )
    tower.load_state_dict({name: state[name] for name in own}, strict=without is None)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back a library's advice: open_clip's on random weights that are asked for, exporters' on what is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
