"""Models between two checkpoints of one architecture: `pairstream pretrain interpolate A B --alpha 0.5 --out DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from pairstream import __version__
from pretrain.encoder import Encoder, checkpoint_folder, load_encoder, without_paths
from pretrain.objectives import PROBES
from pretrain.report import flatten

# Keys of a configuration that say how a model began or trained, and nothing of what it computes.
BEGINNINGS = ("init_logit_scale", "init_logit_bias", "patch_dropout", "timm_model_pretrained")


def interpolate(first: Encoder, second: Encoder, alpha: float) -> Encoder:
    """The model whose weights lie between two others'.

    A fine-tuned model and the one it began from, half way, keep most of what the fine-tuning taught and lose less of
    what was there before, at no cost at inference. Models that were trained apart do not lie in one basin: what is
    between them is useless. Only a measurement tells.

    Batch norms' running statistics are interpolated like weights, which is right to first order between near models;
    integers (`num_batches_tracked`) are those of the nearer one.

    Args:
        first: The model at alpha 0; its tokenizer and names are kept.
        second: The model at alpha 1.
        alpha: Share of the second, 0 to 1. The ends are the models themselves, bit for bit.

    Returns:
        `first`, whose weights have been changed.

    Raises:
        ValueError: `alpha` outside 0 to 1, or models of different architectures, input or tokenizers.

    Reference:
        Wortsman et al. 2022, Robust fine-tuning of zero-shot models (WiSE-FT), equation 1.

    Example:
        >>> between = interpolate(load_encoder("runs/a"), load_encoder("runs/b"), 0.5)     # doctest: +SKIP
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the share of the second model, 0 to 1, got {alpha}")
    require_same_architecture(first, second)
    other = second.model.state_dict()
    with torch.no_grad():
        for name, value in first.model.state_dict().items():
            end = other[name].to(value.device)
            if value.is_floating_point():
                value.copy_(torch.lerp(value, end.to(value.dtype), alpha))
            elif alpha > 0.5:
                value.copy_(end)
    first.name = f"{1 - alpha:g} {first.name} + {alpha:g} {second.name}"
    return first


def require_same_architecture(first: Encoder, second: Encoder) -> None:
    """Refuse two models between whose weights there is no model.

    Raises:
        ValueError: Another configuration, other tensors, another input or tokenizer; the message has the first
            differences.
    """
    configs = [comparable(encoder) for encoder in (first, second)]
    differences = [
        f"{key}: {configs[0].get(key, 'nothing')} and {configs[1].get(key, 'nothing')}"
        for key in sorted(configs[0].keys() | configs[1].keys())
        if configs[0].get(key) != configs[1].get(key)
    ]
    if not differences:
        shapes = [
            {name: tuple(value.shape) for name, value in encoder.model.state_dict().items()}
            for encoder in (first, second)
        ]
        differences = [
            f"{name}: {shapes[0].get(name, 'no such tensor')} and {shapes[1].get(name, 'no such tensor')}"
            for name in sorted(shapes[0].keys() | shapes[1].keys())
            if shapes[0].get(name) != shapes[1].get(name)
        ]
    if not differences and not torch.equal(first.tokenize(PROBES), second.tokenize(PROBES)):
        differences = ["their tokenizers give different tokens for the same texts"]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"cannot interpolate between {first.name} and {second.name}, which are of different architectures: "
            f"{'; '.join(differences[:3])}{more}. Take two checkpoints of one model, such as a fine-tuned one and the "
            "one it began from."
        )


def comparable(encoder: Encoder) -> dict[str, Any]:
    """What must agree of a model's configuration, flat; sizes as pairs, whichever way they are written."""
    content = {"model_cfg": without_paths(encoder.model_cfg), "preprocess_cfg": encoder.preprocess_cfg}
    found = dict(flatten(json.loads(json.dumps(content, default=list))))
    for key in ("model_cfg.vision_cfg.image_size", "preprocess_cfg.size"):
        if isinstance(found.get(key), int):
            found[key] = [found[key], found[key]]
    return {key: value for key, value in found.items() if key.rsplit(".", 1)[-1] not in BEGINNINGS}


def write_between(
    first: Annotated[str, tyro.conf.Positional],
    second: Annotated[str, tyro.conf.Positional],
    *,
    out: Path,
    alpha: float = 0.5,
    pretrained: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model between two checkpoints of one architecture (WiSE-FT).

    Args:
        first: A checkpoint or run folder, a name of open_clip's, or hf-hub:ORG/REPO; alpha 0 is this one.
        second: The same; alpha 1 is this one, such as the fine-tuned model.
        out: The new checkpoint's folder.
        alpha: Share of the second model.
        pretrained: open_clip's tag of weights, for a name of its among the two.
        overwrite: Replace what is in the folder.
    """
    if not 0 <= alpha <= 1:  # before anything large is read
        raise ValueError(f"--alpha is the share of the second model, 0 to 1, got {alpha}")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty: give another --out, or --overwrite to replace it")
    encoders = [
        load_encoder(name, pretrained=tag_for(name, pretrained), device="cpu") for name in (first, second)
    ]
    between = interpolate(encoders[0], encoders[1], alpha)
    between.save(
        out,
        card=f"# {out.name}\n\n{1 - alpha:g} x `{first}` + {alpha:g} x `{second}`, weights interpolated by "
        f"PairStream {__version__}.\n",
    )
    print(f"{between.name}: {out}", file=sys.stderr)


def tag_for(name: str, pretrained: str | None) -> str | None:
    """The tag of weights for a name of open_clip's; a checkpoint has its own.

    Raises:
        ValueError: A name without a tag, which means random weights.
    """
    if name.startswith("hf-hub:") or checkpoint_folder(name) is not None:
        return None
    if pretrained is None:
        raise ValueError(
            f"{name} is a name of open_clip's: give --pretrained TAG, since without it its weights are random"
        )
    return pretrained


def main(argv: list[str]) -> int:
    """The command."""
    tyro.cli(write_between, args=argv, prog="pairstream pretrain interpolate")
    return 0
