"""The models that write, with the oldest transformers that pyproject.toml allows; `make oldest` sets it up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
OLDEST = Path(os.environ.get("PAIRSTREAM_OLDEST", ROOT / ".oldest"))
TESTS = ("unit/test_connectors.py", "unit/test_task_model.py", "unit/test_rows.py", "unit/test_predict.py")

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def run(*words: str) -> str:
    """A Python process that imports the oldest transformers, and PairStream from here."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDEST), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1200)
def test_writing_with_the_oldest_transformers():
    if not OLDEST.is_dir():
        pytest.skip(f"no {OLDEST}: `make oldest` sets it up")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    floor = re.search(r"transformers>=([\d.]+)", " ".join(extras["finetune"]))
    assert floor is not None
    version = run("-c", "import transformers; print(transformers.__version__)").strip()
    wanted = floor[1].split(".")
    assert version.split(".") == [*wanted, *["0"] * (3 - len(wanted))]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS))
    assert re.search(r"\d+ passed", said)
    assert "skipped" not in said
