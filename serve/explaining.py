"""Heatmaps of what is served: on twins of the models, so that a hook never sees another request's pass."""

from __future__ import annotations

import base64
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from explain.gradients import resize_map
from explain.layout import tower_layout
from explain.methods import Explanation, default_method, explain_pair
from explain.picture import overlay, png
from explain.tasks import explain_answer, explain_caption, explain_label
from pretrain.encoder import Encoder
from serve.models import Models
from serve.refusal import Refusal
from serve.schemas import Explained, Map, Word

ATTENTION_METHODS = ("chefer", "rollout")  # they need an image tower whose tokens attend to each other
CELLS = 32  # rows and columns of a map in an answer; finer ones are averaged
SIDE = 320  # pixels of the longer side of a picture that is sent back
Model = TypeVar("Model")


@dataclass(frozen=True)
class Wish:
    """One explanation to be made.

    Attributes:
        image: uint8 `(3, h, w)` of the model's size.
        of: `text`, `caption`, `answer` or `label`.
        text: The text, the caption to explain instead of the model's own, or the post's text.
        question: For an answer.
        label: Which label; None for the most probable.
        method: `auto`, or a method's name.
        pictures: Whether the maps are drawn as well.
    """

    image: Tensor
    of: str
    text: str | None
    question: str | None
    label: str | None
    method: str
    pictures: bool


class Explainer:
    """Makes explanations, one at a time.

    Every model has a twin here: other modules around the same tensors, at no cost of memory. Grad-CAM and Chefer's
    relevance hang hooks on modules and ask for gradients, which must not meet the passes of other requests.

    Args:
        models: What is served.
        methods: Methods that may be asked for.
        maps: Most maps of one answer: of a caption, as many words are explained.

    Attributes:
        offered: For each thing that can be explained, the methods that its image tower allows, the default first.
    """

    def __init__(self, models: Models, methods: Sequence[str], maps: int):
        self.maps = maps
        served: dict[str, tuple[Any, str] | None] = {
            "text": (models.encoder, models.identity.name),
            "caption": models.captioner and (models.captioner[0], models.captioner[1].name),
            "answer": models.vqa and (models.vqa[0], models.vqa[1].name),
            "label": models.classifier and (models.classifier[0], models.classifier[1].name),
        }
        self.twins: dict[str, Any] = {}
        self.offered: dict[str, list[str]] = {}
        for of, found in served.items():
            if found is None:
                continue
            model, name = found
            model = twin(model)
            encoder: Encoder = model if of == "text" else model.encoder
            encoder.name = name  # where it lies is nobody's business
            try:
                allowed = allowed_methods(encoder, methods)
            except TypeError:  # a tower that no method knows
                continue
            if allowed:
                self.twins[of], self.offered[of] = model, allowed

    def check(self, of: str, method: str) -> None:
        """Refuse what is not offered.

        Raises:
            Refusal: 422: a model that is not there, or a method that is switched off or that its tower does not allow.
        """
        if of not in self.offered:
            raise Refusal(
                422, "cannot_explain", f"of: expected one of {', '.join(self.offered) or 'nothing'}, got {of}"
            )
        if method != "auto" and method not in self.offered[of]:
            raise Refusal(
                422,
                "no_such_method",
                f"method: expected auto or one of {', '.join(self.offered[of])} to explain {of}, got {method}",
            )

    def run(self, wishes: Sequence[Wish]) -> list[Explained]:
        """Explanations; in the worker thread.

        Raises:
            Refusal: 422: nothing that could be explained.
        """
        try:
            return [self.explain(wish) for wish in wishes]
        except ValueError as error:  # what the library says to a user, with the model's short name
            raise Refusal(422, "cannot_explain", str(error)) from None

    def explain(self, wish: Wish) -> Explained:
        """One explanation."""
        model, image = self.twins[wish.of], wish.image
        method = self.offered[wish.of][0] if wish.method == "auto" else wish.method
        if wish.of == "text":
            said = wish.text or ""
            found = [explain_pair(model, image, said, method=method)]
        elif wish.of == "caption":
            said = model.caption([image])[0] if wish.text is None else wish.text
            said = " ".join(said.split()[: self.maps])
            if not said:
                raise Refusal(422, "cannot_explain", "the captioner wrote nothing about this picture")
            found = explain_caption(model, image, caption=said, method=method)
        elif wish.of == "answer":
            question = wish.question or ""
            said = model.answer([image], [question])[0].strip()
            if not said:
                raise Refusal(422, "cannot_explain", "the model answered nothing to this question")
            found = [explain_answer(model, image, question, answer=said, method=method)]
        else:
            found = [explain_label(model, image, wish.text, label=wish.label, method=method)]
            said = found[0].title
        return Explained(
            said=said,
            method=method,
            maps=[as_map(each, drawn=wish.pictures) for each in found],
            picture=encoded(shown(found[0].image)) if wish.pictures else None,
        )


def twin(model: Model) -> Model:
    """A copy with modules of its own around the same tensors."""
    modules = [model.model] if isinstance(model, Encoder) else [model, model.encoder.model]  # pyright: ignore
    shared: dict[int, Any] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)


def allowed_methods(encoder: Encoder, methods: Sequence[str]) -> list[str]:
    """Methods that an image tower allows, its default first where that is among them."""
    default, vit = default_method(encoder), tower_layout(encoder).kind == "vit"
    allowed = [name for name in methods if vit or name not in ATTENTION_METHODS]
    return sorted(allowed, key=lambda name: name != default)


def as_map(found: Explanation, *, drawn: bool) -> Map:
    """An explanation as it is sent."""
    heat = torch.from_numpy(found.heat).float()[None]
    if max(heat.shape[1:]) > CELLS:
        heat = resize_map(heat, (min(CELLS, heat.shape[1]), min(CELLS, heat.shape[2])))
    return Map(
        title=found.title,
        score=found.score,
        heat=heat[0].tolist(),
        words=[Word(word=word, relevance=value) for word, value in found.words],
        png=encoded(overlay(found.image, found.heat, SIDE)) if drawn else None,
    )


def shown(image: Image.Image) -> Image.Image:
    """The picture as the model saw it, in the size of the maps."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> str:
    """A PNG file in base64."""
    return base64.b64encode(png(image)).decode()
