"""What every connector needs: keys of token chains, and the border no failure of kvtier crosses.

Does not: import an engine, or know how an engine lays out its KV.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from kvtier.block import CommitResult, Reason, TierRun
from kvtier.errors import DaemonUnavailable, DeadlineExceeded, KvTierError, LeaseLost

log = logging.getLogger("kvtier.connector")

HASH_ALGORITHM = "sha256-chain-v1"
LOG_INTERVAL_S = 60.0
_TOKEN_BYTES = 4


class KeyChain:
    """Token ids -> keys of their whole blocks, each the hash of its tokens and all before them.

    A key is SHA-256 over the parent's key and the block's tokens as little-endian int32, their
    count in front. The root of the chain is a hash of `salt`: equal tokens under different salts
    share nothing.
    """

    def __init__(self, *, block_tokens: int, salt: str = "") -> None:
        assert block_tokens > 0

        self.block_tokens = block_tokens
        self.salt = salt
        self._root = hashlib.sha256(b"kvtier-chain\0" + salt.encode()).digest()

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Keys of the whole blocks of `tokens`; the tokens of a last, partial block have none.

        Raises:
            OverflowError: a token id does not fit into 32 bits.
        """
        packed = array("i", tokens)
        assert packed.itemsize == _TOKEN_BYTES
        if struct.pack("=i", 1) != struct.pack("<i", 1):
            packed.byteswap()
        raw = memoryview(packed.tobytes())
        length = struct.pack("<I", self.block_tokens)
        size_bytes = self.block_tokens * _TOKEN_BYTES
        keys, parent = [], self._root
        for start in range(0, len(raw) - size_bytes + 1, size_bytes):
            hasher = hashlib.sha256(parent)
            hasher.update(length)
            hasher.update(raw[start : start + size_bytes])
            parent = hasher.digest()
            keys.append(parent)
        return keys


class Lease(Protocol):
    """What connectors use of `kvtier.client.Lease`: entering waits until it can be read."""

    @property
    def block_count(self) -> int: ...
    @property
    def reason(self) -> Reason: ...
    @property
    def views(self) -> Sequence[memoryview]: ...
    def check(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class LeasedFound(Protocol):
    """What connectors use of `kvtier.client.LeasedFound`."""

    @property
    def block_count(self) -> int: ...
    @property
    def runs(self) -> tuple[TierRun, ...]: ...
    @property
    def reason(self) -> Reason: ...
    @property
    def lease(self) -> Lease | None: ...


class ReservedBlock(Protocol):
    """What connectors use of `kvtier.client.ReservedBlock`."""

    @property
    def key(self) -> bytes: ...
    @property
    def view(self) -> memoryview: ...


class Space(Protocol):
    """What connectors use of `kvtier.client.Space`."""

    def lookup(
        self, keys: Sequence[bytes], *, lease: bool = False, deadline_s: float | None = None
    ) -> LeasedFound: ...
    def store(self, keys: Sequence[bytes], fill: Callable[[Any], object]) -> CommitResult: ...


@dataclass(frozen=True, slots=True)
class ConnectorCounts:
    """What a connector did since its start. Requests, tokens and blocks are never mixed."""

    request_count: int
    hit_count: int
    miss_count: int
    failure_count: int
    found_tokens: int
    asked_tokens: int
    saved_blocks: int
    misses: dict[str, int]
    failures: dict[str, int]


@dataclass(slots=True)
class Crossing:
    """How one crossing of the border went: `failed` is what ended it, or None."""

    failed: Exception | None = None


class Border:
    """The line that no failure of kvtier crosses into the engine: each becomes a miss.

    Each failure is counted by its kind and act; the first is logged with its traceback, then at
    most one a minute, with how many were not logged. Usable from any thread: a race can at most
    log one line more.
    """

    def __init__(self, name: str, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.request_count = 0
        self.hit_count = 0
        self.found_tokens = 0
        self.asked_tokens = 0
        self.saved_blocks = 0
        self._misses: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._clock_s = clock_s
        self._logged_at_s: float | None = None
        self._unlogged_count = 0
        self._said: set[str] = set()

    @contextmanager
    def crossing(self, act: str) -> Iterator[Crossing]:
        """Runs kvtier's part of `act`; what it raises ends here, counted and logged."""
        crossing = Crossing()
        try:
            yield crossing
        except Exception as error:  # noqa: BLE001 - the engine must not be broken by its cache
            crossing.failed = error
            self._failures[f"{act}:{type(error).__name__}"] += 1
            self._log(act, error)
            # A frame of what failed may hold a view, and a view holds its lease.
            traceback.clear_frames(error.__traceback__)

    def found(self, *, found_tokens: int, asked_tokens: int, reason: str) -> None:
        """Counts one request: a hit when anything was found, else a miss for `reason`."""
        self.request_count += 1
        self.found_tokens += found_tokens
        self.asked_tokens += asked_tokens
        if found_tokens:
            self.hit_count += 1
        else:
            self._misses[reason] += 1

    def say_once(self, sentence: str) -> None:
        """Logs a sentence the first time it is said: why a model or request is not served."""
        if sentence not in self._said:
            self._said.add(sentence)
            log.warning("%s: %s", self.name, sentence)

    def counts(self) -> ConnectorCounts:
        return ConnectorCounts(
            request_count=self.request_count,
            hit_count=self.hit_count,
            miss_count=self._misses.total(),
            failure_count=self._failures.total(),
            found_tokens=self.found_tokens,
            asked_tokens=self.asked_tokens,
            saved_blocks=self.saved_blocks,
            misses=dict(self._misses),
            failures=dict(self._failures),
        )

    def _log(self, act: str, error: Exception) -> None:
        now_s = self._clock_s()
        if self._logged_at_s is not None and now_s - self._logged_at_s < LOG_INTERVAL_S:
            self._unlogged_count += 1
            return
        more = f" ({self._unlogged_count} more since the last line)" if self._unlogged_count else ""
        log.warning("%s: %s failed and counts as a miss%s", self.name, act, more, exc_info=error)
        self._logged_at_s, self._unlogged_count = now_s, 0

    def __repr__(self) -> str:
        failures = self._failures.total()
        return (
            f"<Border {self.name}: {self.hit_count} of {self.request_count} hit, {failures} failed>"
        )


def miss_reason(error: BaseException) -> Reason:
    """The reason of DESIGN section 6 under which a failure counts as a miss."""
    if isinstance(error, DeadlineExceeded):
        return Reason.DEADLINE
    if isinstance(error, LeaseLost):
        return Reason.LEASE_LOST
    if isinstance(error, DaemonUnavailable) or not isinstance(error, KvTierError):
        return Reason.DAEMON_DOWN
    return Reason.NOT_ACCEPTABLE
