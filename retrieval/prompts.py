"""Class names and prompt templates for zero-shot classification: by name, or from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pairstream.errors import nearest

Templates: TypeAlias = (
    Sequence[str] | Mapping[str, Sequence[str]]
)  # one list for all classes, or one for each

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
    "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal "
    "shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
    "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
# The CLIP paper's prompts for CIFAR: nine kinds of photo, each with `a` and with `the`.
CIFAR_PHOTOS = (
    "a photo of {} {{}}.",
    "a blurry photo of {} {{}}.",
    "a black and white photo of {} {{}}.",
    "a low contrast photo of {} {{}}.",
    "a high contrast photo of {} {{}}.",
    "a bad photo of {} {{}}.",
    "a good photo of {} {{}}.",
    "a photo of {} small {{}}.",
    "a photo of {} big {{}}.",
)


def named_classes() -> dict[str, list[str]]:
    """Class names that are known by a name; ImageNet's are open_clip's, cleaned by OpenAI."""
    from open_clip import IMAGENET_CLASSNAMES

    return {
        "imagenet": list(IMAGENET_CLASSNAMES),
        "cifar10": list(CIFAR10),
        "cifar100": [name.replace("_", " ") for name in CIFAR100.split()],
    }


def named_templates() -> dict[str, list[str]]:
    """Templates that are known by a name: `imagenet` (80), `simple` (7), `cifar` (18), `plain` (1)."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    return {
        "imagenet": [template("{}") for template in OPENAI_IMAGENET_TEMPLATES],
        "simple": [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES],
        "cifar": [photo.format(word) for word in ("a", "the") for photo in CIFAR_PHOTOS],
        "plain": ["a photo of a {}."],
    }


def load_classes(name: str | Path) -> list[str]:
    """Class names in the order of the labels.

    Args:
        name: `imagenet`, `cifar10`, `cifar100`, or a file: one name a line, or a JSON list.

    Returns:
        The names.

    Raises:
        FileNotFoundError: Neither a known name nor a file.
        ValueError: A file with fewer than two names, with an empty one, or of another form.
    """
    known = named_classes()
    if str(name) in known:
        return known[str(name)]
    return checked_classes(read_list(name, "classes", known), str(name))


def checked_classes(names: Any, source: str) -> list[str]:
    """Class names as a list. Repeated ones are allowed: open_clip's ImageNet list has two pairs of them.

    Raises:
        ValueError: Fewer than two, or an empty one.
    """
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{source}: expected a list of class names, none of them empty")
    if len(names) < 2:
        raise ValueError(f"{source}: expected two or more class names, got {len(names)}")
    return list(names)


def load_templates(name: str | Path, classes: Sequence[str]) -> Templates:
    """Prompt templates.

    Args:
        name: `imagenet`, `simple`, `cifar`, `plain`, or a file: one template a line with `{}` (or `{c}`) for
            the class, a JSON list of them, or a JSON object that has the prompts of each class (as CuPL).
        classes: The class names.

    Returns:
        Templates with `{}`, or prompts by class.

    Raises:
        FileNotFoundError: Neither a known name nor a file.
        ValueError: A template without a place for the class, a class without prompts, or another form.
    """
    known = named_templates()
    if str(name) in known:
        return known[str(name)]
    return checked_templates(read_list(name, "templates", known), classes, str(name))


def checked_templates(templates: Any, classes: Sequence[str], source: str) -> Templates:
    """Templates in one form: `{}` for the class, or prompts for each class.

    Raises:
        ValueError: As `load_templates`.
    """
    if isinstance(templates, Mapping):
        for name in classes:
            prompts = templates.get(name)
            if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise ValueError(
                    f"{source}: expected a list of prompts for each class, class {name!r} has {prompts!r}"
                    f"{nearest(name, templates) if prompts is None else ''}"
                )
        return {name: list(templates[name]) for name in classes}
    if isinstance(templates, str) or not templates:
        raise ValueError(f"{source}: expected one or more templates")
    result = []
    for template in templates:
        template = template.replace("{c}", "{}") if isinstance(template, str) else ""
        if template.count("{}") < 1:
            raise ValueError(f"{source}: the template {template!r} has no {{}} for the class name")
        result.append(template)
    return result


def prompts_of(name: str, templates: Templates) -> list[str]:
    """The prompts of one class."""
    if isinstance(templates, Mapping):
        return list(templates[name])
    return [template.replace("{}", name) for template in templates]


def templates_hash(classes: Sequence[str], templates: Templates) -> str:
    """A hash of every prompt of every class, in order."""
    content = [[name, prompts_of(name, templates)] for name in classes]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8")).hexdigest()[:16]


def read_list(name: str | Path, what: str, known: Mapping[str, Any]) -> Any:
    """Lines of a text file, or the content of a JSON file."""
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"no {what} {str(name)!r}: expected a file or one of {', '.join(known)}{nearest(str(name), known)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text)
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"{path}: expected UTF-8 text, one entry a line, or JSON: {error}") from error
    if not isinstance(content, list | dict) or (what == "classes" and isinstance(content, dict)):
        raise ValueError(f"{path}: expected a JSON list of {what}, got {type(content).__name__}")
    return content
