"""The quickstart's whole path, with a few pictures and steps."""

from __future__ import annotations

import json
import subprocess
import sys


def test_the_whole_path_from_pictures_to_numbers(tmp_path):
    # In an empty folder: nothing of an earlier quickstart may be needed.
    command = [sys.executable, "-m", "pairstream", "quickstart", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("data prepare scenes", "pretrain", "finetune", "retrieval eval"):
        assert f"$ pairstream {stage}" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    retrieval = metrics["retrieval"]
    assert retrieval["pictures"] == 24
    assert abs(retrieval["chance"] - 1 / 24) < 1e-6
    for direction in ("image_to_text", "text_to_image"):
        assert 0 <= retrieval[direction]["recall@1"] <= retrieval[direction]["recall@10"] <= 1
    assert {"cider", "baseline_cider"} <= metrics["captioning"].keys()
    assert {"accuracy", "majority_baseline", "question_only_baseline"} <= metrics["vqa"].keys()
    stages = {name: seconds for name, seconds in metrics["seconds"].items() if name != "total"}
    assert list(stages) == ["shards", "held out", "pretrain", "caption", "vqa", "retrieval"]
    page = (tmp_path / "report.html").read_text()
    assert "Questions and answers" in page
    assert page.count("data:image/jpeg") > 10
