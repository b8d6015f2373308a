"""Moves: what must be copied where, so that there is room, and what was asked for is near.

    plan (slots taken below or above) --> Move --mover--> finish_move | abort_move

- **make_room**: the policy's oldest runs give blocks from their ends. A copy that exists below
  too is dropped at once; another is demoted (its slot is free when the move finishes); in the
  lowest tier it is forgotten.
- **promote**: brings a lease's (or prefetch's) blocks to the first tier, shallow ones first.
- **copy_down**: writes below what is only above (flush, drain, durable commits); drops nothing.

One move per block and target tier at a time; the source is never freed before the target is
readable; a move that fails changes nothing.

Does not: run moves (transfer/mover.py) or wait for anything (store.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvtier.block import SLOT_BITS, Keys, Move, Route, TierId
from kvtier.errors import InvariantViolated
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.givers import Givers
from kvtier.ledger.ledger import DISPLACED, Ledger
from kvtier.ledger.search import Span

# One call plans no more moves, and takes no more blocks, than the event loop can spare the time
# for (DESIGN section 9: no pause over 5 ms; 40 us a move, 10 us a copy dropped). Callers come
# again.
PLANNED_MAX = 64
TAKEN_MAX = 256


class Moves:
    """Planned and running moves of one ledger. Event loop only."""

    def __init__(self, ledger: Ledger, *, in_flight_max: int = 1024) -> None:
        self._ledger = ledger
        self.in_flight_max = in_flight_max
        self.moves: dict[int, Move] = {}
        self.by_target: dict[tuple[int, bytes, TierId], int] = {}
        self._givers = Givers(ledger)

    @property
    def is_full(self) -> bool:
        """Whether as many moves run as may."""
        return len(self.moves) >= self.in_flight_max

    # --- room

    def make_room(self, tier: TierId, space: Namespace, count: int) -> list[Move]:
        """Frees room for `count` slots of this namespace's size in the tier, now or when the
        returned moves (and erasures) are done. May free less, and takes a bounded number of blocks
        at a time: ask again after progress.
        """
        tenant, slot_bytes = space.tenant, space.slot_bytes[tier]
        moves: list[Move] = []
        expected = self._expected(tier, tenant, slot_bytes)
        wanted = min(count, expected + TAKEN_MAX * space.shards)
        if expected >= wanted:
            return moves
        for run in self._givers.candidates(tier, (tenant, slot_bytes)):
            self._take_from(run, tier, wanted - expected, moves)
            expected = self._expected(tier, tenant, slot_bytes)
            if expected >= wanted or len(moves) >= PLANNED_MAX:
                return moves
        # Fewer slots than a block has shards are no room at all.
        if self._ledger.slots[tier].available(tenant, slot_bytes) < space.shards:
            self._empty_a_segment(tier, space, moves)
        return moves

    def _expected(self, tier: TierId, tenant: str, slot_bytes: int) -> int:
        """Slots free now, or soon by moves and erasures that are under way."""
        leaving = self._givers.leaving.get((tier, (tenant, slot_bytes)), 0)
        leaving += self._ledger.erasing.get((tier, (tenant, slot_bytes)), 0)
        return self._ledger.slots[tier].available(tenant, slot_bytes) + leaving

    def shrink_to(self, tier: TierId, used_bytes: int) -> list[Move]:
        """Demotes (or forgets) until the tier's used bytes, less what is leaving or being erased,
        are there. Takes nothing of a tenant's guaranteed share, and a bounded number of blocks at a
        time: ask again while `excess_bytes` shrinks.
        """
        moves: list[Move] = []
        left = TAKEN_MAX
        for run in self._givers.candidates(tier):
            tenant, slot_bytes = run.space.tenant, run.space.slot_bytes[tier]
            excess = self.excess_bytes(tier, used_bytes)
            if excess <= 0 or self.is_full or len(moves) >= PLANNED_MAX or left <= 0:
                break
            count = min(
                -(-excess // slot_bytes),
                self._givers.spare_bytes(tier, tenant) // slot_bytes,
                left * run.space.shards,
            )
            left -= self._take_from(run, tier, count, moves)
        return moves

    def excess_bytes(self, tier: TierId, used_bytes: int) -> int:
        """How much more the tier uses than that, and will when all that is leaving has left."""
        # Slots whose records are being erased are used still: without them in the sum, each run in
        # turn would be asked for the whole excess.
        going = self._givers.going_bytes(tier, None)
        return self._ledger.slots[tier].used_bytes - going - used_bytes

    def _take_from(self, run: Run, tier: TierId, slot_count: int, moves: list[Move]) -> int:
        """Takes blocks from the run's end until `slot_count` slots are (to be) free. Returns how
        many blocks.
        """
        ledger, shards, taken = self._ledger, run.space.shards, 0
        bit, lower = 1 << tier, self._next_below(tier, run.space)
        for place in range(len(run) - 1, ledger.leased_end(run) - 1, -1):
            if slot_count <= 0 or len(moves) >= PLANNED_MAX:
                break
            state = run.state[place]
            if not state & bit:
                continue
            if self._is_read(run, place, tier):
                if self._is_leaving(run, place, tier):
                    continue  # not to be taken twice
                break  # being copied: it stays, and so do its ancestors
            if state >> (tier + 1) or run.condemned:
                ledger.free(run, place, tier, DISPLACED)
            elif lower is None:
                if run.pins:
                    break
                ledger.free(run, place, tier, DISPLACED)
                ledger.evicted_blocks += not run.state[place]
            else:
                move = self._plan(run, place, Route(tier, lower), drop_source=True)
                if move is None:
                    break
                moves.append(move)
            slot_count -= shards
            taken += 1
        ledger.chains.trim(run, DISPLACED)
        return taken

    def _next_below(
        self, tier: TierId, space: Namespace, *, asked_for: bool = False
    ) -> TierId | None:
        """The next tier down that takes copies of this size now; None = this is the last. A spent
        one only takes what was `asked_for`.
        """
        ledger = self._ledger
        for lower in ledger.tiers:
            fits = space.slot_bytes[lower] <= ledger.plans[lower].size_bytes
            takes = asked_for or lower not in ledger.spent_tiers
            if lower > tier and lower not in ledger.closed_tiers and takes and fits:
                return lower
        return None

    def _is_read(self, run: Run, place: int, tier: TierId) -> bool:
        return (tier, run.slots_of(place, tier)[0]) in self._ledger.readers

    def _is_leaving(self, run: Run, place: int, tier: TierId) -> bool:
        readers = self._ledger.readers[tier, run.slots_of(place, tier)[0]]
        return any(self.moves[reader].drop_source for reader in readers if reader in self.moves)

    def _empty_a_segment(self, tier: TierId, space: Namespace, moves: list[Move]) -> None:
        """The tier has no room for this slot size or tenant: empties the segment (of another
        class) whose most recently used run is the oldest.
        """
        ledger, slots = self._ledger, self._ledger.slots[tier]
        mine = (space.tenant, space.slot_bytes[tier])
        rank = {run_id: n for n, run_id in enumerate(ledger.chains.policies[tier].order())}
        best: tuple[int, int] | None = None
        for segment in slots.segments:
            if segment.slot_class is None or segment.slot_class == mine:
                continue
            tenant, slot_bytes = segment.slot_class
            spare = self._givers.spare_bytes(tier, tenant) if tenant != space.tenant else None
            if spare is not None and spare < segment.used * slot_bytes:
                continue  # emptying it would eat into that tenant's guaranteed share
            owners = set(slots.owners(segment.index))
            runs = [ledger.chains.runs[owner] for owner in owners]
            if any(run.leases for run in runs) or not runs:
                continue
            newest = max(rank.get(owner, 0) for owner in owners)
            if best is None or newest < best[0]:
                best = (newest, segment.index)
        if best is not None:
            before = slots.segments[best[1]].used
            for owner in list(slots.owners(best[1])):
                dropped = before - slots.segments[best[1]].used
                if len(moves) >= PLANNED_MAX or dropped >= TAKEN_MAX * space.shards:
                    break
                self._leave_segment(ledger.chains.runs[owner], tier, best[1], moves)

    def _leave_segment(self, run: Run, tier: TierId, segment: int, moves: list[Move]) -> None:
        """Takes the run's blocks that lie in the segment, wherever in the chain they are."""
        bit, lower = 1 << tier, self._next_below(tier, run.space)
        for place in range(len(run) - 1, -1, -1):
            if not run.state[place] & bit or self._is_read(run, place, tier):
                continue
            if all(slot >> SLOT_BITS != segment for slot in run.slots_of(place, tier)):
                continue
            if len(moves) >= PLANNED_MAX:
                break
            above = run.state[place] >> (tier + 1)
            if above or run.condemned or (lower is None and not run.pins):
                self._ledger.free(run, place, tier, DISPLACED)
                self._ledger.evicted_blocks += not (run.state[place] or run.condemned)
            elif lower is not None:
                move = self._plan(run, place, Route(tier, lower), drop_source=True)
                if move is None:
                    break
                moves.append(move)
        self._ledger.chains.trim(run, DISPLACED)

    # --- planning one

    def _plan(self, run: Run, place: int, route: Route, *, drop_source: bool) -> Move | None:
        """A move of this block, its target slots acquired; None when there is no room (room below
        is made for the next try), too many are running, or one to that tier is running.
        """
        ledger, space = self._ledger, run.space
        key = run.key(place)
        target_key = (space.id, key, route.target)
        if self.is_full or target_key in self.by_target:
            return None
        slots, slot_bytes = ledger.slots[route.target], space.slot_bytes[route.target]
        if slot_bytes > slots.plan.size_bytes:
            return None
        if slots.available(space.tenant, slot_bytes) < space.shards:
            if route.target is not ledger.tiers[-1] or route.target is ledger.top:
                return None
            # The lowest tier only forgets: no moves; slots come back when records are erased.
            self.make_room(route.target, space, self._batch(space, route.target))
            if slots.available(space.tenant, slot_bytes) < space.shards:
                return None
        move = Move(
            id=ledger.next_id(),
            namespace_id=space.id,
            route=route,
            source_slots=tuple(run.slots_of(place, route.source)),
            target_slots=tuple(slots.acquire(space.tenant, slot_bytes, space.shards)),
            source_slot_bytes=space.slot_bytes[route.source],
            target_slot_bytes=slot_bytes,
            labels=tuple(ledger.label(run, place, shard) for shard in range(space.shards)),
            drop_source=drop_source,
        )
        self.begin(space, move)
        return move

    def begin(self, space: Namespace, move: Move) -> None:
        """It runs: its source slots are read until `end`."""
        self.moves[move.id] = move
        self.by_target[space.id, move.labels[0].key, move.route.target] = move.id
        for slot in move.source_slots:
            self._ledger.readers.setdefault((move.route.source, slot), set()).add(move.id)
        if move.drop_source:
            self._count_leaving(space, move, 1)

    def _batch(self, space: Namespace, tier: TierId) -> int:
        """Slots to free at once: erasing is cheap in batches; of a small tier at most a 16th."""
        share = self._ledger.slots[tier].capacity_bytes // space.slot_bytes[tier] // 16
        return max(min(64 * space.shards, share), space.shards)

    def _count_leaving(self, space: Namespace, move: Move, sign: int) -> None:
        tier, size = move.route.source, move.source_slot_bytes
        key, leaving = (tier, (space.tenant, size)), self._givers.leaving
        leaving[key] = leaving.get(key, 0) + sign * len(move.source_slots)

    def promote(self, space: Namespace, spans: list[Span], count_max: int) -> list[Move]:
        """Moves that bring these blocks to the first tier, shallow ones first; as many as find
        room now, and demotions that make room for the rest. Ask again after progress.
        """
        top, moves = self._ledger.top, []
        wanted = [
            (run.id, run.key(place))
            for run, start, end in spans
            if run.held[top] < len(run)
            for place in range(start, end)
            if not run.state[place] >> top & 1
        ][:count_max]
        wanted = [w for w in wanted if (space.id, w[1], top) not in self.by_target]
        if not wanted:
            return []
        moves.extend(self.make_room(top, space, len(wanted) * space.shards))
        for _, key in wanted:
            found = self._ledger.chains.find(space, key)
            if found is None or found[0].state[found[1]] >> top & 1:
                continue
            run, place = found
            state = run.state[place]
            if not state:
                break
            source = TierId((state & -state).bit_length() - 1)
            move = self._plan(run, place, Route(source, top), drop_source=False)
            if move is None:
                break
            moves.append(move)
        return moves

    def pending(self, space: Namespace, keys: Keys, first: int, end: int) -> int:
        """How many of these blocks are on their way to the first tier."""
        top = self._ledger.top
        return sum((space.id, keys[at], top) in self.by_target for at in range(first, end))

    def copy_down(self, runs: Iterator[Run], count_max: int) -> list[Move]:
        """At most `count_max` (and PLANNED_MAX) moves that write below what these runs have only
        in the first tier; ancestors first.
        """
        top = self._ledger.top
        moves: list[Move] = []
        for run in runs:
            if self.is_full:
                break
            lower = self._next_below(top, run.space, asked_for=True)
            if not run.held[top] or run.condemned or lower is None:
                continue
            place = -1
            while (place := run.state.find(1 << top, place + 1)) >= 0:
                if (run.space.id, run.key(place), lower) in self.by_target:
                    continue
                move = self._plan(run, place, Route(top, lower), drop_source=False)
                if move is None:
                    return moves
                moves.append(move)
                if len(moves) >= min(count_max, PLANNED_MAX):
                    return moves
        return moves

    # --- telling what became of them

    def finish_move(self, move: Move) -> bool:
        """The target holds the bytes: it becomes a copy, the source of a demotion is freed. False
        when the block went away meanwhile: the target is given back.
        """
        ledger, route = self._ledger, move.route
        space = self.end(move)
        found = ledger.chains.find(space, move.labels[0].key)
        wanted = (
            found is not None
            and space.epoch == move.labels[0].epoch
            and found[0].state[found[1]] != 0
            and not found[0].state[found[1]] >> route.target & 1
            and self._same_bytes(move, found[0], found[1])
        )
        if found is None or not wanted:
            ledger.discard_target(route.target, move.target_slots, move.labels, written=True)
            ledger.end_holder(move.id)
            return False
        run, place = found
        checksums = [label.checksum for label in move.labels]
        ledger.chains.put_copy(run, place, route.target, move.target_slots, checksums)
        bit = 1 << route.source
        if (
            move.drop_source
            and run.state[place] & bit
            and place >= ledger.leased_end(run)
            and tuple(run.slots_of(place, route.source)) == move.source_slots
            and not self._is_read(run, place, route.source)
        ):
            ledger.free(run, place, route.source, DISPLACED)
        ledger.end_holder(move.id)
        return True

    @staticmethod
    def _same_bytes(move: Move, run: Run, place: int) -> bool:
        """Whether what was copied is what the block is now, not what it was before it was evicted
        and stored again.
        """
        source, shards = move.route.source, run.space.shards
        there = run.state[place] >> source & 1
        # A slot that a move reads is given to nobody else: the same slots are the same bytes, also
        # when no checksum was taken yet (0: single-tenant trust; the tier that wrote it took it),
        # or a recovered copy is encrypted and had only its tag.
        if there and tuple(run.slots_of(place, source)) == move.source_slots:
            return True
        checksums = run.checksums[place * shards : (place + 1) * shards]
        return all(
            known == label.checksum for label, known in zip(move.labels, checksums, strict=True)
        )

    def abort_move(self, move: Move, *, source_corrupt: bool, written: bool = False) -> None:
        """It failed: the target is given back, the source stays, unless its bytes are damaged:
        then that copy is lost.
        """
        ledger = self._ledger
        space = self.end(move)
        ledger.discard_target(move.route.target, move.target_slots, move.labels, written=written)
        found = ledger.chains.find(space, move.labels[0].key)
        if source_corrupt and found is not None:
            run, place = found
            bit = 1 << move.route.source
            if (
                run.state[place] & bit
                and tuple(run.slots_of(place, move.route.source)) == move.source_slots
            ):
                ledger.lose(space, move.labels[0].key, move.route.source)
        ledger.end_holder(move.id)

    def end(self, move: Move) -> Namespace:
        """It is over, whatever became of it; raises InvariantViolated the second time."""
        ledger = self._ledger
        if self.moves.pop(move.id, None) is None:
            raise InvariantViolated(f"move {move.id} ended twice")
        space = ledger.spaces[move.namespace_id]
        del self.by_target[space.id, move.labels[0].key, move.route.target]
        for slot in move.source_slots:
            readers = ledger.readers[move.route.source, slot]
            readers.discard(move.id)
            if not readers:
                del ledger.readers[move.route.source, slot]
        if move.drop_source:
            self._count_leaving(space, move, -1)
        return space

    def held_slots(self) -> dict[TierId, int]:
        """Target slots of running moves, for the ledger's check."""
        held: dict[TierId, int] = {}
        for move in self.moves.values():
            target = move.route.target
            held[target] = held.get(target, 0) + len(move.target_slots)
        return held
