"""Messages for the user."""

from __future__ import annotations

import errno
import json

import pytest

from pairstream.errors import message, nearest, require, require_own_packages


def test_a_full_disk_is_called_one():
    said = message(OSError(errno.ENOSPC, "No space left on device", "runs/a/model"))
    assert said.startswith(
        "the disk is full while writing runs/a/model. What was complete before is untouched"
    )
    assert message(OSError(errno.EDQUOT, "Quota exceeded")).startswith("the disk is full. ")
    assert message(OSError(errno.EACCES, "Permission denied", "x")) == "[Errno 13] Permission denied: 'x'"
    assert message(ValueError()) == "ValueError"


def test_nearest_hints_only_at_what_is_close():
    assert nearest("widht", ["width", "layers"]) == "; did you mean 'width'?"
    assert nearest("zzz", ["width", "layers"]) == ""


def test_a_missing_extra_comes_with_its_install_line():
    assert require("json", "all", "a test") is json
    with pytest.raises(
        ImportError,
        match=r"a chart needs the package 'no_such_library'.*pip install 'pairstream\[explain\]'",
    ):
        require("no_such_library", "explain", "a chart")


def test_own_packages_are_found_and_a_shadow_is_named(tmp_path, monkeypatch):
    require_own_packages()
    (tmp_path / "somebody.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"'somebody' is shadowed: expected it in .*found .*somebody.py"):
        require_own_packages(["somebody"])
    with pytest.raises(ImportError, match=r"'absent_package' is shadowed: .*found nothing"):
        require_own_packages(["absent_package"])
