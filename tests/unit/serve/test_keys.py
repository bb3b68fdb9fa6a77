"""Keys and rates."""

from __future__ import annotations

import hmac

import pytest

from serve import keys as module
from serve.keys import CALLERS, Keys, Rates, read_keys


def test_a_key_opens_and_its_parts_do_not():
    keys = Keys(["a" * 16, "b" * 20])
    assert keys.who(b"a" * 16) == "key-1"
    assert keys.who(b"b" * 20) == "key-2"
    for wrong in (b"", b"a" * 15, b"a" * 17, b"A" * 16, "ä".encode() * 16):
        assert keys.who(wrong) is None
    assert not Keys()


def test_every_key_is_compared_in_constant_time(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module.hmac,
        "compare_digest",
        lambda a, b, real=hmac.compare_digest: seen.append((len(a), len(b))) or real(a, b),
    )
    keys = Keys(["a" * 16, "b" * 200, "c" * 16])
    assert keys.who(b"a" * 16) == "key-1"
    assert seen == [(32, 32)] * 3  # all of them, on digests of one length


def test_keys_come_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  0123456789abcdef\n")
    assert read_keys(path).who(b"0123456789abcdef") == "key-1"
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="expected API keys, one a line; there is none"):
        read_keys(path)
    path.write_text("short\n")
    with pytest.raises(
        ValueError, match="key number 1: expected at least 16 ASCII characters without blanks, got 5"
    ):
        read_keys(path)


def test_a_bucket_refills_at_its_rate():
    now = [0.0]
    rates = Rates(2.0, 3, clock=lambda: now[0])
    assert [rates.wait("a") for _ in range(3)] == [0, 0, 0]
    assert rates.wait("a") == pytest.approx(0.5)
    assert rates.wait("b") == 0  # another caller
    now[0] = 0.5
    assert rates.wait("a") == 0
    assert rates.wait("a") == pytest.approx(0.5)
    now[0] = 1000
    assert [bool(rates.wait("a")) for _ in range(4)] == [False, False, False, True]
    assert Rates(0, 1).wait("a") == 0


def test_remembered_callers_are_bounded():
    rates = Rates(1.0, 1)
    for number in range(CALLERS + 10):
        rates.wait(str(number))
    assert len(rates.buckets) == CALLERS
