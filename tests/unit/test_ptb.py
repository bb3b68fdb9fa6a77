"""The tokeniser beside the recorded output of Stanford's (CoreNLP 3.4.1, -preserveLines -lowerCase)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.ptb import tokenize

RECORDED = Path(__file__).parent.parent / "fixtures" / "ptb_tokens.tsv"
# Lines of the recording that we know to differ: feet and inches, 6p.m. without a space, years that open a quotation.
KNOWN = ("6'2", "£5", "3.four", "6p.m.", "'99, the class of '08")


def test_agrees_with_the_recorded_java_output_except_where_we_know():
    lines = [line.split("\t") for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 220
    different = [caption for caption, tokens in lines if tokenize(caption) != tokens]
    assert all(any(known in caption for known in KNOWN) for caption in different), different
    assert len(different) == len(KNOWN) + 1  # feet and inches twice


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")
def test_at_least_999_of_1000_real_lines_as_java(shared: Path, tmp_path: Path):
    """All Flickr8k captions and all VQAv2 questions and answers of the small set, through the Java program itself."""
    evaluation = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    text = (shared / "flickr8k" / "Flickr8k.token.txt").read_text(encoding="utf-8")
    lines = [line.split("\t")[1].strip() for line in text.splitlines()]
    for split in ("train", "val"):
        folder = shared / "vqav2_small"
        asked = json.loads((folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json").read_text())
        answered = json.loads((folder / f"v2_mscoco_{split}2014_annotations.json").read_text())
        lines += [question["question"] for question in asked["questions"]]
        lines += [answer["answer"] for row in answered["annotations"] for answer in row["answers"]]
    (tmp_path / "lines.txt").write_text(
        "\n".join(line.replace("\n", " ") for line in lines), encoding="utf-8"
    )
    jar = Path(evaluation.__file__).parent / evaluation.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", str(tmp_path / "lines.txt")],
        capture_output=True,
        check=True,
    )
    rows = done.stdout.decode("utf-8").split("\n")[: len(lines)]
    expected = [
        " ".join(word for word in row.rstrip().split(" ") if word not in evaluation.PUNCTUATIONS)
        for row in rows
    ]
    equal = sum(tokenize(line) == tokens for line, tokens in zip(lines, expected, strict=True))
    assert equal / len(lines) > 0.9995


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A DOG.", "a dog"),
        ("It's his; isn't it?", "it 's his is n't it"),
        ('a "big" tub/shower (white)', "a big tub/shower -lrb- white -rrb-"),
        ("ground.A man", "ground.a man"),
        ("", ""),
        ("...", ""),
        ("two\nlines", "two lines"),
        ("café — naïve", "café naïve"),
    ],
)
def test_cases(caption: str, tokens: str):
    assert tokenize(caption) == tokens
