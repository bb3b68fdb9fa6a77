"""Which parts of the towers train: projections, the last layer groups, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from pretrain.recipe import Phase

Part = nn.Module | nn.Parameter
Groups = Sequence[Sequence[Part]]


def image_groups(model: Any) -> tuple[Groups, Sequence[Part]]:
    """The image tower's layer groups from input to output, and its projection.

    Raises:
        ValueError: An image tower whose layers are not known.
    """
    visual = model.visual
    if isinstance(visual, VisionTransformer):
        stem: list[Part] = [visual.conv1, visual.class_embedding, visual.ln_pre]
        if isinstance(visual.positional_embedding, nn.Parameter):
            stem.append(visual.positional_embedding)
        blocks = [[block] for block in visual.transformer.resblocks]
        return [stem, *blocks[:-1], [*blocks[-1], visual.ln_post]], image_projection(model)
    if isinstance(visual, ModifiedResNet):
        stem = [visual.conv1, visual.bn1, visual.conv2, visual.bn2, visual.conv3, visual.bn3]
        stages = [[visual.layer1], [visual.layer2], [visual.layer3], [visual.layer4]]
        return [stem, *stages], image_projection(model)
    if isinstance(visual, TimmModel):
        return timm_groups(visual.trunk), image_projection(model)
    raise ValueError(f"cannot lock parts of an image tower {type(visual).__name__}; use image_groups: all")


def image_projection(model: Any) -> list[Part]:
    """What follows the image tower's last layer group."""
    visual = model.visual
    if isinstance(visual, TimmModel) and not len(visual.head):
        trunk: Any = visual.trunk
        return [trunk.get_classifier()]
    return present([getattr(visual, name, None) for name in ("proj", "attnpool", "head")])


def text_projection(model: Any) -> list[Part]:
    """What follows the text tower's last layer group."""
    text = getattr(model, "text", model)
    return present([getattr(text, name, None) for name in ("proj", "text_projection")])


def timm_groups(trunk: Any) -> Groups:
    """A timm trunk's layer groups, as its own group matcher has them."""
    from timm.models import group_parameters

    parameters = dict(trunk.named_parameters())
    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    return [[parameters[name] for name in groups[key]] for key in sorted(groups)]


def text_groups(model: Any) -> tuple[Groups, Sequence[Part]]:
    """The text tower's layer groups from input to output, and its projection.

    Raises:
        ValueError: A transformers text tower whose layers are not where BERT has them.
    """
    text = getattr(model, "text", model)
    if isinstance(text, HFTextEncoder):
        backbone: Any = text.transformer
        layers = getattr(getattr(backbone, "encoder", None), "layer", None)
        if layers is None or not hasattr(backbone, "embeddings"):
            raise ValueError(
                f"cannot lock parts of a text tower {type(backbone).__name__}: expected the layers of a BERT "
                "(`embeddings`, `encoder.layer`); use text_groups: all"
            )
        end = [layers[-1], *present([getattr(backbone, "pooler", None)])]
        return [[backbone.embeddings], *([layer] for layer in layers[:-1]), end], text_projection(model)
    blocks: list[list[Part]] = [[block] for block in text.transformer.resblocks]
    embedding: list[Part] = [text.token_embedding, text.positional_embedding]
    return [embedding, *blocks[:-1], [*blocks[-1], text.ln_final]], text_projection(model)


def present(parts: Sequence[Part | None]) -> list[Part]:
    return [part for part in parts if part is not None]


def apply_lock(model: Any, phase: Phase) -> None:
    """Set `requires_grad` throughout a dual encoder.

    logit_scale and the projections always train.

    Args:
        model: open_clip's module.
        phase: How many of each tower's last groups train.

    Raises:
        ValueError: A tower has fewer groups than are to train, or layers that are not known.
    """
    for groups, wanted, tower in (
        (image_groups, phase.image_groups, "image_groups"),
        (text_groups, phase.text_groups, "text_groups"),
    ):
        if isinstance(wanted, str):  # all of the tower
            for part in tower_parts(model, tower):
                require_grad(part, True)
            continue
        layers, projection = groups(model)
        if not 0 <= wanted <= len(layers):
            raise ValueError(f"phases: {tower} {wanted}: expected 0 to {len(layers)} or 'all'")
        for number, group in enumerate(layers):
            for part in group:
                require_grad(part, number >= len(layers) - wanted)
        for part in projection:
            require_grad(part, True)


