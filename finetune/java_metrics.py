"""METEOR and SPICE, which exist only as Java programs: through pycocoevalcap, where it and Java are there.

Neither is needed for the other metrics. Where one cannot run, the result says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

JARS = {
    "METEOR": ("meteor/meteor-1.5.jar",),
    # The second holds the models of the first, which would otherwise fail with a page of Java.
    "SPICE": ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar"),
}


def java_metrics(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    wanted: Sequence[str] = ("METEOR", "SPICE"),
) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR and SPICE of tokenised texts.

    Args:
        candidates: One text for each image.
        references: The references of each image.
        wanted: Which of the two.

    Returns:
        The scores that could be had, and for each other one the reason.
    """
    scores: dict[str, float] = {}
    absent: dict[str, str] = {}
    runs = {"METEOR": meteor, "SPICE": spice}
    for name in wanted:
        reason = missing(name)
        if reason is None:
            try:
                scores[name] = runs[name](candidates, references)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                reason = f"the Java program failed: {error}"
        if reason is not None:
            absent[name] = reason
    return scores, absent


def missing(name: str) -> str | None:
    """Why a metric cannot run here; None when it can."""
    if shutil.which("java") is None:
        return "no Java runtime (`java`) on the path"
    folder = package()
    if folder is None:
        return "the package pycocoevalcap is not installed (pip install pycocoevalcap)"
    for jar in (folder / place for place in JARS[name]):
        if not jar.is_file():
            hint = "; its get_stanford_models.py downloads it (about 400 MB)" if name == "SPICE" else ""
            return f"{jar.name} is not in {jar.parent}{hint}"
    return None


def package() -> Path | None:
    """The folder of pycocoevalcap, found without importing it."""
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of a set.

    Raises:
        OSError, ValueError: The program cannot be started, or says something that is no number.

    Reference:
        Denkowski and Lavie 2014, with coco-caption's options (English, normalised).
    """
    folder = package()
    assert folder is not None, "missing() comes first"
    # The locale decides whether the program writes 0.5 or 0,5; and a text may not hold its separator.
    command = ["java", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Xmx2G"]
    command += ["-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with started(command, folder / "meteor") as ask:
        statistics = []
        for candidate, row in zip(candidates, references, strict=True):
            texts = [text.replace("|||", "").replace("  ", " ") for text in (*row, candidate)]
            statistics.append(ask(f"SCORE ||| {' ||| '.join(texts)}"))
        first = ask(f"EVAL ||| {' ||| '.join(statistics)}")
        numbers = [first, *(ask(None) for _ in candidates)]  # one for each image, then the whole set's
    return float(numbers[-1])


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[Any]:
    """A program that answers each line with a line; what it complains of is told when it gives none."""
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
        ) as program,
    ):
        assert program.stdin is not None and program.stdout is not None  # noqa: PT018

        def ask(line: str | None) -> str:
            assert program.stdin is not None and program.stdout is not None  # noqa: PT018
            with contextlib.suppress(BrokenPipeError):  # it has ended: the answer below is missing as well
                if line is not None:
                    program.stdin.write(" ".join(line.splitlines()) + "\n")
                    program.stdin.flush()
            answer = program.stdout.readline().strip()
            if not answer:
                complaints.seek(0)
                said = complaints.read(300).decode("utf-8", "replace").strip().partition("\n")[0]
                raise ValueError(f"it ended without an answer{f' ({said})' if said else ''}")
            return answer

        try:
            yield ask
        finally:
            program.kill()
            with contextlib.suppress(BrokenPipeError):
                program.stdin.close()


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SPICE of a set, through pycocoevalcap's own wrapper.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: The program fails.
    """
    from pycocoevalcap.spice.spice import Spice

    truth: Mapping[int, list[str]] = {number: list(row) for number, row in enumerate(references)}
    result = {number: [text] for number, text in enumerate(candidates)}
    return float(Spice().compute_score(truth, result)[0])
