"""The run folder: what it refuses, and a log that survives a kill."""

from __future__ import annotations

import json
import math

import pytest

from pairstream.run import RunFolder, finite


def test_a_folder_that_holds_a_run_is_refused_resumed_or_replaced(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.log({"step": 1})
    with pytest.raises(FileExistsError, match=r"already holds a run. Continue it with --resume, replace it"):
        RunFolder(tmp_path / "run")
    assert RunFolder(tmp_path / "run", resume=True).read_log() == [{"step": 1}]
    assert RunFolder(tmp_path / "run", overwrite=True).read_log() == []


def test_checkpoints_without_a_log_are_a_run_too(tmp_path):
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        RunFolder(tmp_path / "run")
    RunFolder(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/checkpoints").exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_line_cut_by_a_kill_is_left_out_and_rewinding_drops_later_steps(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step})
    with folder.log_path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in folder.read_log()] == [1, 2, 3]
    folder.rewind_log(2)
    folder.log({"step": 3})
    assert [json.loads(line)["step"] for line in folder.log_path.read_text().splitlines()] == [1, 2, 3]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "loss": math.nan, "by": {"a": [math.inf, 1.5]}})
    assert folder.read_log() == [{"step": 1, "loss": None, "by": {"a": [None, 1.5]}}]
    folder.write_metrics({"x": -math.inf})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"x": None}
    assert finite((1, math.nan)) == [1, None]


def test_other_ranks_write_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=False)
    folder.log({"step": 1})
    folder.write_metrics({})
    folder.rewind_log(0)
    assert not (tmp_path / "run").exists()
