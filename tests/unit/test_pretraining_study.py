"""benchmarks/pretraining_study.py: which rows it makes, and the table that it makes of them."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pretrain.recipe import PretrainRecipe

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "pretraining_study.py"
SETTINGS = ["info_nce", "sigmoid", "gradcache", "lit", "distillation"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("pretraining_study", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(script, tmp_path, monkeypatch):
    """`study(*words) -> commands`: the study of a set, whose trainings write their metrics and do nothing."""

    def make(*words: str, fails: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def command(*parts: Any) -> float:
            commands.append([str(part) for part in parts])
            if parts[1] == "reinforce":
                return 7.0
            run = Path(str(parts[1])).with_suffix("")
            if run.name == fails:
                raise KeyboardInterrupt
            run.mkdir(exist_ok=True)
            evaluation = dict.fromkeys(script.RECALLS, 0.25)
            metrics = {"pairs": 6000, "samples_seen": 2048, "evaluation": evaluation}
            (run / "metrics.json").write_text(json.dumps(metrics))
            return 1.5

        monkeypatch.setattr(script, "command", command)
        places = ["--data", str(tmp_path / "shards"), "--out", str(tmp_path / "study")]
        script.main([*places, "--results", str(tmp_path / "rows.jsonl"), *words])
        return commands

    return make


def test_every_setting_is_a_recipe_that_sees_as_many_pairs(script, study, tmp_path):
    study("--seeds", "0", "--steps", "8")
    rows = script.read_rows(tmp_path / "rows.jsonl")
    assert [(row["setting"], row["seed"]) for row in rows] == [(name, 0) for name in SETTINGS]
    import yaml

    seen = {}
    for name in SETTINGS:
        content = yaml.safe_load((tmp_path / "study/flickr8k-8" / f"{name}-0.yaml").read_text())
        recipe = PretrainRecipe.model_validate(content)
        seen[name] = recipe.batch_size * recipe.steps
        assert (recipe.seed, recipe.data.crop_scale) == (0, (0.5, 1.0))
    assert set(seen.values()) == {8 * 256}
    assert content["data"]["train"] == str(tmp_path / "study/flickr8k-8/reinforced")


def test_a_row_that_is_there_is_not_made_again(script, study, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        study("--seeds", "0", "1", fails="lit-1")
    rows = tmp_path / "rows.jsonl"
    assert len(script.read_rows(rows)) == 5 + 3  # each kept as soon as its run had ended
    made = study("--seeds", "0", "1")
    assert [Path(words[1]).stem for words in made] == [
        "lit-1",
        "distillation-1",
    ]  # nor is the teacher stored anew
    assert study("--seeds", "0", "1") == []
    assert [words[1] for words in study("--seeds", "0", "--only", "sigmoid", "--name", "other")] == [
        str(tmp_path / "study/other-64/sigmoid-0.yaml")
    ]
    assert len(study("--seeds", "0", "--steps", "8")) == 5 + 1  # other steps have a teacher of their own


def test_what_the_study_refuses(script, study, capsys):
    with pytest.raises(SystemExit, match="--only clip: expected some of info_nce sigmoid gradcache lit dist"):
        study("--only", "clip")
    with pytest.raises(SystemExit, match=r"its teacher .*lit-0 is not there: run --only lit first"):
        study("--only", "distillation")
    with pytest.raises(SystemExit):
        study("--steps", "9")
    assert "--steps 9: expected a multiple of 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([])
    assert "expected --data (to run) or --table (to write the page)" in capsys.readouterr().err


def row(setting: str, seed: int, *recalls: float, name: str = "flickr8k") -> dict[str, Any]:
    names = (
        "image_to_text/recall@10",
        "text_to_image/recall@10",
        "image_to_text/recall@1",
        "text_to_image/recall@1",
    )
    told = {"set": name, "setting": setting, "seed": seed, "steps": 64, "pairs": 6000, "cpu_s": 100.0 + seed}
    return {**told, **dict(zip(names, recalls, strict=True))}


def test_intervals_are_students(script):
    """Against scipy's quantile, for every number of seeds that the table knows."""
    stats = pytest.importorskip("scipy.stats")
    for count, quantile in script.T.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, count - 1), abs=5e-4)
    values = [0.10, 0.12, 0.17]
    low, high = script.interval(values)
    half = stats.t.ppf(0.975, 2) * statistics.stdev(values) / 3**0.5
    assert (low, high) == pytest.approx((0.13 - half, 0.13 + half), abs=1e-5)
    assert script.interval([0.1]) is None


def test_the_table_lies_between_the_markers_and_pairs_by_seed(script, tmp_path):
    rows = [row("info_nce", seed, 0.1 + seed / 10, 0.1, 0.01, 0.02) for seed in range(3)]
    rows += [row("lit", seed, 0.3 + seed / 10, 0.3, 0.05, 0.06) for seed in range(3)]
    rows += [row("info_nce", 0, 0.5, 0.7, 0.1, 0.2, name="scenes_500")]
    page, results = tmp_path / "page.md", tmp_path / "rows.jsonl"
    results.write_text("".join(json.dumps(one) + "\n" for one in rows))
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    for _ in range(2):  # written again it is the same
        script.main(["--table", str(page), "--results", str(results)])
        text = page.read_text()
        assert text.startswith(f"before\n{script.BEGIN}\n`flickr8k`: 6,000 pictures, 64 steps of 256 pairs")
        assert text.endswith(f"{script.END}\nafter\n")
        assert "old" not in text
    lines = text.splitlines()
    # Every seed gains 0.2: the seeds' own spread is not in the difference.
    assert (
        "| **lit** | 3 | 0.400 [0.152, 0.648] | 0.300 [0.300, 0.300] | +0.200 [+0.200, +0.200] | 0.050 / 0.060 | 101 |"
        in (lines)
    )
    assert (
        "| **info_nce** | 1 | 0.500 | 0.700 |  | 0.100 / 0.200 | 100 |" in lines
    )  # one seed has no interval
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="expected the markers <!-- pretraining_study -->"):
        script.main(["--table", str(page), "--results", str(results)])
    page.write_text(f"{script.BEGIN}{script.END}")
    with pytest.raises(SystemExit, match="no rows yet: run the study first"):
        script.main(["--table", str(page), "--results", str(tmp_path / "none.jsonl")])
