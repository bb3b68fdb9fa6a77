"""Files and folders are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pairstream.atomic import new_folder, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert names(path.parent) == ["file.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("x")
        assert not (tmp_path / "made").exists()
        assert folder.name.startswith(".tmp-")
    assert names(tmp_path) == ["made"]
    with new_folder(tmp_path / "made") as folder:
        (folder / "other").write_text("y")
        assert names(tmp_path / "made") == ["inside"]
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["other"]


def test_a_folder_whose_filling_fails_does_not_appear(tmp_path):
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="absent"), new_folder(tmp_path / "made") as folder:
            (folder / "absent" / "file").write_text("x")
        assert names(tmp_path) == []
