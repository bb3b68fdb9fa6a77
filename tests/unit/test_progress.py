"""Progress outside a terminal: ten lines at the most, each with the last note."""

from __future__ import annotations

from pairstream.progress import ProgressBar


def test_one_line_at_every_tenth_with_the_last_note(capsys):
    with ProgressBar("count", 40) as bar:
        for step in range(40):
            if step % 7 == 0:
                bar.advance(0, note=f"loss {step}")
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"count: {4 * n}/40" for n in range(1, 11)]
    assert [line.rsplit(" ", 2)[-2:] for line in lines[:3]] == [["loss", "0"], ["loss", "7"], ["loss", "7"]]


def test_a_resumed_run_goes_on_from_its_step_and_other_ranks_are_quiet(capsys):
    with ProgressBar("count", 10, start=8) as bar:
        bar.advance()
        bar.advance()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "count: 9/10",
        "count: 10/10",
    ]
    with ProgressBar("count", 2, show=False) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar("count", 2) as bar:
        assert bar.bar is not None
        bar.advance(note="loss 1.5")
        bar.advance()
        (task,) = bar.bar.tasks
        assert (task.completed, task.fields["note"]) == (2, "loss 1.5")
