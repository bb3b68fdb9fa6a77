"""How the model that trains lies on the ranks: whole on each (DistributedDataParallel), or a share on each (FSDP2).

DeepSpeed's way is in `pretrain.zero`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.utils import get_total_norm

from pretrain.checkpoint import load_optimizer_state, optimizer_state
from pretrain.compiled import compile_network
from pretrain.encoder import Encoder
from pretrain.loop import asked_for, wants_shards
from pretrain.network import DualEncoder
from pretrain.optim import build_optimizer, parameters_without_state
from pretrain.precision import clip_gradients
from pretrain.recipe import PretrainRecipe
from pretrain.short_texts import cut_length, text_tower
from pretrain.terms import Terms

SCALARS = ("logit_scale", "logit_bias")
BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block", "BertLayer", "RobertaLayer")
"""Classes of a tower's blocks that `TRANSFORMER_BASED_WRAP` gathers one at a time, unless it is told others."""


class Replicas:
    """A whole model on each rank, in one process or under DistributedDataParallel.

    Args:
        encoder: What is evaluated and saved; its weights are those that train.
        terms: Those of the recipe, whose parameters train as well.
        recipe: The run.
        accelerator: Of the run.

    Attributes:
        network: What trains, by its plain names; `wrapped` is what training calls.
        optimizer: Over the network's parameters; `stepper` is it as Accelerate steps it.
        gathers: Whether each call of the network waits for the other ranks', which must then make as many.
        engine: What shares the training state among the ranks, all of which must then call `state`; empty for none.
    """

    gathers = False
    engine = ""

    def __init__(self, encoder: Encoder, terms: Terms, recipe: PretrainRecipe, accelerator: Accelerator):
        self.encoder, self.terms, self.recipe, self.accelerator = encoder, terms, recipe, accelerator
        self.network: nn.Module = DualEncoder(encoder, terms)

    @property
    def model(self) -> Any:
        """The dual encoder that trains."""
        return self.network.model

    def begin(self, lr_scale: dict[str, float], saved: dict[str, Tensor]) -> None:
        """Wrap the encoder as it is now, with the optimizer's state by `NAME|KEY`."""
        self.network = DualEncoder(self.encoder, self.terms)
        self.optimizer = build_optimizer(
            self.network.named_parameters(), self.recipe.optim, lr_scale=lr_scale
        )
        load_optimizer_state(self.optimizer, saved)
        if self.recipe.compile:
            compile_network(self.network, self.accelerator.device)
        prepared: Any = self.accelerator.prepare(self.network, self.optimizer)
        self.wrapped, self.stepper = prepared

    def text_length(self, tokens: Tensor) -> int:
        """How much of a batch's texts the network must be given; tokens int64 `(..., context)` on the CPU."""
        return tokens.shape[-1] if "captioning" in self.terms else cut_length(self.encoder.model, tokens)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Leave gradients of this rank to be added to."""
        return self.accelerator.no_sync(self.wrapped)

    def one_step(self) -> AbstractContextManager[Any]:
        """Around all backward passes of a step that has several."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Leave this rank's gradients, summed over ranks unless `no_sync` or `one_step` holds that back."""
        self.accelerator.backward(loss)

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor | None:
        """The norm of the gradients of some parameters, of all ranks; None where none of them has one."""
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return whole(get_total_norm(found)) if found else None

    def clip(self, parameters: list[nn.Parameter], largest: float | None) -> Tensor:
        """Scale gradients down to a global norm of at most `largest`; returns the norm before."""
        return clip_gradients(parameters, largest or math.inf)

    def without_gradient(self) -> list[str]:
        """Names of parameters that are to train and had no gradient in the first step, which was taken."""
        return parameters_without_state(self.optimizer)

    @torch.no_grad()
    def limit_scale(self, largest: float) -> None:
        """Hold the temperature's logarithm between 0 and `largest`."""
        scale = self.model.logit_scale
        for value in (scale, self.optimizer.state.get(scale, {}).get("z")):
            if value is not None:
                share(value).clamp_(0, largest)

    def refresh(self) -> None:
        """Let encoder and terms have the weights that train; every rank must call it."""

    def state(self, *, copy: bool = False) -> dict[str, Tensor]:
        """The optimizer's state by `NAME|KEY`, whole and in main memory; every rank must call it."""
        return optimizer_state(self.optimizer, copy=copy)


