"""`pairstream data list`."""

from __future__ import annotations

import json

import pytest

from data.cli import main
from data.download.presets import PRESETS
from data.listing import SOURCES
from data.prepare import ADAPTERS


def test_every_set_is_listed_with_all_that_one_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    by_command = {
        command: {row["name"] for row in rows if command in row["command"]}
        for command in ("prepare", "download")
    }
    assert by_command["prepare"] == set(ADAPTERS)
    assert by_command["download"] == {*PRESETS, "csv"}
    assert all(set(row) == {"name", "command", "size", "licence", "source", "purpose"} for row in rows)
    assert all(row.values() and all(row.values()) for row in rows)


def test_a_pipe_gets_a_line_per_set(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [source.name for source in SOURCES]
    for line, source in zip(lines, SOURCES, strict=True):
        assert all(text in line for text in (source.size, source.licence, source.source, source.purpose))
        assert f"{source.name} " in line  # no name runs into the next column
        assert f"{source.command} " in line
    assert max(map(len, lines)) < 250


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert "what it is" in lines[0]
