"""What sessions hold: leases, reservations, and blocks that wait for their other shards. And what
nobody holds any longer: slots to be erased.

Does not: decide. `ledger.py` is the only writer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvtier.block import Keys, Reason, SlotLabel, TierId
from kvtier.ledger.chain import Namespace
from kvtier.ledger.segment import SlotClass

# State of a shard in a Partial.
OPEN, TAKEN, COMMITTED = 0, 1, 2


@dataclass(slots=True, eq=False)
class Lease:
    """A right to read blocks `first_needed`..`count` of a chain.

    `slots` is the answer (one DRAM slot a block and shard) once all of them are readable there;
    until then the lease holds the runs and waits for promotions. `runs` are pinned. `holders`
    are the sessions of the taker and of those of its group that joined: the last to let go ends it.
    """

    id: int
    session_id: int
    tenant: str
    group: str
    space: Namespace
    keys: Keys
    first_needed: int
    count: int
    started_s: float
    runs: set[int] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)
    slots: array[int] | None = None
    reason: Reason = Reason.NONE

    @property
    def needed_count(self) -> int:
        return self.count - self.first_needed


@dataclass(slots=True, eq=False)
class Entry:
    """One block of a reservation: where it belongs and the slot its bytes will lie in."""

    key: bytes
    parent: bytes
    position: int
    slot: int
    partial: Partial | None = None  # of formats with several shards: the block this is a part of
    state: int = OPEN  # OPEN -> TAKEN (bytes being copied) -> COMMITTED or given back


def stretches(
    entries: Sequence[Entry], ready: Sequence[bytes]
) -> Iterator[tuple[bytes, Sequence[bytes]]]:
    """`ready` (keys of entries, in their order) cut where a key does not follow the one before in
    the chain: the parent of each part's first block, and its keys.
    """
    parent_of = {entry.key: entry.parent for entry in entries}
    start = 0
    for end in range(1, len(ready) + 1):
        if end == len(ready) or parent_of[ready[end]] != ready[end - 1]:
            yield parent_of[ready[start]], ready[start:end]
            start = end


@dataclass(slots=True, eq=False)
class Reservation:
    """A right to write. `extent` is the offset in the session's write arena, if it has one."""

    id: int
    session_id: int
    space: Namespace
    epoch: int
    shard: int
    deadline_s: float
    started_s: float
    entries: list[Entry]
    extent: int | None = None
    ended: bool = False

    @property
    def busy(self) -> bool:
        """Whether bytes of an entry are being copied now."""
        return any(entry.state == TAKEN for entry in self.entries)

    @property
    def open(self) -> bool:
        """Whether an entry may still be committed."""
        return any(entry.state == OPEN for entry in self.entries)


@dataclass(slots=True, eq=False)
class Partial:
    """A block of a multi-shard format on its way: room for all shards was taken at once, so that
    no two blocks can starve each other, and it becomes readable when the last shard commits.
    `writers`: entries of reservations that may still commit a shard of it; it stays while there
    is one, or a committed shard.
    """

    space: Namespace
    key: bytes
    parent: bytes
    position: int
    slots: array[int]
    states: bytearray
    checksums: array[int]
    deadline_s: float
    writers: int = 0


@dataclass(slots=True, eq=False)
class Erasure:
    """A slot below whose record must go before the slot is free again. `wipe`: durably, header
    and all, because somebody asked for it to be gone (explicit evict, clear). `whole`: its bytes,
    too (namespaces with a greatest age).
    """

    tier: TierId
    slot: int
    slot_bytes: int
    label: SlotLabel
    wipe: bool
    slot_class: SlotClass
    whole: bool
