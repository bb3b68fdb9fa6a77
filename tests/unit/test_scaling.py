"""A power law through several runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from pairstream.cli import run_stage
from pretrain.cli import main
from pretrain.scaling import fit_power_law


def test_the_law_that_made_the_points_is_found():
    x = np.geomspace(1e6, 1e9, 8)
    law = fit_power_law(x, 0.8 + 120 * x**-0.35)
    assert law.floor == pytest.approx(0.8, rel=1e-3)
    assert law.exponent == pytest.approx(0.35, rel=1e-3)
    assert law.scale == pytest.approx(120, rel=2e-2)
    assert law.spread == pytest.approx((0.35, 0.35), rel=1e-2)
    assert law(1e10) == pytest.approx(0.8 + 120 * 1e10**-0.35, rel=1e-3)


def test_noise_shows_in_the_spread_and_without_a_floor_the_line_is_straight():
    rng = np.random.default_rng(0)
    x = np.geomspace(1e6, 1e9, 6)
    y = 30 * x**-0.2
    assert fit_power_law(x, y, floor=False).exponent == pytest.approx(0.2)
    noisy = fit_power_law(x, y * rng.lognormal(0, 0.05, 6), floor=False)
    assert noisy.spread is not None
    assert noisy.spread[0] < noisy.exponent < noisy.spread[1]
    two = fit_power_law(x[:2], y[:2])
    assert (two.floor, two.spread) == (0.0, None)
    assert two.exponent == pytest.approx(0.2)


def test_a_curve_that_has_flattened_gets_a_floor_near_its_end():
    law = fit_power_law([1, 10, 100, 1000, 10000], [3.0, 1.2, 1.02, 1.002, 1.0002])
    assert 0.9 < law.floor < 1.0002


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1.0], [2.0], "at least two different x"),
        ([1.0, 1.0], [2.0, 3.0], "at least two different x"),
        ([1.0, 2.0], [2.0], "at least two different x"),
        ([1.0, 2.0], [2.0, 0.0], "positive finite numbers"),
        ([0.0, 2.0], [2.0, 1.0], "positive finite numbers"),
        ([1.0, float("inf")], [2.0, 1.0], "positive finite numbers"),
    ],
)
def test_points_without_a_law(x, y, said):
    with pytest.raises(ValueError, match=said):
        fit_power_law(x, y)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Five run folders whose losses follow 1 + 50 x^-0.3, noise of single lines aside."""
    folders = []
    for number, samples in enumerate((1e4, 1e5, 1e6, 1e7, 1e8)):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        last = 1 + 50 * samples**-0.3
        lines = [{"step": step, "samples_seen": samples * step / 100, "loss": 9.0} for step in range(1, 91)]
        lines += [
            {
                "step": step,
                "samples_seen": samples * step / 100,
                "loss": last + (0.1 if step % 2 else -0.1),
                "flops_per_pair": 1e9,
            }
            for step in range(91, 101)
        ]
        recall = {"image_to_text/recall@1": 1 - 5 * samples**-0.2}
        lines += [{"step": 100, "samples_seen": samples, "evaluation": recall}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        recipe = {"batch_size": 256, "loss": {"kind": "info_nce"}}
        (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "metrics.json").write_text(json.dumps({"parameters": 10**number, "pairs": 1000}))
        folders.append(str(folder))
    return folders


def test_the_command_fits_the_runs(runs, tmp_path, capsys):
    assert run_stage(main, ["scaling", *reversed(runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "drawn on to ten times the largest, 1e+09: 1.09" in said
    content = json.loads((tmp_path / "out/scaling.json").read_text())
    assert content["exponent"] == pytest.approx(0.3, rel=1e-2)
    assert content["floor"] == pytest.approx(1.0, rel=1e-2)
    assert [run["run"] for run in content["runs"]] == [f"run-{number}" for number in range(5)]
    assert [run["x"] for run in content["runs"]] == [1e4, 1e5, 1e6, 1e7, 1e8]
    assert "<svg" in (tmp_path / "out/scaling.svg").read_text()


@pytest.mark.parametrize(("x", "first"), [("flops", 1e13), ("parameters", 1.0)])
def test_other_axes_and_an_evaluations_number(runs, tmp_path, x, first):
    words = ["--x", x, "--y", "image_to_text/recall@1", "--out", str(tmp_path / "out")]
    assert run_stage(main, ["scaling", *runs, *words]) == 0
    content = json.loads((tmp_path / "out/scaling.json").read_text())
    assert content["runs"][0]["x"] == first
    assert content["runs"][0]["y"] == pytest.approx(5 * 1e4**-0.2)
    assert content["exponent"] == pytest.approx(0.2, rel=2e-2)


def test_runs_that_cannot_be_fitted(runs, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert run_stage(main, ["scaling", *words]) == 2
        return capsys.readouterr().err

    assert "no log.jsonl there" in refused(str(tmp_path), runs[0])
    assert "no evaluation has 'recall': expected 'loss' or one of image_to_text/recall@1" in refused(
        *runs, "--y", "recall"
    )
    (tmp_path / "run-0/metrics.json").unlink()
    assert "does not have 'parameters'" in refused(*runs, "--x", "parameters")
    other = {"batch_size": 512, "loss": {"kind": "info_nce"}}
    (tmp_path / "run-1/recipe.resolved.yaml").write_text(yaml.safe_dump(other))
    assert "losses that cannot be compared (batch size and kind:" in refused(*runs)
    (tmp_path / "run-2/log.jsonl").write_text(json.dumps({"step": 1, "samples_seen": 9, "loss": 2.0}) + "\n")
    assert "no line has flops_per_pair" in refused(runs[2], runs[3], "--x", "flops")
    (tmp_path / "run-2/log.jsonl").write_text("")
    assert "no line with a loss" in refused(runs[2], runs[3])
