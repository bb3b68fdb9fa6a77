"""Language models: a small one with random weights, or any causal one of transformers', whole or in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.utils import logging

from finetune.recipe_model import SmallLanguageModel
from finetune.text import require_end_and_pad
from pairstream.errors import require


def small_language_model(config: SmallLanguageModel, tokenizer: Any) -> GPT2LMHeadModel:
    """A GPT-2-shaped language model with random weights."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            # GPT-2's own 0.02 suits its width of 768; narrow models then learn to see only after many hundred steps.
            initializer_range=config.width**-0.5,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own function in one kernel instead of eight
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrained_language_model(
    name: str, *, bits: int = 32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, by hub name or folder.

    Args:
        name: The hub name or folder.
        bits: Of its matrices: 32; or 8 or 4 (NF4 in blocks, computed in bf16), which cannot train and are what adapters
            stand on (QLoRA).
        device: Where it will be.

    Raises:
        ValueError: No such model, a tokenizer that cannot end a text, or 8 or 4 bits without a GPU.
        ImportError: 8 or 4 bits without bitsandbytes.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if bits < 32:
        require_gpu(bits, torch.device(device))
        options |= {"quantization_config": few_bits(bits), "device_map": {"": device}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"language_model.name {name!r}: expected a folder or hub name of a causal language model with its "
            f"tokenizer: {error}"
        ) from error
    return model, require_end_and_pad(tokenizer, name)


def require_gpu(bits: int, device: torch.device) -> None:
    """Refuse 8 and 4 bits where their kernels are not.

    Raises:
        ValueError: The model would be on another device than a GPU.
    """
    if device.type != "cuda":
        raise ValueError(
            f"language_model.bits {bits} needs a CUDA GPU (bitsandbytes' kernels), this run is on {device.type}: "
            "take a machine with one, or bits 32"
        )


def few_bits(bits: int) -> BitsAndBytesConfig:
    """transformers' words for matrices of 8 or 4 bits.

    Raises:
        ImportError: bitsandbytes is not installed.

    Reference:
        Dettmers et al. 2023, QLoRA (arXiv 2305.14314): NF4 with quantised scales.
    """
    require("bitsandbytes", "quantised", "a language model of 8 or 4 bits")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def recompute_activations(language_model: Any) -> None:
    """Keep no activations of a language model's layers for the backward pass: they are computed again there."""
    # Later versions of transformers gave the method another name.
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextmanager
def no_bars() -> Iterator[None]:
    """Hold back transformers' own progress bars: ours show the work, and stay quiet outside a terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
