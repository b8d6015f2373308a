"""Tier: what every keeper of bytes does, as a batch, in a worker thread.

A tier owns memory or files cut into segments (`SegmentPlan`). Which slot holds what is decided
elsewhere and told here with every item (`SlotIO`): a tier never looks a key up.

Rules every implementation keeps (`kvtier.testing.conformance.check_tier` holds them):
  - an item that fails sets its own `error` and leaves the other items of the batch alone;
  - `read` gives the bytes that `label` describes, or `BlockCorrupt`: never other bytes;
  - after `write` without error, `read` of the same slot and label succeeds until the slot is
    written again or erased;
  - `write` fills in `label.checksum` when it was 0, and `label.generation`, greater than that of
    any earlier write of the tier;
  - batches of different slots may run at the same time in different threads.

Does not: choose slots, know about leases, or touch the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvtier.block import SegmentPlan, SlotIO, SlotLabel


class SlotRecord(NamedTuple):
    """A copy found again at start: where it lies and what it is."""

    slot: int
    slot_bytes: int
    label: SlotLabel


@dataclass(frozen=True, slots=True)
class TierCounts:
    """A snapshot for metrics, the command and tests. Bytes are payload bytes since the start."""

    written_bytes: int = 0
    read_bytes: int = 0
    written_slots: int = 0
    read_slots: int = 0
    error_count: int = 0
    corrupt_count: int = 0


class Tier(Protocol):
    """One keeper of bytes."""

    plan: SegmentPlan

    def write(self, batch: Sequence[SlotIO]) -> None:
        """Stores `label.size_bytes` bytes from each `address` in its slot. Worker thread."""
        ...

    def read(self, batch: Sequence[SlotIO]) -> None:
        """Brings each slot's bytes to `address`, verified against `label`. Worker thread."""
        ...

    def erase(self, slots: Iterable[SlotRecord], *, durable: bool) -> None:
        """The copies are gone; with `durable`, also after a power cut once this returns.

        Worker thread. Raises TierFailed when that could not be promised.
        """
        ...

    def sync(self) -> None:
        """All finished writes survive a power cut once this returns. Raises TierFailed."""
        ...

    def counts(self) -> TierCounts:
        """Snapshot; any thread."""
        ...

    def check(self) -> None:
        """Raises InvariantViolated when the tier's own books disagree."""
        ...

    def close(self) -> None:
        """Ends in order: after this `recover` of a successor finds everything written."""
        ...
