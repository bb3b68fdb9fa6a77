import logging
import pickle

import pytest

from data.faults import Fault, FaultLog, FaultRecord


def some(count, cause="undecodable_image"):
    return [FaultRecord(cause, "a.tar", f"k{n}", "broken") for n in range(count)]


def test_a_fault_survives_pickling():
    fault = pickle.loads(pickle.dumps(Fault("bad_json", "line 1")))
    assert (fault.cause, fault.detail, str(fault)) == ("bad_json", "line 1", "bad_json: line 1")


def test_counts_by_cause_and_logs_each_cause_once(caplog):
    log = FaultLog(0.5)
    with caplog.at_level(logging.WARNING):
        log.add(some(3), seen=10)
        log.add([*some(2), *some(1, "bad_json")], seen=10)
    assert log.counts == {"undecodable_image": 5, "bad_json": 1}
    assert log.seen == 20
    assert len(caplog.records) == 2
    assert "a.tar, sample 'k0': broken" in caplog.text


def test_the_end_is_judged_exactly():
    log = FaultLog(0.1)
    log.add(some(1), seen=10)
    log.judge(final=True)
    log.add(some(1), seen=9)
    with pytest.raises(ValueError, match=r"2 of 19 samples cannot be used \(10.5%\)"):
        log.judge(final=True)


def test_the_message_has_causes_shards_and_examples():
    log = FaultLog(0)
    log.add([*some(5), FaultRecord("truncated_tar", "b.tar", "", "ends early", 64)], seen=100)
    with pytest.raises(ValueError, match="69 of 100") as caught:
        log.judge()
    text = str(caught.value)
    assert "max_faults is 0.0%" in text
    assert "truncated_tar: 64\n    b.tar: ends early" in text
    assert text.count("a.tar, sample") == 3  # examples, not all


def test_few_samples_are_not_judged_before_the_end():
    log = FaultLog(0.01)
    log.add(some(50), seen=99)
    log.judge()
    log.add([], seen=1)
    with pytest.raises(ValueError, match="50 of 100"):
        log.judge()


def test_an_unlucky_start_is_not_the_end():
    log = FaultLog(0.01)
    log.add(
        some(3), seen=100
    )  # 3 % of the first hundred; the budget allows 1 % + 3 standard deviations = 4 %
    log.judge()
    log.add(some(2), seen=0)
    with pytest.raises(ValueError, match="5 of 100"):
        log.judge()


def test_no_tolerance_stops_at_the_first():
    log = FaultLog(0)
    log.add([], seen=1)
    log.judge()
    log.add(some(1), seen=1)
    with pytest.raises(ValueError, match="1 of 2"):
        log.judge()


@pytest.mark.parametrize("share", [-0.1, 1, 5])
def test_a_budget_outside_its_range(share):
    with pytest.raises(ValueError, match=r"max_faults is a share of the samples in \[0, 1\)"):
        FaultLog(share)