class Shards(Replicas):
    """A share of the weights that train, of their gradients and of the optimizer's moments on each rank: FSDP2.

    Takes 16 bytes a parameter / W with AdamW in place of 16; the encoder itself stays whole on each rank for
    evaluations and checkpoints, at 4 bytes a parameter, and is brought up to date before them. Checkpoints are
    therefore the same as without, and any number of processes resumes them, sharded or not.

    The launcher configures it through Accelerate: what is gathered at a time (`FSDP_AUTO_WRAP_POLICY`) and whether it
    is given up after the forward pass (`FSDP_RESHARD_AFTER_FORWARD`). Accelerate's own call of `fully_shard` is for
    GPUs only (on CPUs it silently trains replicas), and in bf16 it would round logit_scale and the gradients' sums;
    here gathers and sums are float32, and autocast rounds what it does without FSDP.
    """

    gathers = True
    engine = "FSDP2"

    def begin(self, lr_scale: dict[str, float], saved: dict[str, Tensor]) -> None:
        self.network = DualEncoder(self.encoder)
        # An own copy: FSDP2 replaces parameters in place. One call for both, since a term may use the model's decoder.
        self.network.model, self.network.terms = copy.deepcopy((self.encoder.model, self.terms))
        for name in SCALARS:
            value = getattr(self.model, name, None)
            if value is not None:  # FSDP2 takes no scalars
                setattr(
                    self.model,
                    name,
                    nn.Parameter(value.detach().reshape(1), requires_grad=value.requires_grad),
                )
        for value in self.network.parameters():
            value.data = value.data.contiguous()  # FSDP2 does not take convolutions with channels last
        self.wrapped = self.shard(self.network)
        self.optimizer = self.stepper = build_optimizer(
            self.network.named_parameters(), self.recipe.optim, lr_scale=lr_scale
        )
        self.load(saved)

    def shard(self, network: Any) -> Any:
        """Leave each rank its share of the parameters, block by block as the launcher says."""
        from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        plugin: Any = self.accelerator.state.fsdp_plugin
        found = {type(layer).__name__ for layer in network.modules()}
        network._no_split_modules = [name for name in BLOCKS if name in found]
        chosen = fsdp2_prepare_auto_wrap_policy(plugin, network)
        device = self.accelerator.device.type
        mesh = init_device_mesh(device, (self.accelerator.num_processes,))
        # A text tower's own parameters are read from outside of it (`cut_features`): they go with the network's.
        left = network, text_tower(network.model)
        blocks = [layer for layer in network.modules() if chosen and layer not in left and chosen(layer)]
        for layer in reversed(blocks):  # inner ones first
            fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
        fully_shard(network, mesh=mesh)
        if device == "cpu":
            for layer in (*blocks, network):
                layer.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
        return network

    def load(self, saved: dict[str, Tensor]) -> None:
        """Give each parameter its share of the state that was saved under its name."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                assert isinstance(parameter, DTensor)
                state = {}
                for key, value in saved.items():
                    of, _, kind = key.rpartition("|")
                    if of == name and kind == "step":
                        state[kind] = value.to(parameter.device)
                    elif of == name:
                        state[kind] = distribute_tensor(
                            value.to(parameter.device).reshape(parameter.shape),
                            parameter.device_mesh,
                            parameter.placements,
                        )
                if state:
                    self.optimizer.state[parameter] = state

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.wrapped.set_requires_gradient_sync(True)

    @torch.no_grad()
    def refresh(self) -> None:
        terms: Any = self.network.terms
        for kept, trained in ((self.encoder.model, self.model), (self.terms, terms)):
            own = kept.state_dict()
            for name, value in trained.state_dict().items():
                own[name].copy_(whole(value).reshape(own[name].shape))

    def state(self, *, copy: bool = False) -> dict[str, Tensor]:
        found = {}
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    value = whole(value)
                    if name.rpartition(".")[2] in SCALARS:
                        value = value.reshape(())
                    found[f"{name}|{key}"] = value.detach().to("cpu", copy=copy).contiguous()
        return found


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded over the ranks, each of which must call it."""
    gather = getattr(value, "full_tensor", None)
    return gather() if gather else value


def share(value: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    local = getattr(value, "to_local", None)
    return local() if local else value


def make_wrapping(
    encoder: Encoder, terms: Terms, recipe: PretrainRecipe, accelerator: Accelerator
) -> Replicas:
    """The wrapping that the launcher asks for.

    Raises:
        ValueError: As `pretrain.zero.make_zero`; or the recipe has what FSDP2 does not do here, or the launcher asks
            for FSDP's first version, CPU offload, activation checkpointing or loading on one rank.
    """
    if asked_for("DEEPSPEED") and accelerator.num_processes > 1:
        from pretrain.zero import make_zero  # it builds upon this module

        return make_zero(encoder, terms, recipe, accelerator)
    if not wants_shards() or (
        accelerator.num_processes == 1 and accelerator.distributed_type.value != "FSDP"
    ):
        return Replicas(encoder, terms, recipe, accelerator)
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type.value == "FSDP" else None
    plugin = plugin or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP's first version flattens parameters, whose names and shapes optimizers and checkpoints here need: "
            "launch with --fsdp_version 2 (FSDP_VERSION=2)"
        )
    refused = {
        f"precision: {accelerator.mixed_precision}": accelerator.mixed_precision in ("fp16", "fp8"),
        f"optim.kind: {recipe.optim.kind}": recipe.optim.kind != "adamw",
        "ema": recipe.ema is not None,
        "lora": recipe.lora is not None,
        "compile": recipe.compile,
    }
    told = [name for name, found in refused.items() if found]
    if told:
        raise ValueError(
            f"FSDP2 here does not go with {', '.join(told)}: they need whole weights at each step. Leave it out, or "
            "train replicas (launch without --use_fsdp)."
        )
    asked = [
        f"{flag} ({instead})"
        for flag, found, instead in (
            (
                "--fsdp_offload_params",
                isinstance(plugin.cpu_offload, CPUOffloadPolicy),
                "shards stay on their devices",
            ),
            (
                "--fsdp_activation_checkpointing",
                plugin.activation_checkpointing,
                "the recipe has it: checkpoint_activations: true",
            ),
            (
                "--fsdp_cpu_ram_efficient_loading",
                plugin.cpu_ram_efficient_loading,
                "every rank makes or reads the first weights",
            ),
        )
        if found
    ]
    if asked:
        raise ValueError(f"FSDP2 here does not take {', '.join(asked)}: leave it out")
    accelerator.state.fsdp_plugin = plugin
    return Shards(encoder, terms, recipe, accelerator)
