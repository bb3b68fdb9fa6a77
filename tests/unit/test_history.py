"""The best of a run's evaluations, when a run gives up, and what a checkpoint keeps of it."""

from __future__ import annotations

from finetune.history import History


def test_the_first_of_equally_good_ones_is_best():
    history = History("cider", patience=2)
    assert not history.given_up
    for step, value in ((10, 0.1), (20, 0.5), (30, 0.5), (40, 0.2)):
        assert history.add(step, {"cider": value, "text": "x", "each": [1]}) == {"cider": value}
    assert (history.best, history.given_up) == (20, True)
    again = History("cider", 2, history.state())
    assert (again.best, again.given_up) == (20, True)
    again.add(50, {"cider": 0.6})
    assert (again.best, again.given_up) == (50, False)
    assert not History("cider", None, history.state()).given_up
