"""What both training loops share: the set-up they refuse, the sums of a log line, the seed of a step."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from pretrain.loop import Window, make_accelerator, mix

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@dataclass(frozen=True)
class Plain:
    """A recipe that says no more than how it is launched."""

    run: str = "run"
    processes: int | None = None
    precision: str = "auto"
    trackers: tuple[str, ...] = ()


def test_one_process_in_full_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    accelerator = make_accelerator(Plain(processes=1, precision="fp32"))
    assert (accelerator.num_processes, accelerator.mixed_precision) == (1, "no")
    assert accelerator.gradient_accumulation_steps == 1


def test_gradient_accumulation_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(
        ValueError,
        match=r"4 gradient accumulation steps: it would divide every gradient by 4.*choose batch_size",
    ):
        make_accelerator(Plain())


def test_megatron_is_refused_before_accelerate_looks_for_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(
        ValueError, match=r"set up for Megatron-LM, whose engine .* launch --use_fsdp --fsdp_version 2"
    ):
        make_accelerator(Plain(), shards=True)


@pytest.mark.parametrize(("engine", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_engines_are_refused_where_replicas_would_train_without_a_word(monkeypatch, engine, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    told = (
        rf"{name}, which this trainer does not take \(pretraining does\): launch without --use_{name.lower()}"
    )
    with pytest.raises(ValueError, match=told):
        make_accelerator(Plain())
    assert make_accelerator(Plain(), shards=True).num_processes == 1
    assert os.environ[f"ACCELERATE_USE_{engine}"] == "true"


def test_accelerates_own_compilation_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(
        ValueError, match=r"set up to compile \(INDUCTOR\): leave --dynamo_backend .*`compile: true`"
    ):
        make_accelerator(Plain())


def test_another_number_of_processes_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="the recipe asks for 2 processes, 1 started"):
        make_accelerator(Plain(processes=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the launcher started 2 processes but Accelerate sees 1"):
        make_accelerator(Plain())


def test_a_missing_tracker_is_named_with_its_install_line():
    with pytest.raises(ImportError, match="the tracker trackio cannot be imported: pip install trackio"):
        make_accelerator(Plain(trackers=("trackio",)))


def test_a_window_has_the_mean_of_its_steps_and_refuses_what_is_not_finite():
    accelerator = make_accelerator(Plain())
    window = Window(accelerator.device)
    assert window.mean_loss(accelerator, 0, "") is None
    for loss, norm in ((1.0, 0.5), (2.0, 0.25)):
        window.add(torch.tensor(loss), torch.tensor(norm), 8)
    assert window.mean_loss(accelerator, 2, "") == 1.5
    assert (window.samples, float(window.norm)) == (16, 0.25)
    window.add(torch.tensor(3.0), torch.tensor(math.inf), 8)
    with pytest.raises(ValueError, match=r"loss is 2.0 and the gradient norm inf at step 3: .* Do this\."):
        window.mean_loss(accelerator, 3, "Do this.")
    window.add(torch.tensor(math.nan), torch.tensor(0.5), 8)
    with pytest.raises(ValueError, match=r"loss is nan and the gradient norm 0\.5 at step 4"):
        window.mean_loss(accelerator, 4, "")


def test_step_seeds_differ_between_steps_and_ranks():
    seeds = {mix(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_kept():
    program = """
import resource, sys, torch
from pairstream.memory import keep_freed_memory
assert sys.argv[1] == "as it is" or keep_freed_memory()
for turn in range(16):
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    if turn == 11:  # the heap may grow by some blocks first, as its gaps lie
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert 4 * faults("kept") < faults("as it is")  # 65,536 small pages, or 128 huge ones
