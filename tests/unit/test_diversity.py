"""Distinct-n, vocabulary and CHAIR by hand; METEOR and SPICE say why they are absent."""

from __future__ import annotations

import shutil
import sys

import pytest

from finetune import java_metrics
from finetune.diversity import chair, diversity


def test_diversity_by_hand():
    result = diversity(["a dog runs", "a dog sits", "a dog runs", ""])
    assert (result["distinct_captions"], result["vocabulary"]) == (3, 4)
    assert result["mean_length"] == 9 / 4
    assert result["distinct_1"] == pytest.approx(4 / 9)
    assert result["distinct_2"] == pytest.approx(3 / 6)
    assert diversity([""])["distinct_1"] == 0
    with pytest.raises(ValueError, match="no captions"):
        diversity([])


def test_chair_by_hand():
    names = {
        "dog": "dog",
        "puppy": "dog",
        "hot dog": "hot dog",
        "bus": "bus",
        "person": "person",
        "man": "person",
    }
    result = chair(
        ["a man eats a hot dog", "two puppies and three buses", "a dog and a puppy on a bus", "nothing here"],
        [["person", "hot dog"], ["bus"], ["bus", "man"], ["dog"]],
        names,
    )
    # Mentions: man, hot dog | buses | dog, puppy, bus. Wrong: dog and puppy. Puppies are not understood: no -ies.
    assert result["mentions"] == 6
    assert result["chair_i"] == pytest.approx(2 / 6)
    assert result["chair_s"] == pytest.approx(1 / 4)
    assert result["hallucinated"] == {"dog": 2}
    assert result["recall"] == pytest.approx(4 / 6)
    assert chair(["a cat"], [[]], ["dog"])["chair_i"] == 0
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        chair(["a", "b"], [[]], ["dog"])
    with pytest.raises(ValueError, match="at least one caption and one object name"):
        chair(["a"], [[]], [])


def test_java_metrics_say_why_they_are_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scores, absent = java_metrics.java_metrics(["a dog"], [["a dog"]])
    assert scores == {}
    assert absent == dict.fromkeys(("METEOR", "SPICE"), "no Java runtime (`java`) on the path")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(java_metrics, "package", lambda: None)
    assert "pycocoevalcap is not installed" in java_metrics.java_metrics(["a"], [["a"]])[1]["METEOR"]
    monkeypatch.setattr(java_metrics, "package", lambda: tmp_path)
    assert "stanford-corenlp" in java_metrics.java_metrics(["a"], [["a"]])[1]["SPICE"]
    library = tmp_path / "spice/lib"
    library.mkdir(parents=True)
    (library / "stanford-corenlp-3.6.0.jar").write_bytes(b"")  # the program is there, its models are not
    said = java_metrics.java_metrics(["a"], [["a"]], ["SPICE"])[1]["SPICE"]
    assert said.startswith("stanford-corenlp-3.6.0-models.jar is not in ")
    assert "get_stanford_models.py downloads it" in said


def test_a_java_program_that_fails_is_no_error(monkeypatch):
    def fails(candidates, references):
        raise ValueError("it ended without an answer")

    monkeypatch.setattr(java_metrics, "missing", lambda name: None)
    monkeypatch.setattr(java_metrics, "meteor", fails)
    scores, absent = java_metrics.java_metrics(["a"], [["a"]], ["METEOR"])
    assert (scores, absent) == ({}, {"METEOR": "the Java program failed: it ended without an answer"})


def test_what_a_program_complains_of_is_told(tmp_path):
    program = [sys.executable, "-c", "import sys; sys.exit('no room for 2 GB\\nand more')"]
    with (
        pytest.raises(ValueError, match=r"it ended without an answer \(no room for 2 GB\)"),
        java_metrics.started(program, tmp_path) as ask,
    ):
        ask("a line")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")
def test_meteor_is_that_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.meteor.meteor import Meteor

    candidates, references = (
        ["a dog runs", "two cats", ""],
        [["a dog running", "the dog"], ["two cats sit"], ["a cow"]],
    )
    ours = java_metrics.java_metrics(candidates, references, ["METEOR"])[0]["METEOR"]
    program = Meteor()
    theirs = program.compute_score(
        dict(enumerate(references)), {n: [text] for n, text in enumerate(candidates)}
    )[0]
    for stream in (program.meteor_p.stdout, program.meteor_p.stderr):
        stream.close()
    assert ours == pytest.approx(theirs, abs=1e-9)
