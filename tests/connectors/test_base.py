"""Keys of chains, and the border no failure crosses."""

from __future__ import annotations

import hashlib
import logging
import struct

import pytest

from kvtier.block import Reason
from kvtier.connectors.base import Border, KeyChain, miss_reason
from kvtier.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    InvariantViolated,
    LeaseLost,
    TierFull,
)


def test_a_key_is_the_hash_of_its_parent_and_its_tokens() -> None:
    chain = KeyChain(block_tokens=2, salt="s")
    root = hashlib.sha256(b"kvtier-chain\0s").digest()
    first = hashlib.sha256(root + struct.pack("<I2i", 2, 7, 8)).digest()
    second = hashlib.sha256(first + struct.pack("<I2i", 2, 9, 10)).digest()

    assert chain.keys([7, 8, 9, 10, 11]) == [first, second]


@pytest.mark.parametrize("count", [0, 1, 15])
def test_a_partial_block_has_no_key(count: int) -> None:
    assert KeyChain(block_tokens=16).keys(list(range(count))) == []


def test_an_early_token_changes_every_key_after_it() -> None:
    chain = KeyChain(block_tokens=4)
    one, other = chain.keys([1] * 16), chain.keys([1, 1, 1, 1, 2, *[1] * 11])

    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])


@pytest.mark.parametrize(
    "other",
    [KeyChain(block_tokens=4, salt="b"), KeyChain(block_tokens=8, salt="a")],
    ids=["salt", "block_tokens"],
)
def test_chains_that_differ_share_no_key(other: KeyChain) -> None:
    tokens = list(range(16))
    assert not set(KeyChain(block_tokens=4, salt="a").keys(tokens)) & set(other.keys(tokens))


def test_a_token_beyond_32_bits_is_refused() -> None:
    with pytest.raises(OverflowError):
        KeyChain(block_tokens=1).keys([2**31])


def test_failures_are_counted_each_and_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [0.0]
    border = Border("test", clock_s=lambda: now_s[0])
    caplog.set_level(logging.WARNING, logger="kvtier.connector")

    for _ in range(10):
        with border.crossing("restore") as crossed:
            raise DaemonUnavailable("gone")
        assert isinstance(crossed.failed, DaemonUnavailable)
    assert len(caplog.records) == 1
    assert "Traceback" in caplog.text
    assert border.counts().failures == {"restore:DaemonUnavailable": 10}

    now_s[0] = 61.0
    with border.crossing("save"):
        raise InvariantViolated("even this")
    assert len(caplog.records) == 2
    assert "9 more since the last line" in caplog.text
    assert border.counts().failure_count == 11


def test_stopping_the_engine_is_not_a_failure() -> None:
    border = Border("test")
    with pytest.raises(KeyboardInterrupt), border.crossing("restore"):
        raise KeyboardInterrupt
    assert border.counts().failure_count == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DeadlineExceeded(), Reason.DEADLINE),
        (LeaseLost(), Reason.LEASE_LOST),
        (DaemonUnavailable(), Reason.DAEMON_DOWN),
        (OSError(), Reason.DAEMON_DOWN),
        (TierFull(), Reason.NOT_ACCEPTABLE),
    ],
)
def test_a_failure_has_a_miss_reason(error: Exception, reason: Reason) -> None:
    assert miss_reason(error) is reason
