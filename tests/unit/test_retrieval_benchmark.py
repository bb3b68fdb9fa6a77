"""The last line of benchmarks/retrieval.py: one JSON object with the figures that are asked for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "retrieval.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it, and threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    spec = importlib.util.spec_from_file_location("retrieval_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quick", [False, True])
def test_the_figures_stand_in_the_last_line(script, monkeypatch, capsys, quick):
    scored = {"cpu_ratio": 12.0, "numbers_equal": True}
    monkeypatch.setattr(script, "compare_once", lambda images: scored)
    monkeypatch.setattr(script, "compare_pairs", lambda images, pairs: {**scored, "pairs": pairs})
    monkeypatch.setattr(script, "classifier_build", lambda pairs, classes: {"ratio": 6.0})
    monkeypatch.setattr(
        script, "in_child", lambda who, images: {"cpu_s": 1e-7 * images**2, "extra_mb": images / 400}
    )
    index = {"recall@10": 0.97, "build_s": 29.0, "speedup_over_flat": 5.0, "bytes_per_vector": 157}
    monkeypatch.setattr(script, "index_figures", lambda small: {**index, "quick": small})
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *["--quick"] * quick])
    script.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["score_1k_5k" if quick else "score_5k_25k"] == scored
    assert result["classifier_build_ratio"] == 6.0
    assert result["slope"] == 2.0
    assert result["index_30k" if quick else "index_200k"] == {**index, "quick": quick}
    assert result.get("score_20k_100k_extra_mb") == (None if quick else 50.0)


@pytest.mark.parity
def test_both_sides_are_scored_alike(script):
    # The peer runs in its own code, so the comparison that a benchmark prints is one of equals.
    rows = script.embeddings(60, dim=16)
    assert script.largest_difference(script.ours(*rows), script.theirs(*rows)) < 2e-6
