"""Queues side by side, shutdown, and the command."""

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

import pytest

from serve.app import create_app
from serve.server import bind
from serve.settings import Settings


def test_captions_do_not_hold_up_embeddings(models, run_app, make_picture, picture_field, monkeypatch):
    app, go = create_app(models), threading.Event()
    monkeypatch.setattr(
        app.state.service.captions, "run", lambda pictures: go.wait(20) and ["a"] * len(pictures)
    )
    with run_app(app) as live:
        content = {"images": [picture_field(make_picture(1))]}
        found = []
        thread = threading.Thread(target=lambda: found.append(live.ask("/v1/caption", content)[0]))
        thread.start()
        for _ in range(3):
            assert live.ask("/v1/embed/image", content)[0] == 200
            assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200
        assert not found
        go.set()
        thread.join()
        assert found == [200]


def test_going_down_finishes_what_was_taken(models, run_app, monkeypatch):
    app = create_app(models, Settings(rate=0))
    service, go, found = app.state.service, threading.Event(), []
    real = service.texts.run
    monkeypatch.setattr(service.texts, "run", lambda texts: go.wait(20) and real(texts))
    with run_app(app) as live:
        threads = [
            threading.Thread(target=lambda: found.append(live.ask("/v1/embed/text", {"texts": ["a"] * 5})[0]))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while service.texts.admitted < 60:
            assert time.monotonic() < until
            time.sleep(0.01)
        live.server.should_exit = True
        time.sleep(0.3)
        with pytest.raises(OSError, match="refused"):
            live.ask("/healthz")  # nothing new is taken
        assert not found
        go.set()
        for thread in threads:
            thread.join()
    assert found == [200] * 12
    assert not service.ready


def test_the_command_serves_and_ends_on_a_signal(folders, tmp_path):
    words = ["serve", "--model", str(folders["model"]), "--index", str(folders["index"]), "--port", "0"]
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pairstream", *words, "--api-keys", str(tmp_path / "keys")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("PairStream serves model at http://127.0.0.1:"), process.stderr.read()
        port = int(line.split("/ (")[0].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"text": "thing"})
        headers = {"Content-Type": "application/json", "X-API-Key": "0123456789abcdef"}
        connection.request("POST", "/v1/search", body, headers)
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.loads(answer.read())["hits"]
        connection.close()
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=30)[1]
        assert process.returncode in (0, -signal.SIGTERM), err  # uvicorn hands the signal on once it is done
        assert err == ""
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_one_clear_error(folders, capsys):
    from pairstream.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(folders["model"]), "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in error
    assert "choose another --port" in error
    assert "Traceback" not in error
    with pytest.raises(OSError, match=r"cannot listen on 203\.0\.113\.7"):
        bind("203.0.113.7", 0)
