"""FaultyTier: any tier, failing where and when a test says.

Faults are planned before (`fail_write`, `corrupt_read`, ...) and count items, not batches, in the
order they are given to the tier. A gate holds batches until the test opens it, which forces an
interleaving without sleeping.

Does not: change what the tier underneath holds, except where a planned fault says so.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvtier import native
from kvtier.block import SlotIO
from kvtier.errors import KvTierError, TierFailed
from kvtier.tiers.base import SlotRecord, Tier, TierCounts

_GATE_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Gate:
    """Holds batches: `reached` is set when one waits, `open()` lets all through from then on."""

    reached: threading.Event
    opened: threading.Event

    def open(self) -> None:
        self.opened.set()


@dataclass(slots=True)
class _Fault:
    """Strikes item number `nth` (from 1) of its operation; with `for_ever`, all from there on."""

    operation: str
    nth: int
    for_ever: bool
    error: KvTierError | None  # None: flip a bit instead

    def strikes(self, number: int) -> bool:
        return number == self.nth or (self.for_ever and number > self.nth)


class FaultyTier:
    """Wraps `tier`. Same `seed`, same plan and same calls: same faults. Any thread.

    An item that fails here is not given to the tier; the rest of its batch is.
    """

    def __init__(self, tier: Tier, *, seed: int = 0) -> None:
        self.tier = tier
        self.plan = tier.plan
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._gates: dict[str, Gate] = {}
        self._seen = {"write": 0, "read": 0, "erase": 0, "sync": 0, "find": 0}
        self._counts = TierCounts()

    # --- the plan

    def fail_write(
        self, nth: int = 1, *, for_ever: bool = False, error: KvTierError | None = None
    ) -> None:
        """The nth item written from now on (all from it on) fails with `error` or TierFailed."""
        self._plan("write", nth, for_ever, error or TierFailed("planned: write failed"))

    def fail_read(
        self, nth: int = 1, *, for_ever: bool = False, error: KvTierError | None = None
    ) -> None:
        """As `fail_write`, for reads."""
        self._plan("read", nth, for_ever, error or TierFailed("planned: read failed"))

    def fail_erase(self, nth: int = 1, *, for_ever: bool = False) -> None:
        """The nth call of `erase` from now on raises TierFailed and erases nothing."""
        self._plan("erase", nth, for_ever, TierFailed("planned: erase failed"))

    def fail_sync(self, nth: int = 1, *, for_ever: bool = False) -> None:
        """The nth call of `sync` from now on raises TierFailed."""
        self._plan("sync", nth, for_ever, TierFailed("planned: sync failed"))

    def fail_find(self, nth: int = 1, *, for_ever: bool = False) -> None:
        """The nth call of `find` from now on raises TierFailed."""
        self._plan("find", nth, for_ever, TierFailed("planned: nothing found"))

    def corrupt_read(self, nth: int = 1, *, for_ever: bool = False) -> None:
        """One bit of what the nth item read brings is flipped, and nobody is told."""
        self._plan("read", nth, for_ever, None)

    def corrupt_write(self, nth: int = 1, *, for_ever: bool = False) -> None:
        """One bit of the nth item is flipped on its way to the tier, under its sound checksum."""
        self._plan("write", nth, for_ever, None)

    def hold(self, operation: str) -> Gate:
        """Batches of "write" or "read", or calls of "erase", "sync" or "find", wait from now on
        until the gate opens.
        """
        assert operation in self._seen

        gate = Gate(threading.Event(), threading.Event())
        with self._lock:
            self._gates[operation] = gate
        return gate

    def heal(self) -> None:
        """Forgets every planned fault and opens every gate."""
        with self._lock:
            self._faults.clear()
            gates, self._gates = list(self._gates.values()), {}
        for gate in gates:
            gate.open()

    def _plan(self, operation: str, nth: int, for_ever: bool, error: KvTierError | None) -> None:
        assert nth >= 1

        with self._lock:
            self._faults.append(_Fault(operation, self._seen[operation] + nth, for_ever, error))

    # --- the Tier protocol

    def write(self, batch: Sequence[SlotIO]) -> None:
        """As the tier's, but for planned faults."""
        good, corrupt = self._strike("write", batch)
        self.tier.write([item for item in good if item not in corrupt])
        for item in corrupt:
            size, label = item.label.size_bytes, item.label
            [sound] = native.checksum([item.address], [size])
            memory = ctypes.create_string_buffer(size)
            ctypes.memmove(memory, item.address, size)
            self._flip(ctypes.addressof(memory), size)
            stand_in = replace(item, address=ctypes.addressof(memory), label=replace(label))
            stand_in.label.checksum = label.checksum = label.checksum or sound
            self.tier.write([stand_in])
            item.error, label.generation = stand_in.error, stand_in.label.generation

    def read(self, batch: Sequence[SlotIO]) -> None:
        """As the tier's, but for planned faults."""
        good, corrupt = self._strike("read", batch)
        self.tier.read(good)
        for item in corrupt:
            if item.error is None:
                self._flip(item.address, item.label.size_bytes)

    def erase(self, slots: Iterable[SlotRecord], *, durable: bool, **how: Any) -> None:
        """As the tier's. Raises TierFailed where planned."""
        self._strike_call("erase")
        self.tier.erase(slots, durable=durable, **how)

    def sync(self) -> None:
        """As the tier's. Raises TierFailed where planned."""
        self._strike_call("sync")
        self.tier.sync()

    def find(self, **how: Any) -> Any:
        """As the SSD tier's. Raises TierFailed where planned."""
        self._strike_call("find")
        return self.__getattr__("find")(**how)

    def counts(self) -> TierCounts:
        """The tier's, and the planned failures as errors."""
        counts = self.tier.counts()
        return replace(counts, error_count=counts.error_count + self._counts.error_count)

    def check(self) -> None:
        self.tier.check()

    def close(self) -> None:
        self.heal()
        self.tier.close()

    def __getattr__(self, name: str) -> Any:
        """What only the tier underneath has (`address`, `arena`, `register_namespace`)."""
        return getattr(self.tier, name)

    def __repr__(self) -> str:
        return f"<FaultyTier {len(self._faults)} faults planned, {self.tier!r}>"

    # --- striking

    def _strike(self, operation: str, batch: Sequence[SlotIO]) -> tuple[list[SlotIO], list[SlotIO]]:
        """The items for the tier, and which of them to corrupt; the others failed."""
        self._wait(operation)
        good, corrupt = [], []
        with self._lock:
            for item in batch:
                fault = self._next(operation)
                item.error = fault.error if fault else None
                if item.error is None:
                    good.append(item)
                    if fault is not None:
                        corrupt.append(item)
            failed = self._counts.error_count + len(batch) - len(good)
            self._counts = replace(self._counts, error_count=failed)
        return good, corrupt

    def _strike_call(self, operation: str) -> None:
        self._wait(operation)
        with self._lock:
            fault = self._next(operation)
        if fault is not None and fault.error is not None:
            raise fault.error

    def _next(self, operation: str) -> _Fault | None:
        self._seen[operation] += 1
        number = self._seen[operation]
        matching = (f for f in self._faults if f.operation == operation and f.strikes(number))
        return next(matching, None)

    def _wait(self, operation: str) -> None:
        with self._lock:
            gate = self._gates.get(operation)
        if gate is not None:
            gate.reached.set()
            assert gate.opened.wait(_GATE_TIMEOUT_S), f"nobody opened the gate of {operation}"

    def _flip(self, address: int, size_bytes: int) -> None:
        with self._lock:
            place, bit = self._random.randrange(size_bytes), self._random.randrange(8)
        byte = ctypes.c_uint8.from_address(address + place)
        byte.value ^= 1 << bit
