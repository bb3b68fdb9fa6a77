"""What a contrastive loss sends between ranks, against their number: formulae checked with bytes on the wire; a plot.

    python benchmarks/communication.py [--plot communication.png]      (under a minute)

prints the bytes that each rank sends in a step (forward and backward), for ways of computing the loss of W ranks with
b pairs each and features of d float32 numbers; N = W b. `gather` and `ring` are ours; `local` is open_clip's ClipLoss
with local_loss and gather_with_grad, the one of its settings that is exact and holds no N x N logits. Collectives are
counted as rings carry them out, in gloo as in NCCL for large tensors: an all-gather of n bytes a rank sends (W - 1) n,
an all-reduce of n bytes 2 (W - 1) n / W, a reduce-scatter of n bytes (W - 1) n / W.

The formulae are then compared with what 2 and 4 processes with gloo really send, read from the counter of a loopback
device that nobody else uses (a network namespace: Linux, root). A difference above 3 % is an error. Times are a model,
not a measurement: bytes / bandwidth + messages x latency, nothing overlapped.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOLERANCE = 0.03


@dataclass(frozen=True)
class Way:
    """A way of computing a loss over ranks.

    Attributes:
        told: The formula of `sent`.
        sent: Bytes that a rank sends in a step, of W, b and d.
        messages: Steps of its rings that wait for one another, of W.
        held: Bytes of the features and their gradients that a rank holds at a time, of W, b and d.
    """

    told: str
    sent: Callable[[int, int, int], float]
    messages: Callable[[int], int]
    held: Callable[[int, int, int], float]


WAYS = {
    # Forward: texts gathered, two sums over all columns. Backward: texts and their sums again, their gradient summed.
    "info_nce gather": Way(
        "(W - 1) b (16 d + 24)",
        lambda w, b, d: (w - 1) * b * (16 * d + 24),
        lambda w: 9 * (w - 1),
        lambda w, b, d: 4 * (2 * b + 2 * w * b) * d,
    ),
    # Texts travel W - 1 hops, twice; what a column has collected W hops home: two sums, then its gradient.
    "info_nce ring": Way(
        "(W - 1) b (8 d + 8) + W b (4 d + 8)",
        lambda w, b, d: (w - 1) * b * (8 * d + 8) + w * b * (4 * d + 8),
        lambda w: 4 * w - 2,
        lambda w, b, d: 4 * 6 * b * d,
    ),
    # Both features gathered; backward a reduce-scatter of each.
    "info_nce local": Way(
        "16 (W - 1) b d",
        lambda w, b, d: 16 * (w - 1) * b * d,
        lambda w: 4 * (w - 1),
        lambda w, b, d: 4 * (2 * b + 4 * w * b) * d,
    ),
    "sigmoid gather": Way(
        "12 (W - 1) b d",
        lambda w, b, d: 12 * (w - 1) * b * d,
        lambda w: 3 * (w - 1),
        lambda w, b, d: 4 * (2 * b + 2 * w * b) * d,
    ),
    # The gradient is found with the loss: nothing travels in the backward pass.
    "sigmoid ring": Way(
        "4 (2 W - 1) b d",
        lambda w, b, d: 4 * (2 * w - 1) * b * d,
        lambda w: 2 * w - 1,
        lambda w, b, d: 4 * 6 * b * d,
    ),
}


def weights(world: int, parameters: float) -> float:
    """Bytes that a rank sends for DistributedDataParallel's all-reduce of float32 gradients: 8 P (W - 1) / W."""
    return 8 * parameters * (world - 1) / world


def table(rows: Callable[[int], int], width: int, parameters: float, bandwidth: float, latency: float) -> str:
    """Megabytes that a rank sends, milliseconds by the model, and megabytes held, for each number of ranks."""
    head = f"{'ranks':>6}{'pairs/rank':>12}" + "".join(f"{name:>28}" for name in WAYS) + f"{'weights':>12}"
    lines = [head, f"{'':>18}" + f"{'MB sent     ms  MB held':>28}" * len(WAYS) + f"{'MB sent':>12}"]
    for world in RANKS:
        b = rows(world)
        line = f"{world:>6}{b:>12,}"
        for way in WAYS.values():
            sent = way.sent(world, b, width)
            milliseconds = 1e3 * (sent / bandwidth + way.messages(world) * latency)
            line += f"{sent / 1e6:>12,.1f}{milliseconds:>7,.1f}{way.held(world, b, width) / 1e6:>9,.1f}"
        lines.append(line + f"{weights(world, parameters) / 1e6:>12,.1f}")
    return "\n".join(lines)


