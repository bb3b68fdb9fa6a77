"""Two hosts on one machine: network namespaces with a cable between them, which is cut while they train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from pretrain.checkpoint import complete_checkpoints
from pretrain.resume import newest_whole

pytestmark = [pytest.mark.dist, pytest.mark.slow]
HOSTS = ("psA", "psB")
TIMEOUT = 60  # seconds that ranks wait for one another; a machine with other work is slow to answer


def ip(*words: str, check: bool = True) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode


@pytest.fixture
def hosts() -> Iterator[None]:
    """Namespaces 10.77.0.1 and 10.77.0.2 with a veth pair, where this process may make them."""
    if sys.platform != "linux" or os.geteuid() or ip("netns", "add", HOSTS[0], check=False):
        pytest.skip("making network namespaces is not permitted here (needs root and iproute2)")
    try:
        ip("netns", "add", HOSTS[1])
        ip(
            "link",
            "add",
            "psvA",
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            "psvB",
            "netns",
            HOSTS[1],
        )
        for number, name in enumerate(HOSTS):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"psv{name[-1]}")
            for device in ("lo", f"psv{name[-1]}"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name, check=False)


def start(recipe: Path, said: Path) -> list[subprocess.Popen]:
    """One process on each host, by torchrun's variables."""
    started = []
    for rank, name in enumerate(HOSTS):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29517",
            "GLOO_SOCKET_IFNAME": f"psv{name[-1]}",
            "OMP_NUM_THREADS": "1",
        }
        with (said / f"{name}.txt").open("a") as file:
            command = [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-m",
                "pretrain",
                str(recipe),
                "--resume",
                "auto",
            ]
            started.append(
                subprocess.Popen(command, env={**os.environ, **variables}, stdout=file, stderr=file)
            )
    return started


def test_a_cut_cable_ends_both_hosts_in_time_and_the_run_resumes(hosts, tmp_path, tiny_recipe, tiny_models):
    """The same weights as a run of two hosts that were never parted."""
    runs = {}
    for name in ("whole", "cut"):
        content = tiny_recipe(
            run=str(tmp_path / name), steps=100, checkpoint={"every": 5}, rank_timeout=TIMEOUT, log_every=10
        )
        runs[name] = tmp_path / f"{name}.yaml"
        runs[name].write_text(yaml.safe_dump(content))
        (tmp_path / f"said-{name}").mkdir()
    checkpoints, said = tmp_path / "cut/checkpoints", tmp_path / "said-cut"
    parted = start(runs["cut"], said)
    until = time.monotonic() + 240
    while len(complete_checkpoints(checkpoints)) < 2 and time.monotonic() < until:
        assert [process.poll() for process in parted] == [None, None], told(said)
        time.sleep(0.05)
    ip("-n", HOSTS[1], "link", "set", "psvB", "down")
    codes = [
        process.wait(timeout=TIMEOUT + 120) for process in parted
    ]  # of which most is this machine's slowness
    assert codes == [2, 2], told(said)
    for name in HOSTS:
        errors = [
            line for line in (said / f"{name}.txt").read_text().splitlines() if line.startswith("error: ")
        ]
        assert len(errors) == 1, told(said)
        assert "lost another of the 2 processes" in errors[0]
        assert "--resume" in errors[0]
    found = newest_whole(checkpoints, lambda text: pytest.fail(text))  # nothing is damaged
    assert found is not None
    assert 10 <= found.step < 100
    ip("-n", HOSTS[1], "link", "set", "psvB", "up")
    for name in ("cut", "whole"):
        ends = [process.wait(timeout=300) for process in start(runs[name], tmp_path / f"said-{name}")]
        assert ends == [0, 0], told(tmp_path / f"said-{name}")
    last = [
        load_file(tmp_path / name / "checkpoints/step-00000100/model/open_clip_model.safetensors")
        for name in runs
    ]
    assert [key for key in last[0] if last[0][key].tobytes() != last[1][key].tobytes()] == []
    log = [json.loads(line)["step"] for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    assert log == list(range(10, 101, 10))


def told(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.iterdir()))
