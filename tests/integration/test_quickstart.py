"""The quickstart's whole path, with a few pictures and steps, and what the README shows after it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a quickstart, run where nothing of an earlier one is, and how it went."""
    folder = tmp_path_factory.mktemp("quickstart")
    out = folder / "runs" / "quickstart"
    command = [sys.executable, "-m", "pairstream", "quickstart", "--tiny", "--out", str(out)]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder)


def test_the_whole_path_from_pictures_to_numbers(quickstart):
    out, done = quickstart
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("data prepare scenes", "pretrain", "finetune", "retrieval eval"):
        assert f"$ pairstream {stage}" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    retrieval = metrics["retrieval"]
    assert retrieval["pictures"] == 24
    assert abs(retrieval["chance"] - 1 / 24) < 1e-6
    for direction in ("image_to_text", "text_to_image"):
        assert 0 <= retrieval[direction]["recall@1"] <= retrieval[direction]["recall@10"] <= 1
    assert {"cider", "baseline_cider"} <= metrics["captioning"].keys()
    assert {"accuracy", "majority_baseline", "question_only_baseline"} <= metrics["vqa"].keys()
    stages = {name: seconds for name, seconds in metrics["seconds"].items() if name != "total"}
    assert list(stages) == ["shards", "held out", "pretrain", "caption", "vqa", "retrieval"]
    page = (out / "report.html").read_text()
    assert "Questions and answers" in page
    assert page.count("data:image/jpeg") > 10


def test_the_example_of_the_readme_runs_after_it(quickstart):
    out, done = quickstart
    assert done.returncode == 0, done.stderr[-2000:]
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=out.parents[1], timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    scores, answer = ran.stdout.splitlines()
    assert len(json.loads(scores)) == 3
    assert re.fullmatch(r"\[['\"].*['\"]\]", answer)
