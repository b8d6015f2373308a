"""A node without bytes: the real Ledger, Filling and Moves beside a model simple enough to trust.

The model is a dict of blocks (which tiers have a copy) and a dict of what lies in every slot.
Whoever may write a slot writes it (a reservation at once, a move when it ends), so a slot given to
two hands shows as wrong content, as it would on a real node. Moves and erasures end when the test
says so, in any order.

Does not: know runs, splits, policies or search; it probes every block of every prefix.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from dataclasses import dataclass

from kvtier.block import (
    BlockFormat,
    Found,
    GroupKind,
    Keys,
    Move,
    NamespaceSpec,
    Reason,
    SegmentPlan,
    TierId,
)
from kvtier.errors import ReservationExpired
from kvtier.ledger.chain import Namespace
from kvtier.ledger.filling import Filled, Filling
from kvtier.ledger.holdings import COMMITTED, Entry, Erasure, Lease, Reservation
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.units import KIB

DRAM, SSD = TierId.DRAM, TierId.SSD
Slot = tuple[TierId, int]
# What a slot holds: namespace, epoch, key, shard, version; or the writer that is filling it.
Content = tuple[object, ...]
Tiers = dict[bytes, set[TierId]]

PLANS = (
    SegmentPlan(DRAM, 4, 16 * KIB),
    SegmentPlan(SSD, 4, 32 * KIB, header_bytes=4 * KIB),
)
# Every block is named by its path; a chain is the list of a path's prefixes.
PATHS = ("aaaaaa", "aabbbb", "aabbcc", "aaaacc", "dddd", "ddae")


def spec(
    tenant: str, kib: int, *, shards: int = 1, tokens: int = 1, group: str = "full", window: int = 0
) -> NamespaceSpec:
    """A namespace whose shards are that many KiB."""
    shape = BlockFormat(
        layers=1, kv_heads=1, head_dim=1, dtype="float32", block_tokens=tokens, shards=shards,
        opaque_bytes=kib * KIB * shards, group=GroupKind(group), window_tokens=window,
    )  # fmt: skip
    return NamespaceSpec(model=f"{group}-{shards}-{kib}", format=shape, tenant=tenant)


SPECS = (
    spec("red", 4),
    spec("red", 4, group="sliding", window=3),
    spec("red", 8, group="state", tokens=2),
    spec("blue", 4, shards=2),
)
# In these nobody checksums before the bytes leave DRAM, and each store has other bytes.
TRUSTED = frozenset({1})


def key_of(path: str) -> bytes:
    return path.encode().ljust(16, b".")


def chain_of(path: str) -> list[bytes]:
    return [key_of(path[: depth + 1]) for depth in range(len(path))]


def descends(key: bytes, ancestor: bytes) -> bool:
    """Whether the block lies below the other."""
    return key != ancestor and key.rstrip(b".").startswith(ancestor.rstrip(b"."))


def checksum_of(content: Content) -> int:
    return zlib.crc32(repr(content).encode()) + 1


@dataclass
class Held:
    """A settled lease and what its slots held when it was answered."""

    slots: list[int]
    contents: list[Content]


class World:
    """Every rule of the state machine is a method; `check` is called after each."""

    def __init__(self) -> None:
        self.ledger = Ledger(PLANS)
        self.filling = Filling(self.ledger)
        self.moves = Moves(self.ledger, in_flight_max=6)
        self.spaces = [self.ledger.open_namespace(one) for one in SPECS]
        self.now_s = 0.0
        self.blocks: list[Tiers] = [{} for _ in SPECS]
        self.halves: dict[tuple[int, bytes], set[int]] = {}
        self.contents: dict[Slot, Content] = {}
        self.reservations: list[tuple[int, Reservation]] = []
        self.copying: list[tuple[int, Reservation, list[Entry]]] = []
        self.leases: list[tuple[int, Lease]] = []
        self.held: dict[int, Held] = {}
        self.running: list[Move] = []
        self.move_reads: dict[int, list[Content]] = {}
        self.erasing: list[Erasure] = []
        self.pinned: list[tuple[int, Keys]] = []
        self.emptied = False
        self.fresh: list[Move] = []
        self._versions = itertools.count(1)
        self._watch_segment_emptying()

    def _watch_segment_emptying(self) -> None:
        empty = self.moves._empty_a_segment

        def watched(tier: TierId, space: Namespace, moves: list[Move]) -> None:
            self.emptied = True
            empty(tier, space, moves)

        self.moves._empty_a_segment = watched  # type: ignore[method-assign]

    # --- filling

    def reserve(
        self, at: int, path: str, first: int, count: int, shard: int, session: int, many: int
    ) -> None:
        space, chain = self.spaces[at], chain_of(path)
        first = min(first, len(chain) - 1)
        keys = Keys.of(chain[first : first + count])
        used = self._used_slots()
        offer = self.filling.reserve(
            space,
            keys,
            parent=chain[first - 1] if first else b"",
            position=first,
            shard=shard % space.shards,
            session_id=session,
            count_max=many,
            now_s=self.now_s,
            deadline_s=self.now_s + 5,
        )
        covered = keys.split()[: offer.covered_count]
        granted = [keys[index] for index in offer.granted]
        assert offer.present_count + len(granted) == len(covered)
        assert not any(key in self.blocks[at] for key in granted), "present keys are skipped"
        if offer.reservation is None:
            assert not granted
            assert self._used_slots() == used, "nothing granted, yet something is held"
            return
        assert len(granted) == len(offer.reservation.entries) <= many
        for entry in offer.reservation.entries:
            self.contents[DRAM, entry.slot] = ("filling", offer.reservation.id)
        self.reservations.append((at, offer.reservation))

    def begin_commit(self, n: int, indexes: list[int] | None) -> None:
        if not self.reservations:
            return
        at, reservation = self.reservations[n % len(self.reservations)]
        open_now = [i for i, e in enumerate(reservation.entries) if e.state == 0]
        try:
            self.filling.get(reservation.id)
        except ReservationExpired:
            assert reservation.ended
            self.reservations.remove((at, reservation))
            return
        if indexes is not None:
            indexes = sorted({open_now[i % len(open_now)] for i in indexes} if open_now else ())
        if not open_now or indexes == []:
            return
        entries = self.filling.begin_commit(reservation, indexes)
        self.copying.append((at, reservation, entries))

    def end_commit(self, n: int, *, good: bool) -> None:
        if not self.copying:
            return
        at, reservation, entries = self.copying.pop(n % len(self.copying))
        if not good:
            self.filling.fail_commit(reservation, entries)
            return
        space, blocks = self.spaces[at], self.blocks[at]
        dead = reservation.ended or reservation.epoch != space.epoch
        version = next(self._versions) if at in TRUSTED else 0
        checksums = []
        for entry in entries:
            content = (at, space.epoch, entry.key, reservation.shard, version)
            self.contents[DRAM, entry.slot] = content
            checksums.append(0 if at in TRUSTED else checksum_of(content))
        before = set(blocks)
        filled = self.filling.finish_commit(reservation, entries, checksums)
        if dead:
            assert filled == Filled([], 0, 0), "an ended reservation stores nothing"
            return
        assert len(filled.ready) + filled.duplicate_count + filled.partial_count == len(entries)
        for key in (entry.key for entry in entries):
            shards = self.halves.setdefault((at, key), set())
            if key in filled.ready:
                assert key not in before
                assert shards | {reservation.shard} == set(range(space.shards)), "half a block"
                blocks[key] = {DRAM}
                del self.halves[at, key]
            elif key not in before and (space.id, key) in self.filling.partials:
                shards.add(reservation.shard)

    def abort(self, n: int) -> None:
        if self.reservations:
            self.filling.abort(self.reservations[n % len(self.reservations)][1])

    def end_session(self, session: int) -> None:
        for _, reservation in list(self.reservations):
            if reservation.session_id == session:
                self.filling.abort(reservation)
        for at, lease in list(self.leases):
            if lease.session_id == session:
                self._release(at, lease)

    def pass_time(self, seconds: int) -> None:
        self.now_s += seconds
        over = self.filling.expire(self.now_s)
        self.filling.expire_partials(self.now_s)
        for reservation in over:
            assert reservation.ended
        self._forget_dropped_halves()

    def _forget_dropped_halves(self) -> None:
        for at, key in list(self.halves):
            if (self.spaces[at].id, key) not in self.filling.partials:
                del self.halves[at, key]

    # --- lookup and lease

    def lookup(self, groups: list[tuple[int, str]]) -> tuple[list[Found], list[list[object]]]:
        asked = [(self.spaces[at], Keys.of(chain_of(path))) for at, path in groups]
        found, spans, tokens = self.ledger.lookup(asked)
        expected = self._longest([(at, chain_of(path)) for at, path in groups])
        assert tokens == expected, f"{tokens} tokens found, {expected} are restorable"
        for (at, path), one in zip(groups, found, strict=True):
            space, chain = self.spaces[at], chain_of(path)
            assert one.block_count == tokens // space.block_tokens
            needed = space.needed_blocks or one.block_count
            assert one.first_needed == max(0, one.block_count - needed)
            tiers = [min(self.blocks[at][k]) for k in chain[one.first_needed : one.block_count]]
            assert [t for run in one.runs for t in [run.tier] * run.block_count] == tiers
            assert (one.reason is Reason.NONE) == (one.block_count == len(chain))
        return found, spans  # type: ignore[return-value]

    def _longest(self, groups: list[tuple[int, list[bytes]]]) -> int:
        limit = min(len(chain) * self.spaces[at].block_tokens for at, chain in groups)
        return next(t for t in range(limit, -1, -1) if all(self._restorable(*g, t) for g in groups))

    def _restorable(self, at: int, chain: list[bytes], tokens: int) -> bool:
        space = self.spaces[at]
        count, rest = divmod(tokens, space.block_tokens)
        first = max(0, count - space.needed_blocks) if space.needed_blocks else 0
        return not rest and all(key in self.blocks[at] for key in chain[first:count])

    def lease(self, at: int, path: str, session: int) -> None:
        space, keys = self.spaces[at], Keys.of(chain_of(path))
        (found,), (spans,) = self.lookup([(at, path)])
        if not found.block_count or len(self.leases) > 5:
            return
        lease = self.ledger.lease(
            space,
            keys,
            found.block_count,
            found.first_needed,
            spans,  # type: ignore[arg-type]
            session_id=session,
            tenant=space.tenant,
            group="",
            now_s=self.now_s,
        )
        self.leases.append((at, lease))
        self._answer(at, lease)

    def _answer(self, at: int, lease: Lease) -> None:
        """A lease that was just settled: what its slots hold is what was asked for."""
        if lease.slots is None or lease.id in self.held:
            return
        space = self.spaces[at]
        slots = list(lease.slots)
        contents = [self.contents[DRAM, slot] for slot in slots]
        wanted = [
            (at, space.epoch, lease.keys[n], shard)
            for n in range(lease.first_needed, lease.count)
            for shard in range(space.shards)
        ]
        assert [content[:4] for content in contents] == wanted, "the lease reads other bytes"
        self.held[lease.id] = Held(slots, contents)

    def settle(self, n: int) -> None:
        if self.leases:
            at, lease = self.leases[n % len(self.leases)]
            self.ledger.settle_lease(lease)
            self._answer(at, lease)

    def shorten(self, n: int) -> None:
        if self.leases:
            at, lease = self.leases[n % len(self.leases)]
            self.ledger.shorten_lease(lease, Reason.DEADLINE)
            assert lease.slots is not None, "a shortened lease is answered"
            self._answer(at, lease)

    def release(self, n: int) -> None:
        if self.leases:
            self._release(*self.leases[n % len(self.leases)])

    def _release(self, at: int, lease: Lease) -> None:
        self.leases.remove((at, lease))
        self.held.pop(lease.id, None)
        assert self.ledger.release(lease.id)
        assert not self.ledger.release(lease.id)

    # --- moves

    def _planned(self, moves: list[Move]) -> None:
        for move in moves:
            self.running.append(move)
            self.fresh.append(move)
            source, target = move.route.source, move.route.target
            self.move_reads[move.id] = [self.contents[source, s] for s in move.source_slots]
            for slot in move.target_slots:
                assert (target, slot) not in self._read_slots(), "a target that somebody reads"
                self.contents[target, slot] = ("moving", move.id)

    def promote(self, at: int, path: str) -> None:
        _, (spans,) = self.lookup([(at, path)])
        before = self._snapshot()
        self._planned(self.moves.promote(self.spaces[at], spans, 8))  # type: ignore[arg-type]
        self._take_note(before)

    def promote_leased(self, n: int) -> None:
        if self.leases:
            at, lease = self.leases[n % len(self.leases)]
            before = self._snapshot()
            if lease.slots is None and not self.ledger.settle_lease(lease):
                spans = self.ledger.lease_spans(lease)
                self._planned(self.moves.promote(lease.space, spans, 8))
            self._take_note(before)
            self._answer(at, lease)

    def make_room(self, tier: TierId, at: int, count: int) -> None:
        before = self._snapshot()
        self._planned(self.moves.make_room(tier, self.spaces[at], count))
        self._take_note(before)

    def shrink_to(self, tier: TierId, share: int) -> None:
        before = self._snapshot()
        used = self.ledger.slots[tier].capacity_bytes * share // 4
        self._planned(self.moves.shrink_to(tier, used))
        self._take_note(before)

    def copy_down(self, count: int) -> None:
        before = self._snapshot()
        runs = list(self.ledger.chains.runs.values())
        self._planned(self.moves.copy_down(iter(runs), count))
        self._take_note(before)

    def _snapshot(self) -> list[Tiers]:
        self.emptied = False
        self.fresh = []
        return [{key: set(tiers) for key, tiers in blocks.items()} for blocks in self.blocks]

    def _take_note(self, before: list[Tiers]) -> None:
        """What the ledger chose to drop, having been asked for room: it may only drop a copy that
        exists below or is in the last tier, and only after those of all descendants.
        """
        for at, space in enumerate(self.spaces):
            now = self._real(space)
            for key, tiers in before[at].items():
                left = now.get(key, set())
                assert left <= tiers
                for tier in tiers - left:
                    # From the last tier it may be displaced by what the first sends down.
                    assert left or SSD in tiers, "a committed block is in no tier"
                    if not self.emptied:
                        self._check_leaf_first(space, key, tier, now)
            self.blocks[at] = now
        for move in self.fresh:
            space = self.ledger.spaces[move.namespace_id]
            dead = move.labels[0].epoch != space.epoch
            if move.drop_source and not self.emptied and not dead:
                key, source = move.labels[0].key, move.route.source
                self._check_leaf_first(space, key, source, self._real(space))

    def _check_leaf_first(self, space: Namespace, key: bytes, tier: TierId, now: Tiers) -> None:
        leaving = {
            move.labels[0].key
            for move in self.running
            if move.drop_source and move.namespace_id == space.id and move.route.source is tier
        }
        for other, tiers in now.items():
            if tier in tiers and other not in leaving and self._is_linked(space, other, key):
                raise AssertionError(f"{key!r} left {tier.label} before its descendant {other!r}")

    def _is_linked(self, space: Namespace, key: bytes, ancestor: bytes) -> bool:
        """Whether every block between the two has a place: then the ledger knows of it."""
        if not descends(key, ancestor):
            return False
        path = key.rstrip(b".").decode()
        first = len(ancestor.rstrip(b"."))
        between = [key_of(path[:depth]) for depth in range(first, len(path) + 1)]
        return all(k in space.index for k in between)

    def end_move(self, n: int, *, good: bool, corrupt: bool) -> None:
        if not self.running:
            return
        move = self.running.pop(n % len(self.running))
        space = self.ledger.spaces[move.namespace_id]
        at, key = self.spaces.index(space), move.labels[0].key
        source, target = move.route.source, move.route.target
        read = [self.contents[source, slot] for slot in move.source_slots]
        assert read == self.move_reads.pop(move.id), "the source changed while it was copied"
        tiers = self.blocks[at].get(key)
        if not good:
            self.moves.abort_move(move, source_corrupt=corrupt, written=n % 2 == 0)
            left = self._real(space).get(key, set())
            assert left in ([tiers or set()] + ([tiers - {source}] if tiers and corrupt else []))
            self._set(at, key, left)
            return
        for slot, content, label in zip(move.target_slots, read, move.labels, strict=True):
            self.contents[target, slot] = content
            label.checksum = checksum_of(content)
        done = self.moves.finish_move(move)
        left = self._real(space).get(key, set())
        if done:
            assert tiers
            assert target in left
            assert tiers - {source} <= left <= tiers | {target}
        else:
            assert left == (tiers or set()), "a move that is not wanted changes nothing"
        self._set(at, key, left)

    def _set(self, at: int, key: bytes, tiers: set[TierId]) -> None:
        self.blocks[at].pop(key, None)
        if tiers:
            self.blocks[at][key] = tiers

    def take_erasures(self) -> None:
        self.erasing.extend(self.ledger.take_erasures())

    def end_erasures(self, count: int) -> None:
        done, self.erasing = self.erasing[:count], self.erasing[count:]
        self.ledger.erased(done)

    def recycle(self, tenant: str) -> None:
        slots = self.ledger.slots[DRAM]
        segment = slots.foreign_free(tenant)
        if segment is not None:
            slots.recycled(segment)

    # --- losing, evicting, pinning

    def lose(self, at: int, path: str, depth: int, tier: TierId) -> None:
        key = chain_of(path)[depth % len(path)]
        self.ledger.lose(self.spaces[at], key, tier)
        self._set(at, key, self.blocks[at].get(key, set()) - {tier})

    def evict(self, at: int, path: str, depth: int) -> None:
        space, key = self.spaces[at], chain_of(path)[depth % len(path)]
        below = {
            other
            for other in self.blocks[at]
            if other == key or self._is_linked_below(space, other, key)
        }
        gone = self.ledger.evict(space, Keys.of([key]))
        assert len(gone) == len(set(gone))
        assert set(gone) == below, "an explicit evict takes the subtree"
        for other in gone:
            del self.blocks[at][other]

    def _is_linked_below(self, space: Namespace, key: bytes, ancestor: bytes) -> bool:
        if not descends(key, ancestor):
            return False
        path = key.rstrip(b".").decode()
        first = len(ancestor.rstrip(b".")) + 1
        return all(key_of(path[:depth]) in space.index for depth in range(first, len(path) + 1))

    def clear(self, at: int) -> None:
        space = self.spaces[at]
        epoch = space.epoch
        assert self.ledger.clear(space) == len(self.blocks[at])
        self.filling.clear(space)
        assert space.epoch == epoch + 1
        self.blocks[at] = {}
        self.halves = {half: shards for half, shards in self.halves.items() if half[0] != at}
        self.pinned = [pin for pin in self.pinned if pin[0] != at]

    def reap(self, count: int) -> None:
        self.ledger.reap(count)

    def pin(self, at: int, path: str) -> None:
        space, keys = self.spaces[at], Keys.of(chain_of(path))
        count = self.ledger.pin(space, keys)
        if count:
            self.pinned.append((at, Keys.of(keys.split()[:count])))

    def unpin(self, n: int) -> None:
        if self.pinned:
            at, keys = self.pinned.pop(n % len(self.pinned))
            self.ledger.unpin(self.spaces[at], keys)

    def end_everything(self, at: int) -> None:
        """When nobody holds anything, there is room for a block of every namespace."""
        while self.reservations:
            self.filling.abort(self.reservations.pop()[1])
        while self.copying:
            self.end_commit(0, good=False)
        while self.leases:
            self.release(0)
        self.pass_time(100)
        for space in self.spaces:
            space_pins = [run for run in self.ledger.chains.runs.values() if run.space is space]
            for run in space_pins:
                run.pins = 0
        self.pinned = []
        self._finish_work()
        while self.ledger.reap():
            pass
        self._finish_work()
        assert self.ledger.slots[DRAM].counts().used_slots == self.ledger_copies(DRAM)
        assert self.ledger.slots[SSD].counts().used_slots == self.ledger_copies(SSD)
        space = self.spaces[at]
        for _ in range(8):
            if self.ledger.slots[DRAM].available(space.tenant, space.slot_bytes[DRAM]) >= (
                space.shards
            ):
                return
            self.make_room(DRAM, at, space.shards)
            self._finish_work()
            self.recycle(space.tenant)
        raise AssertionError(f"no room for a block of {space!r}, though nobody holds anything")

    def ledger_copies(self, tier: TierId) -> int:
        runs = self.ledger.chains.runs.values()
        return sum(run.held[tier] * run.space.shards for run in runs)

    def _finish_work(self) -> None:
        while self.running or self.ledger.is_erasing:
            while self.running:
                self.end_move(0, good=True, corrupt=False)
            self.take_erasures()
            self.end_erasures(len(self.erasing))

    # --- what must hold after every step

    def _real(self, space: Namespace) -> Tiers:
        runs, found = self.ledger.chains.runs, {}
        for key, locator in space.index.items():
            state = runs[locator // 512].state[locator % 512]
            if state:
                found[key] = {tier for tier in (DRAM, SSD) if state >> tier & 1}
        return found

    def _used_slots(self) -> list[int]:
        return [self.ledger.slots[tier].counts().used_slots for tier in (DRAM, SSD)]

    def _read_slots(self) -> set[Slot]:
        reads = {(DRAM, slot) for held in self.held.values() for slot in held.slots}
        reads |= {(m.route.source, slot) for m in self.running for slot in m.source_slots}
        return reads

    def _hands(self) -> list[Slot]:
        """Every slot that something holds, once for each holder."""
        hands: list[Slot] = []
        for run in self.ledger.chains.runs.values():
            for place, state in enumerate(run.state):
                for tier in (DRAM, SSD):
                    if state >> tier & 1:
                        hands.extend((tier, slot) for slot in run.slots_of(place, tier))
        hands.extend(self.ledger._doomed)
        hands.extend((e.tier, e.slot) for e in [*self.ledger._erasures, *self.erasing])
        hands.extend((m.route.target, slot) for m in self.running for slot in m.target_slots)
        of_partials: set[Slot] = set()
        for partial in self.filling.partials.values():
            of_partials.update((DRAM, slot) for slot in partial.slots)
        hands.extend(of_partials)
        for reservation in self.filling.reservations.values():
            filling = [entry for entry in reservation.entries if entry.state != COMMITTED]
            own = {(DRAM, entry.slot) for entry in filling} - of_partials
            hands.extend(own)
        return hands

    def _in_use(self) -> set[Slot]:
        return {
            (tier, segment.index << 20 | index)
            for tier in (DRAM, SSD)
            for segment in self.ledger.slots[tier].segments
            for index, used in enumerate(segment.in_use)
            if used
        }

    def check(self) -> None:
        held = self.filling.held_slots()
        for tier, count in self.moves.held_slots().items():
            held[tier] = held.get(tier, 0) + count
        self.ledger.check(held=held)
        for at, space in enumerate(self.spaces):
            assert self._real(space) == self.blocks[at]
            assert space.block_count == len(self.blocks[at])
            assert space.placeholder_count == len(space.index) - len(self.blocks[at])
        hands = self._hands()
        assert len(hands) == len(set(hands)), "a slot is in two hands"
        assert set(hands) == self._in_use(), "a slot is in nobody's hands"
        self._check_contents()
        targets = [(m.namespace_id, m.labels[0].key, m.route.target) for m in self.running]
        assert len(targets) == len(set(targets)), "two moves of a block to one tier"
        if not self.leases:
            assert not any(run.leases for run in self.ledger.chains.runs.values())

    def _check_contents(self) -> None:
        for at, space in enumerate(self.spaces):
            for key, tiers in self.blocks[at].items():
                run, place = self.ledger.chains.find(space, key) or (None, 0)
                assert run is not None
                copies: list[list[Content]] = []
                for tier in sorted(tiers):
                    slots: array[int] = run.slots_of(place, tier)
                    copies.append([self.contents[tier, slot] for slot in slots])
                wanted = [(at, space.epoch, key, shard) for shard in range(space.shards)]
                for copy in copies:
                    assert [content[:4] for content in copy] == wanted, "a block has other bytes"
                    assert copy == copies[0], "two copies of one block differ"
        for held in self.held.values():
            now = [self.contents[DRAM, slot] for slot in held.slots]
            assert now == held.contents, "what a lease reads was overwritten"
