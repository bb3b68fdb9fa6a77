"""The guides: commands parse, recipes are valid, programs import what there is, links lead somewhere."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro
import yaml

import pairstream.recipe
from pairstream.cli import STAGES
from pairstream.cli import main as pairstream_main
from pairstream.recipe import find_recipe, validate

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"
    ),  # the log tells of its day
]
YOURS = {
    "RECIPE": "",
    "mine": "",
    "my.yaml": "",
    "flickr8k.yaml": "",
}  # recipes that a reader has of their own
USUAL = {
    "data": "curate_web",
    "pretrain": "laion400m_vit_b32",
    "finetune": "scenes_caption",
    "retrieval": "zero_shot",
}  # in their place


class Block(NamedTuple):
    """A fenced block: its guide, the line it begins at, its language, and what it holds."""

    guide: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.guide}:{self.line}"


def fenced(path: Path) -> Iterator[Block]:
    """All fenced blocks of a guide."""
    start, language, lines = 0, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif start:
            yield Block(path.name, start, language, "\n".join(lines))
            start = 0
        else:
            start, language, lines = number, line.removeprefix("```").strip(), []
    assert not start, f"{path.name}:{start}: a block without an end"


BLOCKS = [block for path in GUIDES for block in fenced(path)]
PROSE = {
    path.name: re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE) for path in GUIDES
}


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":  # what has no prompt was printed
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        if "[--" in line or line.startswith("#"):  # a synopsis, or a remark
            continue
        yield shlex.split(line, comments=True)


def ours(words: list[str]) -> list[str] | None:
    """What follows `pairstream` in a command, however it is launched; None when it is another one's."""
    for number, word in enumerate(words):
        if word == "pairstream" and (number == 0 or words[number - 1] == "-m"):
            return words[number + 1 :]
        if word == "-m" and words[number + 1] in STAGES:
            return words[number + 1 :]
    return None


def launched(content: Any) -> Iterator[list[str]]:
    """Commands that are lists in YAML, as containers have them."""
    if isinstance(content, dict):
        for value in content.values():
            yield from launched(value)
    elif isinstance(content, list):
        if "-m" in content:
            yield [str(word) for word in content]
        for value in content:
            yield from launched(value)


def headers() -> Iterator[tuple[str, list[str]]]:
    """Commands in the remarks that recipes begin with."""
    for path in sorted(ROOT.glob("*/recipes/*.yaml")):
        head = path.read_text(encoding="utf-8").split("\n\n")[0].replace("\\\n#", " ")
        for number, line in enumerate(
            re.findall(r"^#\s+((?:pairstream|accelerate|torchrun) .+)$", head, re.MULTILINE)
        ):
            found = ours(
                shlex.split(re.split(r"\s{2,}\(", line)[0], comments=True)
            )  # less a remark in brackets
            if found is not None:
                yield f"{path.parent.parent.name}/{path.name}-{number}", found


SHELL = [
    pytest.param(words, id=f"{block}-{number}")
    for block in BLOCKS
    if block.language in ("", "bash", "console")
    for number, found in enumerate(commands(block))
    if (words := ours(found)) is not None
] + [
    pytest.param(words, id=f"{block}-{number}")
    for block in BLOCKS
    if block.language == "yaml" and "apiVersion" in block.text
    for number, found in enumerate(launched(list(yaml.safe_load_all(block.text))))
    if (words := ours(found)) is not None
]
SHELL += [pytest.param(words, id=name) for name, words in headers()]


class Parsed(BaseException):
    """A command was understood to its end, and would begin to work now."""


def begin(*_: Any, **__: Any) -> None:
    raise Parsed


@pytest.fixture
def parse(monkeypatch):
    """`parse(words)`: read a command with its own parser, but do nothing."""
    cli, subcommands = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def idle(function: Any) -> Any:
        if not isinstance(function, types.FunctionType):
            return function

        @functools.wraps(function)
        def parsed(*words: Any, **options: Any) -> None:
            if function.__name__ == "suite":
                find("retrieval", words[0])
            raise Parsed

        return parsed

    def find(stage: str, name: str) -> Path:
        return find_recipe(stage, USUAL[stage] if name in YOURS else name)

    monkeypatch.setattr(tyro, "cli", lambda kind, **options: cli(idle(kind), **options))
    monkeypatch.setattr(
        tyro.extras,
        "subcommand_cli_from_dict",
        lambda known, **options: subcommands({name: idle(each) for name, each in known.items()}, **options),
    )
    monkeypatch.setattr(pairstream.recipe, "find_recipe", find)
    for stage, name in (("pretrain", "Trainer"), ("finetune", "Finetuner")):
        monkeypatch.setitem(sys.modules, f"{stage}.trainer", types.SimpleNamespace(**{name: begin}))  # pyright: ignore
    for module, name in (
        ("pretrain.plan", "make_plan"),
        ("finetune.own_data", "check_model"),
        ("data.curate.command", "run"),
    ):
        monkeypatch.setattr(importlib.import_module(module), name, begin)
    return pairstream_main


