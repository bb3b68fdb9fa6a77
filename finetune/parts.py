"""Where the parts of a task model come from and under which licence, for the folder it is saved as."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import PretrainedLanguageModel
from pretrain.encoder import checkpoint_folder
from pretrain.recipe_model import Model, OpenClipModel, TimmTower, TransformersText

UNKNOWN = "not stated"
Parts = dict[str, dict[str, str]]


def parts_of(recipe: FinetuneRecipe) -> Parts:
    """Name and licence of the encoder and, for models that write, of the language model that a recipe begins with."""
    found = {"encoder": encoder_part(recipe.model)}
    if recipe.task.kind in ("caption", "vqa", "mixed"):
        config = recipe.language_model
        named = isinstance(config, PretrainedLanguageModel)
        found["language_model"] = part(config.name) if named else new("a language model of its own")
    return found


def encoder_part(config: Model) -> dict[str, str]:
    """The dual encoder; of one that is joined from towers, both."""
    if isinstance(config, OpenClipModel):
        folder = checkpoint_folder(config.name)
        name = f"{config.name}, {config.pretrained}" if config.pretrained else config.name
        return part(str(folder) if folder else config.name, name)
    image, text = config.image_tower, config.text_tower
    weights = image.weights if isinstance(image, TimmTower) else None
    towers = [
        part(weights) if weights else new("an image tower of its own"),
        part(text.name) if isinstance(text, TransformersText) else new("a text tower of its own"),
    ]
    return {key: "; ".join(dict.fromkeys(tower[key] for tower in towers)) for key in ("name", "licence")}


def new(name: str) -> dict[str, str]:
    """A part that began with random weights."""
    return {"name": name, "licence": "that of its training data"}


def part(place: str, name: str = "") -> dict[str, str]:
    """A part by the place it is loaded from."""
    return {"name": name or place, "licence": licence(place) or UNKNOWN}


def licence(place: str) -> str | None:
    """What a package, a folder's model card or (online, or when it is in the cache) a hub card says.

    Args:
        place: `package:NAME/...`, a folder, a file beside a card, `hf-hub:ORG/REPO` or a hub name.
    """
    if place.startswith("package:"):
        try:
            about: Any = metadata(place.removeprefix("package:").partition("/")[0].replace("_", "-"))
        except PackageNotFoundError:
            return None
        return about["License-Expression"] or about["License"]
    path = Path(place)
    folder = path if path.is_dir() else path.parent
    if path.exists():
        return of_card(folder / "README.md")
    name = place.removeprefix("hf-hub:").removeprefix("local-dir:")
    if name.count("/") != 1:
        return None
    from transformers.utils import cached_file

    try:
        return of_card(Path(str(cached_file(name, "README.md"))))
    except (OSError, ValueError):
        return None


def of_card(card: Path) -> str | None:
    """`license` in the header of a model card."""
    try:
        lines = card.read_text(encoding="utf-8").split("---")
        header = yaml.safe_load(lines[1]) if len(lines) > 2 and not lines[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    said = header.get("license_name") or header.get("license") if isinstance(header, dict) else None
    return str(said) if said else None