def plot(path: Path, rows: int, width: int, parameters: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, way) in enumerate(WAYS.items()):
        style = {"color": f"C{number}", "marker": "os^vD"[number], "label": name}
        panes[0].loglog(RANKS, [way.sent(world, rows, width) / 1e6 for world in RANKS], **style)
        panes[1].loglog(RANKS, [way.held(world, rows, width) / 1e6 for world in RANKS], **style)
    sent = [weights(world, parameters) / 1e6 for world in RANKS]
    panes[0].loglog(RANKS, sent, "k--", label=f"gradients of {parameters / 1e6:.0f} M weights")
    for pane, what in zip(
        panes, ("MB that a rank sends in a step", "MB of features that a rank holds"), strict=True
    ):
        pane.set_xticks(RANKS, [f"{world:,}" for world in RANKS], minor=False)
        pane.set(xlabel=f"ranks with {rows:,} pairs each, d = {width}", ylabel=what)
        pane.grid(alpha=0.3)
    panes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def measure(worlds: tuple[int, ...], rows: int, width: int) -> dict[str, dict[str, float]]:
    """Bytes that a rank sends on average, by `WAY at W ranks`, beside the formula's.

    Raises:
        RuntimeError: No namespace can be made here, or a rank failed.
    """
    import open_clip.loss  # noqa: F401 - once, before the ranks are forked
    import torch  # noqa: F401

    import pretrain.losses  # noqa: F401

    found = {}
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            if fork(lambda world=world, place=Path(folder): alone(world, place, rows, width)):
                raise RuntimeError(f"{world} processes in a network namespace failed; see above")
            counted = json.loads((Path(folder) / "counted.json").read_text())
        for name, came in counted.items():
            paper = WAYS[name].sent(world, rows, width)
            ratio = round(came / paper, 4)
            found[f"{name} at {world} ranks"] = {"counted": came, "formula": paper, "ratio": ratio}
            print(f"{name} at {world} ranks: counted / formula {ratio}", file=sys.stderr, flush=True)
    return found


def fork(job: Callable[[], None], *, wait: bool = True) -> int:
    """Do a job in a child; returns its exit code, or without waiting its process id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child


def alone(world: int, folder: Path, rows: int, width: int) -> None:
    """Go into a network of one's own, with a loopback device that nobody else uses, and start the ranks there.

    Raises:
        OSError: That is not allowed.
        RuntimeError: A rank failed.
    """
    new_network = 0x40000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_network):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET); it takes root")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        fork(lambda rank=rank: rank_main(rank, world, folder, rows, width), wait=False)
        for rank in range(world)
    ]
    if any(os.waitpid(rank, 0)[1] for rank in ranks):
        raise RuntimeError("a rank failed")


def on_the_wire() -> int:
    """Bytes that the loopback device of this namespace has sent."""
    line = next(
        line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")
    )
    return int(line.split(":")[1].split()[8])


def rank_main(rank: int, world: int, folder: Path, rows: int, width: int) -> None:
    """One rank: every way three times, counting what went over the wire meanwhile; rank 0 writes."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from open_clip.loss import ClipLoss

    from pretrain.losses import distributed_info_nce, distributed_sigmoid_loss

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world
    )
    torch.manual_seed(rank)
    pair = [F.normalize(torch.randn(rows, width), dim=-1).requires_grad_() for _ in range(2)]
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    losses = {
        "info_nce gather": lambda: distributed_info_nce(*pair, scale, exchange="gather"),
        "info_nce ring": lambda: distributed_info_nce(*pair, scale, exchange="ring"),
        "info_nce local": lambda: clip(*pair, scale),
        "sigmoid gather": lambda: distributed_sigmoid_loss(*pair, scale, bias, exchange="gather"),
        "sigmoid ring": lambda: distributed_sigmoid_loss(*pair, scale, bias, exchange="ring"),
    }
    assert losses.keys() == WAYS.keys()
    found, turns = {}, 3
    for name, loss in losses.items():
        loss().backward()  # lines between ranks are opened by the first message
        dist.barrier()
        before = on_the_wire()
        dist.barrier()
        for _ in range(turns):
            loss().backward()
        dist.barrier()
        found[name] = (on_the_wire() - before) / turns / world
        dist.barrier()
    if rank == 0:
        (folder / "counted.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="draw bytes against ranks into this file")
    parser.add_argument("--rows", type=int, default=1024, help="pairs of a rank in the first table")
    parser.add_argument("--global-batch", type=int, default=65536, help="pairs of all ranks in the second")
    parser.add_argument("--width", type=int, default=512, help="numbers of a feature")
    parser.add_argument("--parameters", type=float, default=151.3e6, help="of the towers, for comparison")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="bytes/s that a rank can send")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message")
    args = parser.parse_args()
    width = args.width
    for name, way in WAYS.items():
        print(f"{name:<18}bytes a rank sends in a step: {way.told}")
    model = width, args.parameters, args.bandwidth, args.latency
    print(f"\n{args.rows:,} pairs on each rank, d = {width}\n" + table(lambda world: args.rows, *model))
    print(
        f"\n{args.global_batch:,} pairs on all ranks together, d = {width}\n"
        + table(lambda world: args.global_batch // world, *model)
    )
    if args.plot:
        plot(args.plot, args.rows, width, args.parameters)
    result = {"benchmark": "communication", "rows": args.rows, "width": width}
    result["sent_mb"] = {
        name: {str(world): round(way.sent(world, args.rows, width) / 1e6, 3) for world in RANKS}
        for name, way in WAYS.items()
    }
    error = None
    try:
        result["measured"] = measure((2, 4), 512, 256)
    except (RuntimeError, OSError) as failed:
        error = str(failed)
    wrong = {
        name: found["ratio"]
        for name, found in result.get("measured", {}).items()
        if abs(found["ratio"] - 1) > TOLERANCE
    }
    if wrong:
        error = f"bytes on the wire are other than the formula's by more than {TOLERANCE:.0%}: {wrong}"
    if error:
        print(f"not confirmed: {error}", file=sys.stderr)
    result |= {"confirmed": error is None, "machine": f"{platform.machine()}, gloo"}
    print(json.dumps(result))
    sys.exit(error is not None)


if __name__ == "__main__":
    main()