@pytest.mark.parametrize("words", SHELL)
def test_commands_parse(parse, words, capsys):
    try:
        code = parse(words)
    except Parsed:
        return
    except SystemExit as left:
        code = left.code
        if code == 0 and "--help" in words:
            return
    pytest.fail(f"pairstream {shlex.join(words)}: ended with {code}: {capsys.readouterr().err}")


def test_a_command_that_nobody_knows_is_found(parse):
    with pytest.raises(SystemExit):
        parse(["retrieval", "index", "--embeddings", "rows", "--out", "index", "--recal", "0.9"])
    assert parse(["pretrain", "no_such_recipe"]) == 2
    assert parse(["pretrain", "mine", "--optim.kind", "adam"]) == 2


def known_words(stage: str) -> set[str]:
    """The commands and recipes of a stage."""
    module: Any = importlib.import_module(STAGES[stage][0].split(":")[0])
    names = {*getattr(module, "COMMANDS", {}), *getattr(module, "OWN", {})}
    recipes = importlib.import_module(stage.replace("export", "serve.export"))
    folders = [Path(place) / "recipes" for place in recipes.__path__] if hasattr(recipes, "__path__") else []
    return names | {path.stem for folder in folders for path in folder.glob("*.yaml")}


@pytest.mark.parametrize("guide", PROSE)
def test_commands_in_the_text_are_there(guide):
    for said in re.findall(r"`pairstream ([^`]+)`", PROSE[guide]):
        stage, *rest = said.replace("\\|", "|").split()
        assert stage in STAGES or stage == "STAGE", said
        if not rest or rest[0].startswith("-") or rest[0].isupper():
            continue
        assert set(rest[0].split("|")) <= known_words(stage), said


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=map(str, PYTHON))
def test_programs_import_what_there_is(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{block}: no {name.name} in {node.module}"


def parts(text: str) -> Iterator[dict[str, Any]]:
    """A block's keys one by one: some show the same key several times, as alternatives."""
    for part in re.split(r"^(?=\w)", text, flags=re.MULTILINE):
        if part.strip():
            yield yaml.safe_load(part)


RECIPES = [block for block in BLOCKS if block.language == "yaml" and "apiVersion" not in block.text]


@pytest.mark.parametrize("block", RECIPES, ids=map(str, RECIPES))
def test_recipes_are_valid(block):
    from data.curate.recipe import CurateRecipe
    from pretrain.recipe import PretrainRecipe
    from retrieval.recipe import SuiteRecipe

    if block.guide == "curation.md":
        whole = {"shards": "web", "out": "kept"}
        for part in parts(block.text):
            whole |= part
        validate(CurateRecipe, whole, str(block))
        return
    coca = {"embed_dim": 256, "text_tower": {"kind": "transformer", "width": 256}, "decoder": {}}
    for part in parts(block.text):
        if "tasks" in part:
            validate(SuiteRecipe, {"out": "suite", **part}, str(block))
            continue
        run = {
            "run": "runs/x",
            "data": {"train": "shards"},
            "steps": 100_000,
            "model": {"kind": "towers", **coca},
        }
        validate(PretrainRecipe, {**run, **part}, str(block))


def slug(heading: str) -> str:
    """The anchor that hosts of Markdown give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize(
    "path", [*GUIDES, ROOT / "docs" / "LOG.md", ROOT / "CHANGELOG.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`]*`", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        place, _, anchor = target.partition("#")
        found = (path.parent / place).resolve() if place else path
        assert found.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{path.name}: {target} has no such heading"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_scripts_and_targets_are_there(path):
    text = path.read_text(encoding="utf-8")
    for script, options in re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, f"{path.name}: {script} has no {option}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    asked = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert asked <= targets, f"{path.name}: make has no {asked - targets}"
