"""Measures of heatmaps by hand, gates, randomised weights, and trials on scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from explain import faithful, verify
from explain.cli import main
from explain.randomise import cascade
from explain.trials import describe, make_trials, scene_samples
from explain.verify_table import print_table


def mask(*cells: tuple[int, int]) -> torch.Tensor:
    found = torch.zeros(1, 4, 4, dtype=torch.bool)
    for row, column in cells:
        found[0, row, column] = True
    return found


def test_measures_by_hand():
    heat = torch.arange(16.0).view(1, 4, 4)
    low, high = mask((0, 0), (0, 1)), mask((3, 3))
    assert faithful.target_over_distractor(heat, high, low).tolist() == [1]
    assert faithful.target_over_distractor(heat, low, high).tolist() == [0]
    assert faithful.target_over_distractor(torch.zeros(1, 4, 4), low, high).tolist() == [0.5]
    assert faithful.pointing(heat, high).tolist() == [1]
    assert faithful.pointing(heat, low).tolist() == [0]
    assert faithful.pointing(torch.zeros(1, 4, 4), low).tolist() == [2 / 16]
    assert faithful.energy_in_box(heat, high).tolist() == [15 / 120]
    assert faithful.energy_in_box(-heat, low).tolist() == [2 / 16]


def test_spearman_is_scipys_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    one, other = torch.tensor(rng.integers(0, 4, (5, 3, 3))), torch.tensor(rng.integers(0, 4, (5, 3, 3)))
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(faithful.spearman(one, other), expected, atol=1e-12)
    flat = torch.zeros(1, 3, 3)
    assert faithful.spearman(flat, flat).tolist() == [1]
    assert faithful.spearman(flat, one[:1]).tolist() == [0]


def test_insertion_and_deletion_by_a_plain_loop(explained, pictures):
    encoder = explained["vit"]
    pixels = encoder.pixels(pictures(encoder, 1))

    class Brightness:
        encoder, reads = explained["vit"], "pooled"

        def see(self, x):
            return x[:, 0, :16].mean((1, 2)) + 2 * x[:, 1, 16:].mean((1, 2))

        def score_of(self, features, of):
            return features

    heat = torch.arange(32.0 * 32).view(1, 32, 32)
    inserted, deleted, span = faithful.insertion_deletion(Brightness(), pixels, heat, steps=4)
    fill = pixels.mean((2, 3), keepdim=True)
    curves = {True: [], False: []}
    for share in (0, 0.25, 0.5, 0.75, 1):
        for insert in curves:
            shown = heat[0] >= 1024 - 1024 * share
            shown = shown if insert else ~shown
            curves[insert].append(float(Brightness().see(torch.where(shown, pixels, fill))))
    assert float(inserted) == pytest.approx(np.trapezoid(curves[True], dx=0.25), abs=1e-5)
    assert float(deleted) == pytest.approx(np.trapezoid(curves[False], dx=0.25), abs=1e-5)
    assert float(span) == pytest.approx(curves[True][-1] - curves[True][0], abs=1e-5)


def test_the_cascade_changes_the_last_layers_first_and_the_model_never(explained):
    encoder = explained["vit"]
    before = encoder.fingerprint
    own = dict(encoder.model.visual.named_parameters())
    changed = []
    for share, other in cascade(encoder, 4):
        news = {n for n, p in other.model.visual.named_parameters() if not torch.equal(p, own[n])}
        changed.append(news)
        assert 0 < share <= 1
        assert torch.equal(other.model.token_embedding.weight, encoder.model.token_embedding.weight)
    assert encoder.fingerprint == before
    assert changed[0] < changed[1] < changed[2] < changed[3]
    assert "proj" in changed[0]
    assert "conv1.weight" not in changed[2]
    matrices = {name for name, value in own.items() if value.ndim > 1}
    assert matrices <= changed[3]


@pytest.fixture(scope="module")
def trials(explained):
    return make_trials(explained["vit"], scene_samples(60, 64, 0), 6, known=False)


def test_trials_name_what_their_masks_show(explained, trials):
    assert trials.images.shape == (12, 3, 32, 32)
    assert len(trials.texts) == 12
    assert torch.equal(trials.images[0::2], trials.images[1::2])
    assert torch.equal(trials.target[0::2], trials.distractor[1::2])
    assert not bool((trials.target & trials.distractor).any())
    assert bool((trials.boxes | ~trials.target).double().mean() > 0.99)  # masks lie in their boxes
    assert describe([{"name": "heart", "colour": "red"}] * 2) == "two red hearts"
    assert describe([{"name": "frog", "colour": "green"}]) == "a frog"  # all frogs are green


def test_rollout_fails_the_gates_whatever_the_model(explained, trials):
    encoder = explained["vit"]
    numbers = verify.measure(
        verify.PairsAsked(encoder, trials), "rollout", [each for _, each in cascade(encoder, 1)]
    )
    assert numbers["two_text_spearman"] == pytest.approx(1)
    assert numbers["target_over_distractor"] == pytest.approx(0.5)
    numbers["gain_over_random"] = 1.0
    held = {each["gate"]: each["holds"] for each in verify.judge(numbers)}
    assert not held["two_text_spearman"]
    assert not held["target_over_distractor"]


def test_a_perfect_map_passes_and_each_gate_can_fail():
    good = {
        "target_over_distractor": 0.95,
        "two_text_spearman": 0.59,
        "random_weights_spearman": -0.19,
        "gain_over_random": 0.3,
    }
    assert all(each["holds"] for each in verify.judge(good))
    bad = {
        "target_over_distractor": 0.94,
        "two_text_spearman": 0.6,
        "random_weights_spearman": -0.21,
        "gain_over_random": 0.29,
    }
    for name, value in bad.items():
        held = {each["gate"]: each["holds"] for each in verify.judge({**good, name: value})}
        assert [gate for gate, holds in held.items() if not holds] == [name]


def test_an_untrained_model_has_nothing_to_verify(explained):
    with pytest.raises(ValueError, match=r"no picture to hold heatmaps against: \d+ with two kinds"):
        make_trials(explained["vit"], scene_samples(4, 64, 0), 4)
    with pytest.raises(ValueError, match="pictures 1: expected at least 2"):
        verify.verify_encoder(explained["vit"], pictures=1)
    image, record = next(scene_samples(1, 64, 0))
    record["objects"] = [{"name": "cow"}]
    with pytest.raises(ValueError, match="objects need name, colour, box and mask"):
        make_trials(explained["vit"], [(image, record)], 1)


def test_the_command_prints_the_table_and_fails_with_the_gates(explained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("explain.trials.KNOWN", -1.0)  # this model knows nothing, and is asked nevertheless
    folder = explained["vit"].save(tmp_path / "model")
    call = ["verify", "--model", str(folder), "--pictures", "3", "--methods", "rollout", "--device", "cpu"]
    assert main([*call, "--json", str(tmp_path / "verify.json")]) == 1
    said = capsys.readouterr().out
    assert "FAIL  chefer" in said
    assert "pass  rollout, which ignores the text, fails the gates" in said
    result = json.loads((tmp_path / "verify.json").read_text())
    assert set(result["methods"]) == {"random", "chefer", "rollout"}
    assert result["trials"] == 6
    assert not result["passed"]
    assert result["completeness"]["error"] < 0.1
    found = result["methods"]
    for numbers in found.values():  # the gate is in units of the cosine, whatever the span
        gain = numbers["insertion_minus_deletion"] - found["random"]["insertion_minus_deletion"]
        assert numbers["gain_over_random"] == pytest.approx(gain)
        assert numbers["gain_of_span"] == pytest.approx(gain / numbers["span"] if numbers["span"] > 0 else 0)
    # A set on which a map that ignores the text passes proves nothing.
    result["rollout_fails"] = False
    print_table(result)
    assert "FAIL  rollout" in capsys.readouterr().out
