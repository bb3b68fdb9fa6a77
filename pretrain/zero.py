"""DeepSpeed's ZeRO stages 1 and 2: each rank has the whole weights, and a share of what the optimizer needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import compare_versions
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pretrain.encoder import Encoder
from pretrain.network import DualEncoder
from pretrain.optim import build_optimizer
from pretrain.recipe import PretrainRecipe
from pretrain.terms import Terms
from pretrain.wrapping import Replicas

OLDEST = "0.19.8"
"""The version that this was run with; earlier ones lack `coalesce_grad_reduction` or `compute_grad_norm`."""
BUCKET = 50_000_000
"""Gradients that are reduced at a time (200 MB) unless the launcher says otherwise; DeepSpeed itself takes 2 GB."""
BUCKETS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_scatter",
)
"""Keys of `zero_optimization` that say how gradients travel, and nothing of what comes of it."""
NO_MATTER = (
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


class Zero(Replicas):
    """Whole weights on each rank, and a share of the optimizer's moments (stage 1) and of the gradients (stage 2).

    DeepSpeed sums the gradients and takes the step. All else is as without it: clipping, steps that are left out, the
    learning rate, and checkpoints, which any number of processes resumes with or without DeepSpeed.

    Of its engine only `backward`, `coalesce_grad_reduction` and its optimizer are used. Its `forward` would turn off
    the autocast around it (on GPUs), and its `step` clip, count and skip by its own rules.

    Args:
        config: The engine's, of `engine_config`.
    """

    engine = "DeepSpeed"

    def __init__(
        self,
        encoder: Encoder,
        terms: Terms,
        recipe: PretrainRecipe,
        accelerator: Accelerator,
        config: dict[str, Any],
    ):
        super().__init__(encoder, terms, recipe, accelerator)
        self.config = config
        self.zero: Any = None

    def begin(self, lr_scale: dict[str, float], saved: dict[str, Tensor]) -> None:
        import deepspeed  # seconds

        if self.zero is not None:
            self.zero.destroy()
        self.network = DualEncoder(self.encoder, self.terms)
        optimizer = build_optimizer(self.network.named_parameters(), self.recipe.optim, lr_scale=lr_scale)
        optimizer.param_groups[:] = split_by_step(optimizer.param_groups, saved)
        self.groups = [(group["names"], group["params"]) for group in optimizer.param_groups]
        self.watch_gradients()
        # With this mark DeepSpeed does not broadcast: it fails at scalars and channels last, and the ranks are alike.
        values: list[Any] = list(self.network.parameters())
        for value in values:
            value.ds_optim_param = True
        self.zero, *_ = deepspeed.initialize(model=self.network, optimizer=optimizer, config=self.config)
        for value in values:
            del value.ds_optim_param
        self.wrapped, self.optimizer, self.stepper = self.network, optimizer, self.zero.optimizer
        self.load(saved)

    def watch_gradients(self) -> None:
        """Take note of parameters that get a gradient; DeepSpeed takes zeros for the others without a word."""
        self.silent = {
            name: value for names, values in self.groups for name, value in zip(names, values, strict=True)
        }
        self.hooks = [
            value.register_post_accumulate_grad_hook(lambda _, name=name: self.silent.pop(name, None))
            for name, value in self.silent.items()
        ]

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Give this rank its share of the state that was saved; it lies in one flat tensor a group."""
        for (names, parameters), group in zip(self.groups, self.optimizer.param_groups, strict=True):
            (flat,) = group["params"]
            for name, parameter in zip(names, parameters, strict=True):
                own = place(parameter)
                for key, value in saved.items():
                    of, _, kind = key.rpartition("|")
                    if of != name:
                        continue
                    state = self.optimizer.state[flat]
                    if kind == "step":
                        state[kind] = value.to(flat.device, copy=True)
                        continue
                    state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
                    if own:
                        state[kind][own[1]] = value.flatten()[own[0]].to(flat.device)

    def one_step(self) -> AbstractContextManager[Any]:
        # One reduction at the end; stage 2 would make one for each part, and wait for as many of the other ranks.
        return self.zero.coalesce_grad_reduction()

    def backward(self, loss: Tensor) -> None:
        self.zero.backward(loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()  # `one_step` does it

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """This rank's share of the gradients of some parameters."""
        found = [(value, getattr(value, "_hp_mapping", None)) for value in parameters]
        return [
            lies.get_lp_grad_fragment(value._index_in_param_group)  # pyright: ignore[reportAttributeAccessIssue]
            for value, lies in found
            if lies is not None
        ]

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        square = get_total_norm(self.gradients(parameters)).square().to(self.accelerator.device)
        dist.all_reduce(square)
        return square.sqrt()

    def clip(self, parameters: list[nn.Parameter], largest: float | None) -> Tensor:
        norm = self.norm(parameters)
        if largest:
            share = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch does
            for gradient in self.gradients(parameters):
                gradient.mul_(share)
        return norm

    def without_gradient(self) -> list[str]:
        for hook in self.hooks:
            hook.remove()
        return list(self.silent)

    @torch.no_grad()
    def limit_scale(self, largest: float) -> None:
        scale: Any = self.model.logit_scale
        scale.clamp_(0, largest)
        lies = getattr(scale, "_hp_mapping", None)
        if lies is not None:  # the step takes its weights from another copy
            lies.hp_fragment.clamp_(0, largest)

    def state(self, *, copy: bool = False) -> dict[str, Tensor]:
        found = {}
        for (names, parameters), group in zip(self.groups, self.optimizer.param_groups, strict=True):
            for key, value in self.optimizer.state.get(group["params"][0], {}).items():
                for name, parameter in zip(names, parameters, strict=True):
                    if key == "step":
                        found[f"{name}|{key}"] = value.detach().to("cpu", copy=True)
                        continue
                    all_of_it, own = (
                        torch.zeros_like(parameter, requires_grad=False).flatten(),
                        place(parameter),
                    )
                    if own:
                        all_of_it[own[0]] = value[own[1]]
                    dist.all_reduce(all_of_it)
                    found[f"{name}|{key}"] = all_of_it.reshape(parameter.shape).cpu()
        return found


def place(parameter: Any) -> tuple[slice, slice] | None:
    """Which of a parameter's values this rank steps, and where they lie in its flat share of the group."""
    lies = parameter._hp_mapping  # where `deepspeed.utils.safe_get_full_optimizer_state` looks
    if lies is None:
        return None
    of, at = lies.lp_fragment_address, lies.hp_fragment_address
    return slice(of.start, of.start + of.numel), slice(at.start, at.start + at.numel)


def split_by_step(groups: list[dict[str, Any]], saved: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Groups whose parameters have taken as many steps: ZeRO counts those of a group once.

    A phase may have begun to train some of them later.
    """
    found: dict[tuple[int, float | None], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            step = saved.get(f"{name}|step")
            key = number, None if step is None else float(step)
            part = found.setdefault(key, {**group, "names": [], "params": []})
            part["names"].append(name)
            part["params"].append(parameter)
    return list(found.values())


def make_zero(encoder: Encoder, terms: Terms, recipe: PretrainRecipe, accelerator: Accelerator) -> Zero:
    """ZeRO as the launcher's variables or DeepSpeed configuration say.

    Raises:
        ValueError: They, or the recipe, have what is not done here.
        ImportError: DeepSpeed is not installed, or too old.
    """
    refused = {
        f"precision: {accelerator.mixed_precision}": accelerator.mixed_precision in ("fp16", "fp8"),
        f"optim.kind: {recipe.optim.kind}": recipe.optim.kind != "adamw",
        "compile": recipe.compile,
    }
    told = [name for name, found in refused.items() if found]
    if told:
        raise ValueError(
            f"DeepSpeed here does not go with {', '.join(told)}. Leave it out, or train replicas (launch without "
            "--use_deepspeed)."
        )
    config = engine_config(DeepSpeedPlugin().deepspeed_config, recipe, accelerator.num_processes)
    if find_spec("deepspeed") is None or compare_versions("deepspeed", "<", OLDEST):
        raise ImportError(
            f"the launcher asks for DeepSpeed, {OLDEST} or later. Install it with: pip install 'pairstream[deepspeed]'"
        )
    return Zero(encoder, terms, recipe, accelerator, config)


def engine_config(given: Mapping[str, Any], recipe: PretrainRecipe, world: int) -> dict[str, Any]:
    """What DeepSpeed is told: the stage and the buckets are the launcher's, all else is the trainer's own.

    Args:
        given: DeepSpeed's configuration as Accelerate has it, from its variables or `--deepspeed_config_file`.
        recipe: The run.
        world: Processes.

    Raises:
        ValueError: It has something that the recipe says otherwise, or that is not done here; the message names all.
    """
    zero, wrong = given.get("zero_optimization", {}), []
    if zero.get("stage") not in (1, 2):
        instead = {
            0: "that is replicas: launch without --use_deepspeed",
            3: "FSDP2 shards the same tensors: --use_fsdp --fsdp_version 2",
        }
        wrong.append(
            f"zero_optimization.stage: {zero.get('stage')} (1 or 2; {instead.get(zero.get('stage'), 'no other')})"
        )
    for key, value in zero.items():
        device = value.get("device") if isinstance(value, dict) else value
        idle = not device or device in ("auto", "none") or key.startswith("stage3_")
        if key not in ("stage", *BUCKETS) and not idle:
            wrong.append(f"zero_optimization.{key} (shares stay on their devices, in float32)")
    ours = {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.clip_norm or 0.0,
    }
    for key, value in given.items():
        if key in ours:
            if value not in ("auto", None, ours[key]):
                wrong.append(f"{key}: {value} (the recipe makes it {ours[key]})")
        elif key in ("fp16", "bf16", "amp"):
            if str(value.get("enabled")).lower() == "true":
                wrong.append(f"{key} (the recipe has it: precision)")
        elif key not in ("zero_optimization", *NO_MATTER):
            wrong.append(f"{key} (the recipe says what trains and how)")
    if wrong:
        raise ValueError(f"DeepSpeed here does not take {', '.join(wrong)}: leave it out")
    buckets = {key: zero[key] for key in BUCKETS if zero.get(key, "auto") != "auto"}
    return {
        "train_micro_batch_size_per_gpu": ours["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # clipping is ours; left out, it would be 1
        "zero_optimization": {
            "stage": zero["stage"],
            "reduce_bucket_size": BUCKET,
            **buckets,
            "compute_grad_norm": False,  # ours, too; and DeepSpeed's skips steps by itself
        },
    }
