"""To transformers' CLIPModel and back, for the architectures that it can express."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from pairstream.atomic import new_folder, write_text
from pairstream.errors import require
from pretrain.encoder import Encoder, load_encoder
from pretrain.towers import CONFIG, instantiate

# What open_clip's configuration may say beside the sizes, and still be the architecture of CLIPModel.
VISION = {
    **{"pool_type": ("tok",), "patch_dropout": None, "output_tokens": (False,), "attentional_pool": (False,)},
    **{"no_ln_pre": (False,), "pos_embed_type": ("learnable",), "final_ln_after_pool": (False,)},
    **dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size")),
}
TEXT = {
    **{"pool_type": ("argmax",), "proj_bias": (False,), "proj_type": ("linear",), "embed_cls": (False,)},
    **{"no_causal_mask": (False,), "final_ln_after_pool": (False,), "output_tokens": (False,)},
    **dict.fromkeys(
        ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id")
    ),
}
# The names of one block's tensors, ours and theirs.
BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def require_expressible(encoder: Encoder) -> None:
    """Refuse what CLIPModel cannot be.

    Raises:
        ValueError: The architecture has something that CLIPModel has not; the message says what.
    """
    cfg = encoder.model_cfg
    strange = [
        f"{tower}.{key} {value!r}"
        for tower, known in (("vision_cfg", VISION), ("text_cfg", TEXT))
        for key, value in cfg[tower].items()
        if value is not None and (key not in known or (known[key] is not None and value not in known[key]))
    ]
    vision = cfg["vision_cfg"]
    strange += [
        f"vision_cfg.{key} {vision[key]!r}"
        for key in ("image_size", "patch_size")
        if not isinstance(vision.get(key, 224), int)
    ]
    if not isinstance(vision.get("layers", 12), int):
        strange.append("a ResNet image tower")
    if getattr(encoder.model, "logit_bias", None) is not None:
        strange.append("a logit_bias")
    if not isinstance(encoder.tokenizer, SimpleTokenizer):
        strange.append(f"the tokenizer {type(encoder.tokenizer).__name__}")
    if strange:
        raise ValueError(
            f"{encoder.name}: transformers' CLIPModel has no such architecture: {', '.join(strange)}. It is a ViT with "
            "a class token and CLIP's causal text transformer; for others keep open_clip's format."
        )


def pairs_of_names(vision_layers: int, text_layers: int) -> Iterator[tuple[str, str, bool]]:
    """Our name, theirs, and whether the tensor is transposed between; attention's input comes apart elsewhere."""
    yield "logit_scale", "logit_scale", False
    yield "visual.proj", "visual_projection.weight", True
    yield "text_projection", "text_projection.weight", True
    yield "visual.class_embedding", "vision_model.embeddings.class_embedding", False
    yield "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight", False
    yield "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", False
    yield "token_embedding.weight", "text_model.embeddings.token_embedding.weight", False
    yield "positional_embedding", "text_model.embeddings.position_embedding.weight", False
    for part in ("weight", "bias"):
        yield f"visual.ln_pre.{part}", f"vision_model.pre_layrnorm.{part}", False
        yield f"visual.ln_post.{part}", f"vision_model.post_layernorm.{part}", False
        yield f"ln_final.{part}", f"text_model.final_layer_norm.{part}", False
        for ours, theirs in blocks(vision_layers, text_layers):
            for name, other in BLOCK.items():
                yield f"{ours}.{name}.{part}", f"{theirs}.{other}.{part}", False


def blocks(vision_layers: int, text_layers: int) -> Iterator[tuple[str, str]]:
    """The prefix of each block, ours and theirs."""
    for number in range(vision_layers):
        yield f"visual.transformer.resblocks.{number}", f"vision_model.encoder.layers.{number}"
    for number in range(text_layers):
        yield f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"


def to_transformers(encoder: Encoder) -> Any:
    """The same model as transformers' CLIPModel, with equal logits.

    Args:
        encoder: A ViT with a class token and CLIP's causal text transformer.

    Returns:
        A `transformers.CLIPModel` in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: CLIPModel has no such architecture.
        ImportError: transformers is not installed.
    """
    transformers = require("transformers", "towers", "transformers' CLIPModel")
    require_expressible(encoder)
    cfg, vision, text = encoder.model_cfg, encoder.model.visual, encoder.model
    widths = vision.conv1.out_channels, text.token_embedding.embedding_dim
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    config = transformers.CLIPConfig(
        projection_dim=encoder.embed_dim,
        vision_config={
            "hidden_size": widths[0],
            "intermediate_size": vision.transformer.resblocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(vision.transformer.resblocks),
            "num_attention_heads": vision.transformer.resblocks[0].attn.num_heads,
            "image_size": encoder.image_size[0],
            "patch_size": vision.conv1.kernel_size[0],
            "hidden_act": act,
            "projection_dim": encoder.embed_dim,
        },
        text_config={
            "vocab_size": text.token_embedding.num_embeddings,
            "hidden_size": widths[1],
            "intermediate_size": text.transformer.resblocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(text.transformer.resblocks),
            "num_attention_heads": text.transformer.resblocks[0].attn.num_heads,
            "max_position_embeddings": text.positional_embedding.shape[0],
            "hidden_act": act,
            "projection_dim": encoder.embed_dim,
            "bos_token_id": encoder.tokenizer.sot_token_id,  # pyright: ignore
            "eos_token_id": encoder.tokenizer.eot_token_id,  # pyright: ignore
            "pad_token_id": encoder.tokenizer.eot_token_id,  # pyright: ignore
        },
    )
    model = transformers.CLIPModel(config).eval()
    own = {name: value.detach().cpu().float() for name, value in encoder.model.state_dict().items()}
    layers = len(vision.transformer.resblocks), len(text.transformer.resblocks)
    state = {theirs: own[ours].T if turned else own[ours] for ours, theirs, turned in pairs_of_names(*layers)}
    for ours, theirs in blocks(*layers):
        for part in ("weight", "bias"):
            query, key, value = own[f"{ours}.attn.in_proj_{part}"].chunk(3)
            for letter, tensor in (("q", query), ("k", key), ("v", value)):
                state[f"{theirs}.self_attn.{letter}_proj.{part}"] = tensor
    model.load_state_dict({name: value.contiguous() for name, value in state.items()})
    return model


