"""Trainings in forked processes, some of them killed; test_resume.py starts it with a folder that holds chains.json.

The file holds chains of trainings by name, each {recipe, resume, world, kill}. They are forked from this
process, which has imported everything already and run nothing, so that torch is imported once for all.
`kill` names the place in PLACES where SIGKILL strikes, and at which of its calls.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pretrain.checkpoint
import pretrain.encoder
import pretrain.objectives
import pretrain.preemption
import pretrain.trainer
from pairstream.run import RunFolder
from pretrain.recipe import PretrainRecipe


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell_to_leave(original, *args, **keys):
    """SIGTERM to all processes of the training, loaders too, as a scheduler sends it; then go on."""
    os.killpg(os.getpgrp(), signal.SIGTERM)
    return original(*args, **keys)


def strike(owner, name: str, number: int, *, instead=die, when=lambda *_: True) -> None:
    """Let the `number`-th call of `owner.name` for which `when` holds do `instead`."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args, **keys):
        nonlocal calls
        calls += when(*args)
        if calls == number and when(*args):
            return instead(original, *args, **keys)
        return original(*args, **keys)

    setattr(owner, name, wrapped)


def half_a_file(original, tensors, path) -> None:
    original(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def half_a_line(original, folder, record) -> None:
    with folder.log_path.open("a") as file:
        file.write(json.dumps(record)[:40])
    die()


def after(original, *args, **keys) -> None:
    original(*args, **keys)
    die()


def appears(path: Path, target: Path) -> bool:
    return path.name.startswith(".tmp-step") and Path(target).name.startswith("step-")


def goes(path: Path, target: Path) -> bool:
    return path.name.startswith("step-")


PLACES = {
    "backward": lambda n: strike(pretrain.objectives, "distributed_info_nce", n),
    "told to leave": lambda n: strike(pretrain.objectives, "distributed_info_nce", n, instead=tell_to_leave),
    "half of the optimizer's step": lambda n: strike(
        pretrain.trainer.torch.optim.AdamW, "step", n, instead=after
    ),
    "log": lambda n: strike(RunFolder, "log", n, instead=half_a_line),
    "model file": lambda n: strike(pretrain.encoder, "save_tensors", n, instead=half_a_file),
    "optimizer file": lambda n: strike(pretrain.checkpoint, "save_tensors", n, instead=half_a_file),
    "trained weights' file": lambda n: strike(
        pretrain.checkpoint,
        "save_tensors",
        n,
        instead=half_a_file,
        when=lambda tensors, path: path.name == "weights.safetensors",
    ),
    "before the rename": lambda n: strike(Path, "replace", n, when=appears),
    "after the rename": lambda n: strike(Path, "replace", n, instead=after, when=appears),
    "while old ones are dropped": lambda n: strike(Path, "replace", n, instead=after, when=goes),
}


def fork_training(job: dict, rank: int, port: int) -> int:
    """Start one rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if job.get("kill"):
            os.setpgid(0, 0)
        if job.get("world", 1) > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(job["world"]),
                "LOCAL_WORLD_SIZE": str(job["world"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        if job.get("kill") and rank == 0:
            place, number = job["kill"]
            PLACES[place](number)
        recipe = PretrainRecipe.model_validate(job["recipe"])
        pretrain.trainer.Trainer(recipe, resume=job.get("resume", False)).train()
        code = 0
    except pretrain.preemption.Preempted as left:
        code = left.code
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_chain(chain: list[dict]) -> list[int]:
    """Do trainings one after the other; returns the exit code of each."""
    codes = []
    for job in chain:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork_training(job, rank, port) for rank in range(job.get("world", 1))]
        _, status = os.waitpid(children[0], 0)
        for other in children[1:]:
            if status:  # a rank that lost its peer would wait for it
                os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    return codes


def main() -> None:
    """Two chains at a time."""
    gc.freeze()  # Accelerate collects garbage after each training
    atexit.register(gc.unfreeze)
    folder = Path(sys.argv[1])
    chains = json.loads((folder / "chains.json").read_text())
    halves = []
    for half in range(2):
        child = os.fork()
        if not child:
            codes = {name: run_chain(chains[name]) for name in list(chains)[half::2]}
            (folder / f"codes-{half}.json").write_text(json.dumps(codes))
            os._exit(0)
        halves.append(child)
    for child in halves:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
