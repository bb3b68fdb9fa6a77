"""The service on a real Ray cluster of this machine: the library's answers, more replicas under load, limits kept."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray.serve")

from pairstream.cli import main as pairstream
from pretrain.encoder import load_encoder
from serve.settings import Scaling

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def ask(port, path, content=None, headers=None, timeout=60):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        body = None if content is None else json.dumps(content).encode()
        headers = {**({} if body is None else {"Content-Type": "application/json"}), **(headers or {})}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.dist
def test_replicas_answer_as_the_library_does_and_grow_under_load(tiny_models, tmp_path):
    from pretrain.encoder import build_encoder
    from pretrain.recipe_model import TowersModel

    model = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu").save(
        tmp_path / "model"
    )
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    port = free_port()
    code = f"""
import sys
from serve import cli, cluster
real = cli.Scaling
cli.Scaling = lambda **given: real(**given, up_seconds=0)
def watch():
    import time
    while True:
        print("replicas", cluster.replicas(), flush=True)
        time.sleep(0.5)
run = cluster.run
def watched(app, started, **place):
    import threading
    run(app, lambda: (started(), threading.Thread(target=watch, daemon=True).start()), **place)
cluster.run = watched
cli.main(["--model", {str(model)!r}, "--port", "{port}", "--replicas", "1", "2", "--replica-requests", "1",
          "--replica-cpus", "0.5", "--rate", "0", "--api-keys", {str(tmp_path / "keys")!r}, "--device", "cpu"])
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A busy machine needs more than Ray's five seconds to start a proxy.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    }
    problems = (tmp_path / "stderr").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=problems,
        text=True,
        env=environment,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(server.stdout))  # pyright: ignore
    reader.start()
    try:
        until = time.monotonic() + 240
        while not any(line.startswith("PairStream serves") for line in list(lines)):
            assert server.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < until, lines
            time.sleep(0.2)
        key = {"X-API-Key": "0123456789abcdef"}
        assert ask(port, "/readyz") == (200, {"status": "ready"})
        assert ask(port, "/v1/info")[0] == 401  # the door is the same
        encoder = load_encoder(model, device="cpu")
        texts = ["a red cat", "two dogs"]
        status, answer = ask(port, "/v1/embed/text", {"texts": texts}, key)
        assert status == 200
        np.testing.assert_allclose(
            answer["embeddings"], encoder.encode_texts(texts).numpy(), rtol=0, atol=1e-5
        )
        assert answer["model"]["fingerprint"] == encoder.fingerprint
        status, answer = ask(port, "/v1/embed/text", {"texts": ["a"], "more": 1}, key)
        assert (status, answer["error"]["code"]) == (422, "invalid")
        stop, wrong = threading.Event(), []

        def load() -> (
            None
        ):  # all six fit into one replica's queue: refusals would keep requests in progress few
            while not stop.is_set():
                status, answer = ask(port, "/v1/embed/text", {"texts": ["word " * 20] * 40}, key)
                if status not in (200, 503):
                    wrong.append(answer)

        clients = [threading.Thread(target=load) for _ in range(6)]
        for client in clients:
            client.start()
        until = time.monotonic() + 180
        while "replicas 2\n" not in lines and time.monotonic() < until:
            time.sleep(0.5)
        stop.set()
        for client in clients:
            client.join()
        assert "replicas 1\n" in lines
        assert "replicas 2\n" in lines, lines[-5:]
        assert not wrong
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(90)
        finally:
            if server.poll() is None:
                server.kill()
            reader.join(10)
            server.stdout.close()  # pyright: ignore
            problems.close()
    assert server.returncode == 0
    with pytest.raises(OSError, match="refused"):
        ask(port, "/healthz")


def test_what_does_not_go_together_is_refused(capsys):
    with pytest.raises(ValueError, match="at most 1 replicas and at least 2"):
        Scaling(least=2, most=1)
    for words, message in (
        (["--cluster", "auto"], "--cluster goes with --replicas LEAST MOST"),
        (["--replicas", "1", "2", "--port", "0"], "--replicas needs a --port"),
    ):
        assert pairstream(["serve", "--model", "m", *words]) == 2
        assert message in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert pairstream(["serve", "--model", "m", "--replicas", "1", "2"]) == 2
    assert "pairstream[ray]" in capsys.readouterr().err
