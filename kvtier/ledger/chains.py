"""Chains: the prefix forest. Keeps runs, the index, policies and slot owners in step.

A block's place in the forest and its copies are separate things: `insert` makes a place (a
placeholder, nothing held), `put_copy` and `drop_copy` say which tiers hold bytes for it, `trim`
forgets places at the end of a chain that hold nothing. A placeholder inside a chain stays while
a descendant lives, and a later commit refills it.

Chains may start in the middle: a run whose parent key is not known (yet) waits in
`space.orphans` and is attached when that key appears.

Invariants (check): the index names exactly the places of the runs; `held`, `below` and the
policies agree with the state bytes; every slot of a copy names its run as owner.

Does not: acquire or release slots, or know leases beyond telling `on_split` of a cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from kvtier.block import TierId
from kvtier.ledger.chain import RUN_BLOCKS_MAX, Namespace, Run
from kvtier.ledger.forest import check_forest
from kvtier.ledger.policy import Policy
from kvtier.ledger.slots import TierSlots


class Chains:
    """All runs of all namespaces. Event loop only; nothing here awaits."""

    def __init__(
        self,
        slots: dict[TierId, TierSlots],
        policies: dict[TierId, Policy],
        on_split: Callable[[Run, Run], None],
    ) -> None:
        self.runs: dict[int, Run] = {}
        self.slots = slots
        self.policies = policies
        # Blocks that only the first tier has: how many, by run (dead ones left out), and in all.
        self.dirty: dict[int, int] = {}
        self.dirty_count = 0
        self._only_top = 1 << min(slots)
        self._on_split = on_split
        self._last_id = 0
        self.now_s = 0  # wall clock, rounded down: told from outside, now and then

    # --- finding

    def find(self, space: Namespace, key: bytes) -> tuple[Run, int] | None:
        """Where the key's place is, held or not."""
        locator = space.index.get(key)
        if locator is None:
            return None
        return self.runs[locator // RUN_BLOCKS_MAX], locator % RUN_BLOCKS_MAX

    # --- places

    def insert(self, space: Namespace, key: bytes, parent: bytes, position: int) -> tuple[Run, int]:
        """The key's place, made if there is none. `position` counts only when the parent is
        not known. Raises nothing.
        """
        found = self.find(space, key)
        if found is not None:
            return found
        at_parent = self.find(space, parent) if parent else None
        if at_parent is None:
            run = self._new_run(space, parent, position)
            if parent:
                space.orphans.setdefault(parent, []).append(run.id)
        else:
            run, place = at_parent
            if place + 1 < len(run):
                self.split(run, place + 1)
            # What grows from a pinned stretch is not pinned with it (nor unpinned later).
            if run.children is not None or len(run) == RUN_BLOCKS_MAX or run.pins:
                child = self._new_run(space, parent, run.position + len(run))
                self._attach(run, child)
                run = child
        return run, self._append(run, key)

    def _new_run(self, space: Namespace, parent_key: bytes, position: int) -> Run:
        self._last_id += 1
        run = Run(self._last_id, space, parent_key, position)
        self.runs[run.id] = run
        return run

    def _append(self, run: Run, key: bytes) -> int:
        space, place = run.space, len(run.state)
        space.key_size = len(key)
        run.keys += key
        run.state.append(0)
        for held in run.slots:
            if held is not None:
                held.extend((0,) * space.shards)
        run.checksums.extend((0,) * space.shards)
        run.written.append(0)
        space.index[key] = run.id * RUN_BLOCKS_MAX + place
        space.placeholder_count += 1
        if space.orphans:
            for orphan_id in space.orphans.pop(key, ()):
                if not self._descends(run, orphan_id):
                    self._attach(run, self.runs[orphan_id])
        return place

    def _descends(self, run: Run, ancestor_id: int) -> bool:
        """Whether attaching that orphan here would close a circle (keys that are no hashes can)."""
        while run.id != ancestor_id and run.parent:
            run = self.runs[run.parent]
        return run.id == ancestor_id

    def adopt(
        self,
        space: Namespace,
        tier: TierId,
        *,
        parent: bytes,
        position: int,
        keys: Sequence[bytes],
        packed: bytes,
        slots: array[int],
        checksums: array[int],
        written: array[int],
    ) -> Run | None:
        """A whole unbranched stretch, found again at start, as one new run held in the tier.

        No orphan may wait for one of its keys. None, and nothing was changed, when one of them is
        placed already.
        """
        first = (self._last_id + 1) * RUN_BLOCKS_MAX
        if not space.index.add(keys, packed[:: len(keys[0])], first):
            return None
        at_parent = self.find(space, parent) if parent else None
        if at_parent is not None:
            position = at_parent[0].position + at_parent[1] + 1
        run = self._new_run(space, parent, position)
        run.keys = bytearray(packed)
        run.state = bytearray((1 << tier,)) * len(keys)
        run.slots[tier], run.checksums = slots, checksums
        run.written, run.oldest_s = written, min(written)
        run.held[tier] = len(keys)
        space.block_count += len(keys)
        if 1 << tier == self._only_top:
            self._count_dirty(run, len(keys))
        self.policies[tier].add(run.id)
        self.slots[tier].set_owner(slots, run.id)
        if at_parent is not None:
            above, place = at_parent
            if place + 1 < len(above):
                self.split(above, place + 1)
            self._attach(above, run)
        elif parent:
            space.orphans.setdefault(parent, []).append(run.id)
        return run

    def _attach(self, run: Run, child: Run) -> None:
        child.parent = run.id
        if run.children is None:
            run.children = set()
        run.children.add(child.id)
        for tier in self.slots:
            if child.held[tier] or child.below[tier]:
                self._count_below(run, tier, 1)

    def _count_below(self, run: Run, tier: TierId, delta: int) -> None:
        """A child's subtree began (+1) or ceased (-1) to hold copies; tells the ancestors."""
        while True:
            had = run.held[tier] or run.below[tier]
            run.below[tier] += delta
            has = run.held[tier] or run.below[tier]
            if bool(had) == bool(has) or not run.parent:
                return
            run = self.runs[run.parent]

    def split(self, run: Run, place: int) -> Run:
        """Cuts the run before `place`; the tail becomes its only child. Returns the tail."""
        assert 0 < place < len(run)
        space = run.space
        tail = self._new_run(space, run.key(place - 1), run.position + place)
        cut, shards = place * space.key_size, space.shards
        tail.keys, tail.state = run.keys[cut:], run.state[place:]
        del run.keys[cut:], run.state[place:]
        tail.checksums = run.checksums[place * shards :]
        del run.checksums[place * shards :]
        tail.written, tail.oldest_s = run.written[place:], run.oldest_s
        del run.written[place:]
        for tier, held in enumerate(run.slots):
            if held is not None:
                tail.slots[tier] = held[place * shards :]
                del held[place * shards :]
        self._reindex(tail)
        tail.children, run.children = run.children, {tail.id}
        tail.parent = run.id
        for child_id in tail.children or ():
            self.runs[child_id].parent = tail.id
        tail.below, run.below = run.below, [0] * len(run.below)
        for tier_id in self.slots:
            self._split_tier(run, tail, tier_id)
        tail.pins, tail.condemned = run.pins, run.condemned
        dirty = tail.state.count(self._only_top) if run.id in self.dirty else 0
        if dirty:
            self._count_dirty(run, -dirty)
            self._count_dirty(tail, dirty)
        if run.leases:
            tail.leases = set(run.leases)
            self._on_split(run, tail)
        return tail

    def _reindex(self, run: Run) -> None:
        size, parts, keys = run.space.key_size, run.space.index.parts, bytes(run.keys)
        locator = run.id * RUN_BLOCKS_MAX
        for place in range(len(run)):
            key = keys[place * size : (place + 1) * size]
            parts[key[0]][key] = locator + place

    def _split_tier(self, run: Run, tail: Run, tier: TierId) -> None:
        if run.held[tier]:
            bit, shards, slots = 1 << tier, run.space.shards, tail.slots[tier]
            assert slots is not None
            places = [place for place, state in enumerate(tail.state) if state & bit]
            tail.held[tier] = len(places)
            run.held[tier] -= len(places)
            owned = slots if len(places) == len(tail) else _of(slots, places, shards)
            self.slots[tier].set_owner(owned, tail.id)
            if tail.held[tier]:
                self.policies[tier].split(run.id, tail.id)
                if not run.held[tier]:
                    self.policies[tier].remove(run.id)
        if tail.held[tier] or tail.below[tier]:
            run.below[tier] = 1

    def trim(self, run: Run, why: str) -> None:
        """Forgets places that hold nothing at the ends of chains, from this run upwards."""
        while True:
            while run.state and not run.state[-1] and run.children is None:
                self._forget_last(run, why)
            if run.state:
                return
            parent_id = run.parent
            self._remove(run)
            if not parent_id:
                return
            run = self.runs[parent_id]

    def _forget_last(self, run: Run, why: str) -> None:
        space = run.space
        key = bytes(run.keys[-space.key_size :])
        del run.keys[-space.key_size :]
        run.state.pop()
        for held in run.slots:
            if held is not None:
                del held[-space.shards :]
        del run.checksums[-space.shards :]
        run.written.pop()
        del space.index[key]
        space.placeholder_count -= 1
        space.remember(key, why)

    def _remove(self, run: Run) -> None:
        assert not run.state
        assert run.children is None
        if run.parent:
            siblings = self.runs[run.parent].children
            assert siblings is not None
            siblings.remove(run.id)
            if not siblings:
                self.runs[run.parent].children = None
        elif run.parent_key:
            waiting = run.space.orphans.get(run.parent_key)
            if waiting is not None and run.id in waiting:
                waiting.remove(run.id)
                if not waiting:
                    del run.space.orphans[run.parent_key]
        del self.runs[run.id]

    # --- copies

    def put_copy(
        self, run: Run, place: int, tier: TierId, slots: Sequence[int],
        checksums: Sequence[int] | None = None,
        written_s: int | None = None,
    ) -> None:  # fmt: skip
        """The block has a readable copy in the tier now: one slot (and checksum) a shard. Its first
        one counts as stored at `written_s` (None: now).
        """
        space, bit = run.space, 1 << tier
        assert not run.state[place] & bit, "a block has at most one copy in a tier"
        first, end = place * space.shards, (place + 1) * space.shards
        held = run.slots[tier]
        if held is None:
            held = run.slots[tier] = array("I", bytes(4 * space.shards * len(run)))
        held[first:end] = array("I", slots)
        if checksums is not None:
            run.checksums[first:end] = array("Q", checksums)
        before = run.state[place]
        stored_s = self.now_s if written_s is None else written_s
        if not before or (written_s is not None and stored_s < run.written[place]):
            run.written[place] = stored_s
            run.oldest_s = min(run.oldest_s, stored_s)
        if not before:
            space.placeholder_count -= 1
            space.block_count += 1
        run.state[place] = before | bit
        if bit == self._only_top and not before:
            self._count_dirty(run, 1)
        elif before == self._only_top:
            self._count_dirty(run, -1)
        run.held[tier] += 1
        if run.held[tier] == 1:
            self.policies[tier].add(run.id)
            if not run.below[tier] and run.parent:
                self._count_below(self.runs[run.parent], tier, 1)
        self.slots[tier].set_owner(slots, run.id)

    def drop_copy(self, run: Run, place: int, tier: TierId) -> array[int]:
        """The block has no copy in the tier any longer; returns its slots, still acquired.

        The place stays: call `trim` when done with the run.
        """
        space, bit = run.space, 1 << tier
        assert run.state[place] & bit, "no copy to drop"
        slots = run.slots_of(place, tier)
        left = run.state[place] & ~bit
        run.state[place] = left
        if not left:
            space.placeholder_count += 1
            space.block_count -= 1
            if bit == self._only_top:
                self._count_dirty(run, -1)
        elif left == self._only_top:
            self._count_dirty(run, 1)
        run.held[tier] -= 1
        if not run.held[tier]:
            run.slots[tier] = None
            self.policies[tier].remove(run.id)
            if not run.below[tier] and run.parent:
                self._count_below(self.runs[run.parent], tier, -1)
        self.slots[tier].set_owner(slots, 0)
        return slots

    def move_copy(self, run: Run, place: int, tier: TierId, slots: Sequence[int]) -> array[int]:
        """The copy lies in these slots from now on; returns the former, still acquired."""
        former, held, first = run.slots_of(place, tier), run.slots[tier], place * run.space.shards
        assert held is not None
        held[first : first + len(former)] = array("I", slots)
        self.slots[tier].set_owner(former, 0)
        self.slots[tier].set_owner(slots, run.id)
        return former

    def _count_dirty(self, run: Run, delta: int) -> None:
        if run.condemned:
            return
        self.dirty_count += delta
        count = self.dirty.get(run.id, 0) + delta
        if count:
            self.dirty[run.id] = count
        else:
            del self.dirty[run.id]

    def condemn(self, run: Run, ghost: Namespace) -> None:
        """The run's namespace begins a new epoch without it: it belongs to the ghost of the old."""
        self.dirty_count -= self.dirty.pop(run.id, 0)
        run.space, run.condemned, run.pins = ghost, True, 0

    def touch(self, run: Run) -> None:
        """The run was used now. For a chain: call it from its end to its start."""
        for tier in self.slots:
            if run.held[tier]:
                self.policies[tier].touch(run.id)

    # --- books

    def check(self) -> None:
        """Raises InvariantViolated when the forest disagrees with itself. O(blocks)."""
        check_forest(self.runs, self.slots, self.policies, self.dirty, self.dirty_count)


def _of(slots: array[int], places: Sequence[int], shards: int) -> list[int]:
    return [slot for p in places for slot in slots[p * shards : (p + 1) * shards]]
