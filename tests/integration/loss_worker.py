"""One optimiser step of two small towers with every loss, on 1, 2, 3 and 4 processes; test_loss_ranks.py starts it.

Argument: a folder, which gets world-W.safetensors with each case's loss and its parameters after the step, and
counts-W.json with what the exchanges moved. Ranks are forked from this process, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.communication import fork
from pretrain import losses, soft_targets, term_losses
from pretrain.exchange import Gather, Ring
from pretrain.global_contrast import SampleMeans, global_info_nce

ROWS = 12
SPLITS = {
    "even": {1: [12], 2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]},
    "uneven": {1: [12], 2: [7, 5], 3: [5, 1, 6], 4: [5, 1, 4, 2]},
}
IDS = torch.tensor([0, 1, 2, 0, 3, 4, 4, 5, 6, 0, 7, 8])


class Towers(nn.Module):
    """A linear tower each, a log scale and a bias."""

    def __init__(self):
        super().__init__()
        self.image, self.text = (nn.Linear(5, 6, bias=False, dtype=torch.float64) for _ in range(2))
        self.t = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image = F.normalize(self.image(inputs[:, 0]), dim=-1)
        return image, F.normalize(self.text(inputs[:, 1]), dim=-1), self.t.exp(), self.bias


def with_bias(loss: Callable) -> Callable:
    """Only the sigmoid losses take the bias; the others must not leave it without a gradient."""
    return lambda a, b, s, bias, mine: loss(a, b, s, mine) + 0 * bias


def teachers(mine: slice) -> list[soft_targets.Teacher]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for width in (4, 7):
        rows = F.normalize(torch.randn(2, ROWS, width, generator=generator, dtype=torch.float64), dim=-1)
        made.append(soft_targets.Teacher(rows[0, mine], rows[1, mine], torch.tensor(5.0 + width)))
    return made


def with_means(a: Tensor, b: Tensor, s: Tensor, mine: slice) -> Tensor:
    """Two steps of the estimator: the second has averages to go by."""
    means = SampleMeans(ROWS).double()
    indices = torch.arange(ROWS)[mine]
    with torch.no_grad():
        global_info_nce(a.flip(1), b, s, indices, means, gamma=0.5)
    return global_info_nce(a, b, s, indices, means, gamma=0.5)


def read_by_a_critic(a: Tensor, b: Tensor, s: Tensor, _: slice) -> Tensor:
    """A fixed critic; the towers get its gradient reversed and halved, the scale as it is."""
    critic = torch.linspace(-1, 1, 6, dtype=torch.float64)
    sides = [term_losses.reverse_gradient(side, 0.5) @ critic * s for side in (a, b)]
    return term_losses.adversarial_loss(*sides)


def captions(a: Tensor, b: Tensor, s: Tensor, mine: slice) -> Tensor:
    """A made-up entropy of captions of 1 to 5 tokens after the first."""
    tokens = (torch.arange(6) < 2 + torch.arange(ROWS)[:, None] % 5).long()
    return term_losses.caption_loss(s * (a * b).sum(1).square(), tokens[mine], 0)


def cases(rank: int, world: int) -> dict[str, tuple[str, Callable]]:
    """Name to the split of the rows and the loss."""
    found = {}
    for split in SPLITS:
        for tile in (None, 3):
            for exchange in ("gather", "ring"):
                options = {"tile": tile, "exchange": exchange}
                found[f"info_nce {exchange} {tile} {split}"] = (
                    split,
                    with_bias(lambda a, b, s, _, o=options: losses.distributed_info_nce(a, b, s, **o)),
                )
                found[f"sigmoid {exchange} {tile} {split}"] = (
                    split,
                    (lambda a, b, s, bias, _, o=options: losses.distributed_sigmoid_loss(a, b, s, bias, **o)),
                )
        found |= {
            f"{name} {split}": (split, with_bias(loss))
            for name, loss in {
                "smoothing": lambda a, b, s, _: (
                    losses.distributed_info_nce(a, b, s) + 0.1 * losses.smoothing_term(a, b, s)
                ),
                "positives": lambda a, b, s, mine: soft_targets.multi_positive_info_nce(a, b, s, IDS[mine]),
                "distillation": lambda a, b, s, mine: soft_targets.distillation_loss(a, b, s, teachers(mine)),
                "hard": lambda a, b, s, _: soft_targets.hard_negative_info_nce(a, b, s, beta=0.3),
                "global": with_means,
                "critic": read_by_a_critic,
                "views": lambda a, b, s, _: term_losses.nt_xent(a, b, 1 / s),
                "captions": captions,
            }.items()
        }
    ranks = {"rank": rank, "world_size": world}
    for name, options in {
        "default": {},
        "gathered": {"gather_with_grad": True},
        "local gathered": {"gather_with_grad": True, "local_loss": True},
        "local": {"local_loss": True},
    }.items():
        clip = ClipLoss(**ranks, **options)
        found[f"open_clip {name}"] = "even", with_bias(lambda a, b, s, _, clip=clip: clip(a, b, s))
    for name in ("bidir", "shift", "reduce", "gather"):
        siglip = SigLipLoss(**ranks, dist_impl=name)
        found[f"open_clip siglip {name}"] = (
            "even",
            lambda a, b, s, bias, _, siglip=siglip: siglip(a, b, s, bias),
        )
    return found


def one_step(loss: Callable, inputs: Tensor, mine: slice, world: int) -> dict[str, Tensor]:
    """The mean loss, and the parameters after one step of plain gradient descent under DDP."""
    torch.manual_seed(0)
    towers = Towers()
    network = DistributedDataParallel(towers) if world > 1 else towers
    value = loss(*network(inputs[mine]), mine)
    value.backward()
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter -= parameter.grad
    mean = value.detach().clone()
    if world > 1:
        dist.all_reduce(mean)
    return {"loss": mean.reshape(1) / world} | {
        name: parameter.detach().clone().reshape(-1) for name, parameter in towers.named_parameters()
    }


class Largest(TorchDispatchMode):
    """The largest storage that was made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def count(world: int) -> dict[str, dict]:
    """Visits, messages and the largest tensor of each exchange with four rows on every rank."""
    told = {}
    for name, loss in (
        ("info_nce", losses.distributed_info_nce),
        ("sigmoid", losses.distributed_sigmoid_loss),
    ):
        for kind in (Ring, Gather):
            torch.manual_seed(dist.get_rank())
            rows = [F.normalize(torch.randn(4, 8), dim=-1).requires_grad_() for _ in range(2)]
            more = (torch.tensor(-10.0),) if name == "sigmoid" else ()
            tours, sent, tour, pass_on = [], [], kind.tour, Ring.pass_on

            def watched(self, luggage, carried, visit, merge, *, tour=tour, tours=tours):
                visits: list = []
                tours.append(visits)

                def noted(own, columns, found, *, visits=visits, visit=visit):
                    visits.append([own, columns[0].tolist()])
                    visit(own, columns, found)

                return tour(self, luggage, carried, noted, merge)

            def posted(self, tensors, rows, *, pass_on=pass_on, sent=sent):
                sent.append([len(tensors), list(tensors[0].shape)])
                return pass_on(self, tensors, rows)

            kind.tour, Ring.pass_on = watched, posted
            with Largest() as largest:
                value = loss(*rows, torch.tensor(10.0), *more, exchange=kind.__name__.lower(), tile=2)
                value.backward()
            kind.tour, Ring.pass_on = tour, pass_on
            told[f"{name} {kind.__name__.lower()}"] = {
                "visits": [[first for first, _ in tour] for tour in tours],
                "different": [len({json.dumps(rows) for _, rows in tour}) for tour in tours],
                "sent": sent,
                "largest": largest.bytes,
            }
    return told


def rank_main(folder: Path, rank: int, world: int) -> None:
    if world > 1:
        store = dist.FileStore(str(folder / f"store-{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, 2, 5, generator=generator, dtype=torch.float64)
    found = {}
    for name, (split, loss) in cases(rank, world).items():
        rows = SPLITS[split][world]
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        found |= {f"{name}|{key}": value for key, value in one_step(loss, inputs, mine, world).items()}
    told = {}
    if world > 1:
        told = count(world)
        try:
            losses.distributed_info_nce(*[torch.ones(min(rank, 1), 4)] * 2, torch.tensor(1.0))
        except ValueError as error:
            told["refused"] = str(error)
        dist.barrier()
        dist.destroy_process_group()
    if rank == world - 1:
        save_file(found, folder / f"world-{world}.safetensors")
        (folder / f"counts-{world}.json").write_text(json.dumps(told))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for world in (1, 2, 3, 4):
        children = [fork(partial(rank_main, folder, rank, world), wait=False) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"{world} processes ended with {codes}")


if __name__ == "__main__":
    main()
