r"""Filling: reservations and commits; how a block comes into being.

    reserve --> entry OPEN --begin_commit--> TAKEN --finish_commit--> READY block
                     |                          \---fail_commit--> given back
                     \--- abort / end of session / deadline --> given back

Keys that another session is filling get slots of their own; the first commit of a shard wins and
the others are successes that store nothing. For formats of several shards room for all shards is
taken with the first (`Partial`), so that no two blocks starve each other.

Does not: touch bytes or know time; the store copies between begin_commit and finish_commit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtier.block import Keys, TierId
from kvtier.errors import InvalidRequest, ReservationExpired
from kvtier.ledger import search
from kvtier.ledger.chain import Namespace
from kvtier.ledger.holdings import COMMITTED, OPEN, TAKEN, Entry, Partial, Reservation
from kvtier.ledger.ledger import Ledger

# More would hold up everybody else for longer (DESIGN section 9); the client asks for the rest.
RESERVE_KEYS_MAX = 512


@dataclass(frozen=True, slots=True)
class Offer:
    """What reserve can give: indexes to fill, how far it looked, what was there already."""

    reservation: Reservation | None
    granted: tuple[int, ...]
    covered_count: int
    present_count: int


@dataclass(frozen=True, slots=True)
class Filled:
    """What a commit did, in blocks; `ready` are the keys that became readable."""

    ready: list[bytes]
    duplicate_count: int
    partial_count: int


class Filling:
    """Reservations of one ledger. Event loop only."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.reservations: dict[int, Reservation] = {}
        self.partials: dict[tuple[int, bytes], Partial] = {}

    # --- reserve

    def reserve(
        self,
        space: Namespace,
        keys: Keys,
        *,
        parent: bytes,
        position: int,
        shard: int,
        session_id: int,
        count_max: int,
        now_s: float,
        deadline_s: float,
    ) -> Offer:
        """Grants the longest prefix of `keys` for which there is room: at most `count_max` blocks
        to fill, present ones skipped. Looks at the first RESERVE_KEYS_MAX keys only. With nothing
        granted, nothing is held.

        Raises:
            InvalidRequest: a key is given twice, a key of another length, no such shard.
        """
        space.accept_key_size(keys.size)
        keys = next(keys.parts(RESERVE_KEYS_MAX))
        keys.check_distinct()
        if parent and len(parent) != keys.size:
            raise InvalidRequest(f"parent of {len(parent)} bytes with keys of {keys.size}")
        if not 0 <= shard < space.shards:
            raise InvalidRequest(f"shard {shard} of a format with {space.shards}")
        found = self._ledger.chains.find(space, parent) if parent else None
        if found is not None:
            position = found[0].position + found[1] + 1
        entries: list[Entry] = []
        # Only what is wanted is acquired: a segment taken for nothing would have its home changed.
        absent, covered = self._absent(space, keys, shard, count_max)
        slots = self._slots_ahead(space, len(absent) if space.shards == 1 else 0)
        for index in absent:
            before = keys[index - 1] if index else parent
            entry = Entry(keys[index], before, position + index, -1)
            if not self._give_slot(space, entry, shard, slots, deadline_s):
                covered = index
                break
            entries.append(entry)
        present = covered - len(entries)
        if not entries:
            return Offer(None, (), covered, present)
        # From now on this is the key length: two first reservations must not differ in it.
        space.key_size = keys.size
        reservation = Reservation(
            self._ledger.next_id(),
            session_id,
            space,
            space.epoch,
            shard,
            deadline_s,
            now_s,
            entries,
        )
        self.reservations[reservation.id] = reservation
        return Offer(reservation, tuple(absent[: len(entries)]), covered, present)

    def _absent(
        self, space: Namespace, keys: Keys, shard: int, count_max: int
    ) -> tuple[list[int], int]:
        """Indexes of the first `count_max` keys that are not there, and how far that is."""
        absent: list[int] = []
        for index, key in enumerate(keys.split()):
            if self._is_present(space, key, shard):
                continue
            if len(absent) == count_max:
                return absent, index
            absent.append(index)
        return absent, len(keys)

    def _slots_ahead(self, space: Namespace, count: int) -> array[int]:
        """As many slots as there are, up to the count, acquired in one go; last one first."""
        top = self._ledger.top
        slots = self._ledger.slots[top]
        tenant, slot_bytes = space.tenant, space.slot_bytes[top]
        count = min(count, slots.available(tenant, slot_bytes)) if count else 0
        taken = slots.acquire(tenant, slot_bytes, count)
        taken.reverse()
        return taken

    def _is_present(self, space: Namespace, key: bytes, shard: int) -> bool:
        if search.is_ready(space, self._ledger.chains.runs, key):
            return True
        partial = self.partials.get((space.id, key))
        return partial is not None and partial.states[shard] == COMMITTED

    def _give_slot(
        self, space: Namespace, entry: Entry, shard: int, slots: array[int], deadline_s: float
    ) -> bool:
        """Gives the entry the slot it will fill; False when there is no room for its block."""
        if space.shards == 1:
            if slots:
                entry.slot = slots.pop()
            return entry.slot >= 0
        key = entry.key
        ledger, top = self._ledger, self._ledger.top
        tier_slots, slot_bytes = ledger.slots[top], space.slot_bytes[top]
        partial = self.partials.get((space.id, key))
        if partial is None:
            if tier_slots.available(space.tenant, slot_bytes) < space.shards:
                return False
            taken = tier_slots.acquire(space.tenant, slot_bytes, space.shards)
            partial = Partial(
                space, key, entry.parent, entry.position, taken, bytearray(space.shards),
                array("Q", bytes(8 * space.shards)), deadline_s,
            )  # fmt: skip
            self.partials[space.id, key] = partial
        if partial.states[shard] == OPEN:
            partial.states[shard] = TAKEN
            entry.slot = partial.slots[shard]
        elif tier_slots.available(space.tenant, slot_bytes) < 1:
            return False
        else:
            # Another session fills this very shard: a slot of our own; the first commit wins.
            entry.slot = tier_slots.acquire(space.tenant, slot_bytes, 1)[0]
        partial.deadline_s = max(partial.deadline_s, deadline_s)
        partial.writers += 1
        entry.partial = partial
        return True

    # --- commit

    def get(self, reservation_id: int) -> Reservation:
        """Raises ReservationExpired when it ended or never was."""
        reservation = self.reservations.get(reservation_id)
        if reservation is None or reservation.ended:
            raise ReservationExpired(
                f"reservation {reservation_id} is over (aborted, past its deadline, or its "
                "session ended): reserve again"
            )
        return reservation

    def begin_commit(self, reservation: Reservation, indexes: Sequence[int] | None) -> list[Entry]:
        """The entries whose bytes are to be copied now; they are held until finish or fail.

        Raises:
            InvalidRequest: an index out of range or given twice. Nothing was changed.
            ReservationExpired: an entry was committed before (or its copy is under way).
        """
        entries = reservation.entries
        if indexes is None:
            chosen = [entry for entry in entries if entry.state == OPEN]
        else:
            if len(set(indexes)) != len(indexes) or not all(0 <= i < len(entries) for i in indexes):
                raise InvalidRequest(f"indexes must be distinct and below {len(entries)}")
            chosen = [entries[index] for index in indexes]
        if any(entry.state != OPEN for entry in chosen) or not chosen:
            raise ReservationExpired("these blocks of the reservation are committed already")
        for entry in chosen:
            entry.state = TAKEN
        return chosen

    def finish_commit(
        self, reservation: Reservation, entries: Sequence[Entry], checksums: Sequence[int]
    ) -> Filled:
        """The bytes are in their slots: FILLING -> READY. Of an ended reservation nothing is
        stored: its slots go back.
        """
        space, shard = reservation.space, reservation.shard
        ready: list[bytes] = []
        duplicates = partials = 0
        for entry, checksum in zip(entries, checksums, strict=True):
            assert entry.state == TAKEN
            entry.state = COMMITTED
            if reservation.ended or reservation.epoch != space.epoch:
                self._give_back_slot(space, entry, shard)
                continue
            came_and_went = space.shards > 1 and (space.id, entry.key) not in self.partials
            if came_and_went or self._is_present(space, entry.key, shard):
                # Stored by others already (and perhaps evicted since): nothing to add.
                duplicates += 1
                self._give_back_slot(space, entry, shard)
            elif space.shards == 1:
                self._make_ready(space, entry, (entry.slot,), (checksum,))
                ready.append(entry.key)
            elif self._commit_shard(space, entry, shard, checksum):
                ready.append(entry.key)
            else:
                partials += 1
        self._end_if_done(reservation)
        return Filled(ready, duplicates, partials)

    def _commit_shard(self, space: Namespace, entry: Entry, shard: int, checksum: int) -> bool:
        partial = self.partials[space.id, entry.key]
        _leave(entry)
        if partial.slots[shard] != entry.slot:
            # We won over the session that fills the block's own slot: our slot is the block's now.
            rival = self._holder(space, entry.key, shard, partial.slots[shard])
            if rival is None:
                self._ledger.slots[self._ledger.top].release((partial.slots[shard],))
            # Else the rival keeps writing where it writes; only the block's claim there ends.
            partial.slots[shard] = entry.slot
        partial.states[shard] = COMMITTED
        partial.checksums[shard] = checksum
        if any(state != COMMITTED for state in partial.states):
            return False
        del self.partials[space.id, entry.key]
        whole = Entry(entry.key, partial.parent, partial.position, 0)
        self._make_ready(space, whole, partial.slots, partial.checksums)
        return True

    def _holder(self, space: Namespace, key: bytes, shard: int, slot: int) -> Entry | None:
        for reservation in self.reservations.values():
            if reservation.space is space and reservation.shard == shard:
                for entry in reservation.entries:
                    if entry.slot == slot and entry.key == key and entry.state != COMMITTED:
                        return entry
        return None

    def _make_ready(
        self, space: Namespace, entry: Entry, slots: Sequence[int], checksums: Sequence[int]
    ) -> None:
        chains = self._ledger.chains
        run, place = chains.insert(space, entry.key, entry.parent, entry.position)
        chains.put_copy(run, place, self._ledger.top, slots, checksums)
        space.forget_note(entry.key)

    def fail_commit(self, reservation: Reservation, entries: Iterable[Entry]) -> None:
        """Copying failed: these entries are given back, the others stay."""
        for entry in entries:
            assert entry.state == TAKEN
            entry.state = COMMITTED
            self._give_back_slot(reservation.space, entry, reservation.shard)
        self._end_if_done(reservation)

    # --- the end of it

    def abort(self, reservation: Reservation) -> None:
        """Gives back what is not committed; entries being copied are given back when that ends."""
        reservation.ended = True
        for entry in reservation.entries:
            if entry.state == OPEN:
                entry.state = COMMITTED
                self._give_back_slot(reservation.space, entry, reservation.shard)
        self._end_if_done(reservation)

    def _end_if_done(self, reservation: Reservation) -> None:
        if all(entry.state == COMMITTED for entry in reservation.entries):
            reservation.ended = True
            self.reservations.pop(reservation.id, None)

    def _give_back_slot(self, space: Namespace, entry: Entry, shard: int) -> None:
        mine = entry.partial
        _leave(entry)
        partial = self.partials.get((space.id, entry.key))
        if partial is not None and partial.slots[shard] == entry.slot:
            if partial.states[shard] == TAKEN:
                partial.states[shard] = OPEN
        else:
            self._ledger.slots[self._ledger.top].release((entry.slot,))
        if partial is not None and partial is mine:
            self._drop_if_unwanted(partial)

    def _drop_if_unwanted(self, partial: Partial) -> None:
        """Nobody fills it and nothing is in it. While a writer with a slot of its own is left, its
        commit still needs the room of the other shards.
        """
        if not partial.writers and COMMITTED not in partial.states:
            self._drop_partial(partial)

    def _drop_partial(self, partial: Partial) -> None:
        del self.partials[partial.space.id, partial.key]
        self._ledger.slots[self._ledger.top].release(partial.slots)

    def clear(self, space: Namespace) -> None:
        """Blocks that wait for shards belong to the epoch that ends: forget them."""
        for partial in [p for p in self.partials.values() if p.space is space]:
            states = partial.states
            for shard in range(space.shards):
                if states[shard] == COMMITTED:
                    states[shard] = OPEN
            self._drop_if_unwanted(partial)

    def expire(self, now_s: float) -> list[Reservation]:
        """Ends reservations past their deadline."""
        over = [r for r in self.reservations.values() if r.deadline_s <= now_s and not r.ended]
        for reservation in over:
            self.abort(reservation)
        return over

    def expire_partials(self, now_s: float) -> None:
        """Gives up blocks whose other shards never came and that nobody writes any longer."""
        for partial in [p for p in self.partials.values() if p.deadline_s <= now_s]:
            if not partial.writers:
                self._drop_partial(partial)

    def held_slots(self) -> dict[TierId, int]:
        """Slots of reservations and partials, for the ledger's check."""
        top = self._ledger.top
        count = sum(len(partial.slots) for partial in self.partials.values())
        for reservation in self.reservations.values():
            for entry in reservation.entries:
                partial = self.partials.get((reservation.space.id, entry.key))
                own = partial is None or partial.slots[reservation.shard] != entry.slot
                count += own and entry.state != COMMITTED
        return {top: count}


def _leave(entry: Entry) -> None:
    """The entry writes no shard of its block any longer."""
    if entry.partial is not None:
        entry.partial.writers -= 1
        entry.partial = None
