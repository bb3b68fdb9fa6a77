"""One rank of test_two_processes.py: gradients of one batch, then whole trainings; torchrun starts two of it.

Argument: a folder with job.json. Rank 0 leaves NAME.safetensors for each case there.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pretrain.collectives import gather_counts, gather_rows, several_ranks
from pretrain.encoder import build_encoder
from pretrain.locks import set_training_mode
from pretrain.losses import distributed_info_nce, info_nce
from pretrain.norm import use_global_batch_norm
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.trainer import DualEncoder, Trainer
from pretrain.wrapping import Shards, share
from pretrain.zero import Zero

ZERO = ("zero1", "zero2")


def one_backward(
    case: dict, batch: dict[str, torch.Tensor], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Loss, gradients and batch statistics of a batch whose rows lie on the ranks as case["rows"] says."""
    torch.manual_seed(0)
    encoder = build_encoder(TowersModel.model_validate(case["model"]), device="cpu")
    use_global_batch_norm(encoder.model)
    network = DualEncoder(encoder).to(getattr(torch, case["dtype"]))
    wrapped = accelerator.prepare(network)
    set_training_mode(encoder.model)
    rank, rows = accelerator.process_index, case["rows"]
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    images, texts, scale = wrapped(batch["images"][mine], batch["tokens"][mine])
    if case["loss"] == "ours":
        loss = distributed_info_nce(images, texts, scale)
    else:
        loss = ClipLoss(rank=rank, world_size=accelerator.num_processes, **case["loss"])(images, texts, scale)
    accelerator.backward(loss)
    mean: Any = accelerator.reduce(loss.detach(), reduction="mean")
    found = {"loss": mean.reshape(1)}
    for name, parameter in encoder.model.named_parameters():
        found[f"gradient|{name}"] = parameter.grad
    for name, buffer in encoder.model.named_buffers():
        if "running" in name:
            found[f"buffer|{name}"] = buffer
    accelerator.free_memory()
    return {name: value.detach().contiguous().clone() for name, value in found.items()}


class SummedOverRanks(torch.autograd.Function):
    """A number whose gradient is summed over the ranks, before DDP takes its mean, as in Inf-CLIP."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        dist.all_reduce(grad := grad.clone())
        return grad


def mistaken(name: str) -> Any:
    """An objective with the gradient of others'; the right one on one process."""

    def objective(features: tuple[torch.Tensor, ...], *_: torch.Tensor) -> torch.Tensor:
        images, texts, scale = features
        if not several_ranks():
            return info_nce(images, texts, scale)
        if name == "temperature summed":
            return distributed_info_nce(images, texts, SummedOverRanks.apply(scale))
        counts, rank = gather_counts(len(images), images.device), dist.get_rank()
        first = sum(counts[:rank])
        all_images, all_texts = (gather_rows(rows.detach(), counts) for rows in (images, texts))
        if name == "local loss alone":
            labels = torch.arange(first, first + len(images))
            logits = scale * images @ all_texts.T, scale * texts @ all_images.T
            return sum(F.cross_entropy(each, labels) for each in logits) / 2
        mine = torch.arange(first, first + len(images))
        return info_nce(all_images.index_copy(0, mine, images), all_texts.index_copy(0, mine, texts), scale)

    return objective


def main() -> None:
    gc.freeze()  # Accelerate collects garbage after each training
    atexit.register(gc.unfreeze)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    refusals = {}
    for name, content in job["refused"].items():
        try:
            Trainer(PretrainRecipe.model_validate(content))
        except ValueError as error:
            refusals[name] = str(error)
    checked = Trainer(PretrainRecipe.model_validate(job["checked"]))
    checked.check_gradients()
    exact = checked.objective
    checked.objective = lambda *inputs: exact(*inputs) * (1 if several_ranks() else 2)
    try:
        checked.check_gradients()
    except ValueError as error:
        refusals["halved gradients"] = str(error)
    plain = Trainer(
        PretrainRecipe.model_validate(job["trainings"]["vit"] | {"run": str(folder / "mistaken")})
    )
    for name in ("no gradient through the gather", "local loss alone", "temperature summed"):
        plain.objective = mistaken(name)
        try:
            plain.check_gradients()
        except ValueError as error:
            refusals[name] = str(error)
    accelerator = Accelerator(cpu=True)
    for case in job["cases"]:
        batch = load_file(folder / f"batch-{case['images']}.safetensors")
        found = one_backward(case, batch, accelerator)
        if accelerator.is_main_process:
            save_file(found, folder / f"{case['name']}.safetensors")
    sharded = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    for name, content in job["sharded refusals"].items():
        os.environ |= {**sharded, "FSDP_VERSION": "1" if name == "first version" else "2"}
        try:
            Trainer(PretrainRecipe.model_validate(content)).check_gradients()
        except ValueError as error:
            refusals[name] = str(error)
    for name, content in job["trainings"].items():
        way = name.split()[0]
        os.environ |= {**sharded, "ACCELERATE_USE_FSDP": "true" if way == "sharded" else "false"}
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": str(way in ZERO).lower(),
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": way[-1],
        }
        trainer = Trainer(PretrainRecipe.model_validate(content))
        trainer.train()
        assert isinstance(trainer.wrap, Shards) == (way == "sharded")
        assert isinstance(trainer.wrap, Zero) == (way in ZERO)
        if isinstance(trainer.wrap, Zero):  # each rank has a share of the moments, and of stage 2's gradients
            flat = [group["params"][0] for group in trainer.optimizer.param_groups]
            assert trainer.wrap.config["zero_optimization"]["stage"] == int(way[-1])
            shares = sum(trainer.optimizer.state[value]["exp_avg"].numel() for value in flat)
            whole = sum(value.numel() for values in trainer.wrap.groups for value in values[1])
            assert whole / 2 <= shares < 0.51 * whole
        if name.startswith("sharded"):  # and each rank trains a share of every matrix
            shares = sum(share(value).numel() for value in trainer.wrap.network.parameters())
            whole = [*trainer.model.parameters(), *trainer.terms.parameters()]
            assert shares < 0.6 * sum(value.numel() for value in whole)
        # What rank 1 has must be what rank 0 saves.
        for value in (*trainer.model.state_dict().values(), *trainer.terms.state_dict().values()):
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value)
            assert torch.equal(*both), f"{name}: the ranks have drifted apart"
    if accelerator.is_main_process:
        (folder / "refusals.json").write_text(json.dumps(refusals))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
