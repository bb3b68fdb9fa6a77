"""The command line: quick, without torch, one message for an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pairstream
from pairstream.cli import STAGES, main, run_stage

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_stage_and_version_is_the_package_s(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {stage} " in said for stage in STAGES)
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{pairstream.__version__}\n")


def test_an_unknown_stage_names_the_nearest(capsys):
    assert main(["pretrian"]) == 2
    assert "no stage 'pretrian': expected one of " in (said := capsys.readouterr().err)
    assert "did you mean 'pretrain'?" in said


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, ImportError, OSError])
def test_a_users_error_is_one_message_and_exit_code_two(error, capsys):
    def fails(argv):
        raise error("expected this, got that")

    assert run_stage(fails, []) == 2
    assert capsys.readouterr().err == "error: expected this, got that\n"
    with pytest.raises(error, match="expected this"):
        run_stage(fails, ["--debug"])


def test_our_own_faults_are_not_hidden():
    def broken(argv):
        raise AssertionError("an invariant")

    with pytest.raises(AssertionError, match="an invariant"):
        run_stage(broken, [])


def test_exit_codes_and_arguments_pass_through(capsys):
    assert run_stage(lambda argv: len(argv), ["a", "--debug", "b"]) == 2
    assert run_stage(lambda argv: None, []) == 0

    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_stage(interrupted, []) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_has_gone_ends_it_quietly():
    """As in `pairstream data list | head`, whose `head` may end first."""
    code = "import sys; from pairstream.cli import run_stage; sys.exit(run_stage(lambda argv: print('x' * %d), []))"
    for size in (10, 1_000_000):  # met while the stage prints, and only when what it printed is handed over
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-c", code % size],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_connection_is_no_reader_that_has_gone(capsys):
    def broken(argv):
        raise BrokenPipeError("the connection to the cluster broke")

    assert run_stage(broken, []) == 2
    assert capsys.readouterr().err == "error: the connection to the cluster broke\n"


PROBE = """
import json, sys
from pairstream.cli import main
codes = [main(["--help"])]
heavy = {"torch", "open_clip", "transformers", "faiss", "accelerate"}
found = {"--help": sorted(heavy & set(sys.modules))}
import importlib
for name in MODULES:
    importlib.import_module(name)
    found[name] = sorted(heavy & set(sys.modules))
codes.append(main(["pretrain", "--help"]))
found["pretrain --help"] = sorted(heavy & set(sys.modules))
print(json.dumps([codes, found]))
"""


def test_help_and_configuration_import_no_torch():
    stages = [stage for stage in ("pretrain", "finetune") if (ROOT / stage / "recipe.py").is_file()]
    modules = [f"{stage}.recipe" for stage in stages] + [
        "pretrain.cli",
        "pairstream.command",
        "pairstream.run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("MODULES", repr(modules))],
        capture_output=True,
        text=True,
        check=True,
    )
    codes, found = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0]
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


def test_python_m_pretrain_help_and_a_shadowed_package(tmp_path):
    """`python -m` puts the working folder first, where a file of that name hides the package."""

    def start(folder: Path, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False
        )

    (tmp_path / "data").mkdir()  # a folder of shards beside the package: allowed
    done = start(tmp_path, "pretrain", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: pairstream pretrain RECIPE" in done.stdout
    (tmp_path / "data" / "__init__.py").touch()
    for words in (("pretrain", "scenes_cpu"), ("pairstream", "pretrain", "scenes_cpu")):
        done = start(tmp_path, *words)
        assert done.returncode == 2
        assert "PairStream's package 'data' is shadowed: expected it in" in done.stderr
        assert "Traceback" not in done.stderr