def learning_rate_scales(model: Any, *, tower_lr: float = 1.0, layer_decay: float = 1.0) -> dict[str, float]:
    """Each parameter's learning rate as a multiple of the recipe's.

    1 for logit_scale and the projections; for the towers `tower_lr`, times `layer_decay` for every step down from the
    projection: the last layer group once, the one before twice, and so on to the stem.

    Args:
        model: open_clip's module.
        tower_lr: Of both towers.
        layer_decay: Below 1, lower layers, which hold what is most general, move less.

    Returns:
        Multiples by the names of the model's parameters.

    Raises:
        ValueError: `layer_decay` is not 1, and a tower's layers are not known.

    Reference:
        Clark et al. 2020, ELECTRA, appendix A; BEiT's fine-tuning uses the same for ViTs.
    """
    scales = {}

    def scale(parts: Sequence[Part], value: float) -> None:
        for part in parts:
            inside = [part] if isinstance(part, nn.Parameter) else part.parameters()
            scales.update((id(parameter), value) for parameter in inside)

    for groups, tower in ((image_groups, "image_groups"), (text_groups, "text_groups")):
        scale(tower_parts(model, tower), tower_lr)
        if layer_decay != 1:
            layers = groups(model)[0]
            for number, group in enumerate(layers):
                scale(group, tower_lr * layer_decay ** (len(layers) - number))
    for projection in (image_projection, text_projection):
        scale(projection(model), 1.0)
    return {name: scales.get(id(value), 1.0) for name, value in model.named_parameters()}


def tower_parts(model: Any, tower: Literal["image_groups", "text_groups"] | str) -> list[Part]:
    """Everything of one tower."""
    if tower == "image_groups":
        return [model.visual]
    if hasattr(model, "text"):
        return [model.text]
    return present(
        [
            model.token_embedding,
            model.positional_embedding,
            model.transformer,
            model.ln_final,
            model.text_projection,
        ]
    )


def require_grad(part: Part, train: bool) -> None:
    for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
        parameter.requires_grad = train


def phases_begun(phases: Sequence[Phase], step: int) -> list[Phase]:
    """The phases that have begun at a step, the one that holds last; a recipe without any trains everything."""
    return [phase for phase in phases if phase.step <= step] or [Phase()]


def set_training_mode(model: Any, phases: Sequence[Phase] = ()) -> None:
    """Training mode, except for what is locked: it runs as in evaluation, without dropout and with its statistics.

    So does every layer without trainable parameters in it, whatever locked it, and a whole tower of no trainable
    groups, whose loose layers (patch dropout, drop path) would else still be random. Projections are in training mode.

    Args:
        model: open_clip's module, with `requires_grad` as `apply_lock` sets it.
        phases: Those that have begun (`phases_begun`). Where the last one keeps statistics, a tower whose groups
            any of them counts is in evaluation mode, those that train as well.
    """
    model.train()
    rest_locked_layers(model)
    for projection, tower in ((image_projection, "image_groups"), (text_projection, "text_groups")):
        counts = [getattr(phase, tower) for phase in phases]
        counted = any(not isinstance(count, str) for count in counts)
        if counted and (counts[-1] == 0 or phases[-1].keep_statistics):
            for part in tower_parts(model, tower):
                set_mode(part, False)
            for part in projection(model):
                set_mode(part, True)


def rest_locked_layers(module: nn.Module) -> bool | None:
    """Put every layer whose parameters are all locked into evaluation mode, with all in it.

    Returns:
        Whether any parameter of the module trains; None when it has no parameters.
    """
    found = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    found += [trains for child in module.children() if (trains := rest_locked_layers(child)) is not None]
    if found and not any(found):
        module.eval()
    return any(found) if found else None


def set_mode(part: Part, training: bool) -> None:
    if isinstance(part, nn.Module):
        part.train(training)
