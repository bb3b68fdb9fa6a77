"""The methods by name, and one picture with one text explained by any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explain.gradients import attention_rollout, chefer, grad_cam, integrated_gradients
from explain.layout import tower_layout
from explain.perturb import lime, occlusion, picture_players, shap_values, superpixels
from explain.targets import PairTarget, Target, score
from explain.words import Words, word_relevance
from pairstream.errors import nearest
from pretrain.encoder import Encoder

Heatmap = Callable[[Target, Tensor], Tensor]


def by_superpixels(
    explain: Callable[..., np.ndarray], target: Target, images: Tensor, pixels: Tensor
) -> Tensor:
    """LIME or SHAP over the superpixels of each picture: `(b, h, w)`, a part's value spread over its pixels."""
    maps = []
    for number, image in enumerate(images):
        parts = superpixels(image)
        count = int(parts.max()) + 1
        values = explain(picture_players(target, pixels, parts, number), count)
        maps.append(torch.from_numpy((values / np.bincount(parts.ravel()))[parts]).float())
    return torch.stack(maps)


METHODS: dict[str, Heatmap] = {
    "chefer": chefer,
    "gradcam": grad_cam,
    "rollout": attention_rollout,
    "occlusion": occlusion,
    "integrated_gradients": integrated_gradients,
}
SUPERPIXEL_METHODS = {"lime": lime, "shap": shap_values}
TEXT_METHODS = {"gradcam": "chefer"}  # how words are explained where the method is one for pictures alone
NEEDS = {  # of the extra `explain`
    "integrated_gradients": ("captum",),
    "lime": ("skimage",),
    "shap": ("skimage", "shap"),
}
NAMES = (*METHODS, *SUPERPIXEL_METHODS)


def default_method(encoder: Encoder) -> str:
    """`chefer` where the image tower is a ViT, else `gradcam`."""
    return "chefer" if tower_layout(encoder).kind == "vit" else "gradcam"


def check_method(method: str) -> None:
    """Refuse names that are none.

    Raises:
        ValueError: No such method.
    """
    if method not in NAMES:
        raise ValueError(
            f"no method {method!r}: expected auto or one of {', '.join(NAMES)}{nearest(method, NAMES)}"
        )


def heatmaps(target: Target, images: Tensor, method: str = "auto") -> Tensor:
    """Heatmaps of pictures.

    Args:
        target: What to explain, with one entry for each picture.
        images: uint8 `(b, 3, h, w)`, as `Encoder.preprocess` makes them.
        method: One of `NAMES`, or `auto`.

    Returns:
        float `(b, rows, columns)` on the CPU, in the method's own resolution and unit.

    Raises:
        ValueError: No such method, or one that the tower does not allow.
        ImportError: The extra `explain` is not installed.
    """
    if method == "auto":
        method = default_method(target.encoder)
    check_method(method)
    target.encoder.model.eval()
    pixels = target.encoder.pixels(images)
    if method in SUPERPIXEL_METHODS:
        return by_superpixels(SUPERPIXEL_METHODS[method], target, images.cpu(), pixels)
    return METHODS[method](target, pixels).float().cpu()


@dataclass(frozen=True)
class Explanation:
    """Why a model gave a picture and a text their score.

    Attributes:
        image: The picture as the model saw it, RGB.
        heat: float `(rows, columns)`: how much each part matters; larger is more.
        words: The text's words with their relevance; empty where there is no text.
        score: What was explained.
        method: How.
        title: The model, or what it wrote.
    """

    image: Image.Image
    heat: np.ndarray
    words: Words = field(default_factory=list)
    score: float = float("nan")
    method: str = ""
    title: str = ""


def to_pil(image: Tensor) -> Image.Image:
    """uint8 `(3, h, w)` as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def explain_pair(
    encoder: Encoder, image: Image.Image | bytes | Tensor, text: str, *, method: str = "auto"
) -> Explanation:
    """Why a dual encoder finds a picture and a text alike, on both sides.

    Args:
        encoder: The dual encoder.
        image: A PIL image, file contents, or uint8 `(3, H, W)`.
        text: The text.
        method: `auto` (Chefer's relevance on a ViT, Grad-CAM else), or one of `NAMES`.

    Returns:
        The explanation.

    Raises:
        ValueError: No such method, one that the tower does not allow, or an empty text.
        ImportError: The extra `explain` is not installed.
        data.faults.Fault: File contents that are no picture.

    Example:
        >>> explain_pair(load_encoder("runs/pretrain"), picture, "a red heart").words  # doctest: +SKIP
        [('a', 0.01), ('red', 0.2), ('heart', 0.35)]
    """
    if not text.strip():
        raise ValueError("an empty text cannot be explained: give some words")
    if method == "auto":
        method = default_method(encoder)
    images = encoder.preprocess(image)[None]
    target = PairTarget(encoder, encoder.encode_texts([text]))
    heat = heatmaps(target, images, method)[0].numpy()
    with torch.no_grad():
        value = float(score(target, encoder.pixels(images))[0])
    words = word_relevance(encoder, encoder.encode_images(images)[0], text, TEXT_METHODS.get(method, method))
    return Explanation(to_pil(images[0]), heat, words, value, method, encoder.name)