def from_transformers(source: Any, preprocess: dict[str, Any] | None = None) -> Encoder:
    """The same model as one of open_clip's, from a transformers CLIPModel.

    Args:
        source: A `transformers.CLIPModel` over CLIP's own vocabulary.
        preprocess: open_clip's preprocessing configuration, where it is not CLIP's own.

    Returns:
        The Encoder, on the CPU.

    Raises:
        ValueError: An activation or a vocabulary that open_clip's towers do not have.
    """
    vision, text = source.config.vision_config, source.config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        raise ValueError(
            f"open_clip's towers share one of gelu and quick_gelu, this CLIPModel has {sorted(acts)}"
        )
    if text.vocab_size != 49408:
        raise ValueError(f"expected CLIP's vocabulary of 49408 pieces, this CLIPModel has {text.vocab_size}")
    if {vision.layer_norm_eps, text.layer_norm_eps} != {1e-5}:
        raise ValueError("open_clip's layer norms have an eps of 1e-5, those of this CLIPModel have not")
    model_cfg = {
        "embed_dim": source.config.projection_dim,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }
    built = instantiate(model_cfg, preprocess or {})
    theirs_by_name: dict[str, Tensor] = source.state_dict()
    layers = vision.num_hidden_layers, text.num_hidden_layers
    state = {
        ours: theirs_by_name[theirs].T if turned else theirs_by_name[theirs]
        for ours, theirs, turned in pairs_of_names(*layers)
    }
    for ours, theirs in blocks(*layers):
        for part in ("weight", "bias"):
            parts = [theirs_by_name[f"{theirs}.self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            state[f"{ours}.attn.in_proj_{part}"] = torch.cat(parts)
    built.model.load_state_dict({name: value.detach().float().contiguous() for name, value in state.items()})
    return Encoder(built, "transformers' CLIPModel", "cpu")


def save_transformers(encoder: Encoder, folder: Path) -> Path:
    """Write a folder that `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` open.

    The tokenizer is CLIP's with its own padding; `truncation=True` cuts long texts as open_clip does, but other than
    open_clip it does not mend broken HTML and Unicode first.

    Raises:
        ValueError: CLIPModel has no such architecture.
    """
    model = to_transformers(encoder)
    tokenizer: Any = encoder.tokenizer
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        names = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
        vocabulary = {names.get(number, word): number for word, number in tokenizer.encoder.items()}
        write_text(temporary / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
        write_text(temporary / "merges.txt", f"#version: 0.2\n{merges}\n")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
        special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        length = encoder.model.positional_embedding.shape[0]
        write_json(
            temporary / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special},
        )
        pre, (height, width) = encoder.preprocess_cfg, encoder.image_size
        write_json(
            temporary / "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": min(height, width)},
                "resample": 3 if pre["interpolation"] == "bicubic" else 2,
                "do_center_crop": True,
                "crop_size": {"height": height, "width": width},
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": list(pre["mean"]),
                "image_std": list(pre["std"]),
                "do_convert_rgb": True,
            },
        )
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def convert(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    to: Literal["transformers", "open_clip"] = "transformers",
) -> Path:
    """Write a model in another library's format, with equal logits.

    Args:
        model: A checkpoint, run folder or name; for `--to open_clip` a folder or name of a transformers CLIPModel.
        out: The folder to write; replaced when it exists.
        to: `transformers` for CLIPModel, `open_clip` for the format of our checkpoints.
    """
    if to == "transformers":
        save_transformers(load_encoder(model, device="cpu"), out)
    else:
        transformers = require("transformers", "towers", "transformers' CLIPModel")
        if (Path(model) / CONFIG).is_file():
            raise ValueError(f"{model}: this is a checkpoint in open_clip's format already")
        source = transformers.CLIPModel.from_pretrained(model)
        from_transformers(source, read_preprocess(Path(model))).save(out)
    print(f"wrote {out}")
    return out


def read_preprocess(folder: Path) -> dict[str, Any]:
    """open_clip's preprocessing as a CLIP image processor's file has it; empty, which means CLIP's own, without one."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {"mean": content.get("image_mean"), "std": content.get("image_std")}
    return {key: value for key, value in found.items() if value}


def main(argv: list[str]) -> int:
    """The command `pairstream pretrain convert`."""
    tyro.cli(convert, args=argv, prog="pairstream pretrain convert")
    return 0
