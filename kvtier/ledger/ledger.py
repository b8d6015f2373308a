"""Ledger: every decision about blocks, as transactions that never await.

Verbs in the order of a block's life: open_namespace, lookup, lease, release, reserve, commit,
evict, clear. What must be done with bytes is returned or left to be taken: `moves.py` plans
`Move`s, and `take_erasures` names lower-tier slots whose record must be wiped before the slot is
free again (`erased`).

Invariants, all verified by check() and hammered by tests/model:
  1. a committed block is never in no tier, unless it was evicted, cleared, lost or displaced;
  2. a slot that a lease or a move reads is not released before they end;
  3. slots used == slots of copies + partials + reservations + moves + doomed + being erased;
  4. one move per block and target tier;
  5. everything held has a session or a deadline.

Does not: know time (the caller passes `now_s`), bytes, threads, or files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

from kvtier.block import (
    SLOT_BITS,
    Found,
    Keys,
    NamespaceSpec,
    Reason,
    SegmentPlan,
    SlotLabel,
    TierId,
)
from kvtier.errors import InvalidRequest, InvariantViolated, LimitReached, NotFound
from kvtier.ledger import search
from kvtier.ledger.chain import RUN_BLOCKS_MAX, TIER_COUNT, Namespace, Run
from kvtier.ledger.chains import Chains
from kvtier.ledger.holdings import Erasure, Lease
from kvtier.ledger.index import Index
from kvtier.ledger.policy import make_policy
from kvtier.ledger.search import Span, length
from kvtier.ledger.segment import SlotClass
from kvtier.ledger.slots import TierSlots

# Leases of one run looked at to see how far it is leased; with more, all of it counts as leased.
_LEASES_ASKED_MAX = 64
# Why a key is gone: taken for room, by an explicit evict or clear, or damaged.
DISPLACED, EVICTED, CORRUPT = "displaced", "evicted", "corrupt"
_REASONS = {DISPLACED: Reason.EVICTED, EVICTED: Reason.EVICTED, CORRUPT: Reason.CORRUPT}


class Ledger:
    """The books of one daemon. Event loop only.

    `plans` are the tiers that exist, fast to slow; the first is where clients write and read.
    """

    def __init__(
        self,
        plans: Sequence[SegmentPlan],
        *,
        policy: str = "lru",
        namespaces_max: int = 4096,
        placeholders_max: int = 100_000,
    ) -> None:
        self.plans = {plan.tier: plan for plan in plans}
        self.tiers = tuple(sorted(self.plans))
        self.top = self.tiers[0]
        self.slots = {
            tier: TierSlots(plan, homes=tier is not TierId.SSD) for tier, plan in self.plans.items()
        }
        policies = {tier: make_policy(policy) for tier in self.tiers}
        self.chains = Chains(self.slots, policies, self._lease_split)
        self.spaces: dict[int, Namespace] = {}
        self.leases: dict[int, Lease] = {}
        self.evicted_blocks = 0
        self.corrupt_blocks = 0
        self.guaranteed_bytes: dict[tuple[str, TierId], int] = {}
        # Tiers that take no new copies now (failed, or switched off).
        self.closed_tiers: set[TierId] = set()
        # Tiers that nothing is demoted to now: only who asks for durability writes there.
        self.spent_tiers: set[TierId] = set()
        self._namespaces_max = namespaces_max
        self._placeholders_max = placeholders_max
        self._by_digest: dict[bytes, int] = {}
        self._last_id = 0
        # Slots of blocks that are gone but still read: (tier, slot) -> holders (leases, moves).
        self._doomed: dict[tuple[TierId, int], set[int]] = {}
        self._doomed_of: dict[int, list[tuple[TierId, int]]] = {}
        self._doomed_erasures: dict[tuple[TierId, int], Erasure] = {}
        self._erasures: list[Erasure] = []
        self._gone: list[tuple[Namespace, bytes]] = []
        self.erasing: dict[tuple[TierId, SlotClass], int] = {}
        self._condemned: list[int] = []
        # Which runs a block's moves read from: set by moves.py, asked before a slot is freed.
        self.readers: dict[tuple[TierId, int], set[int]] = {}

    def next_id(self) -> int:
        """A number that no lease, reservation, move or namespace had before in this life."""
        self._last_id += 1
        return self._last_id

    # --- namespaces

    def open_namespace(self, spec: NamespaceSpec) -> Namespace:
        """The namespace of this spec, made if it is new.

        Raises:
            InvalidRequest: one block of it is larger than a segment of the first tier.
            LimitReached: as many namespaces as `namespaces_max` exist.
        """
        known = self._by_digest.get(spec.digest)
        if known is not None:
            return self.spaces[known]
        if len(self.spaces) >= self._namespaces_max:
            raise LimitReached(f"{len(self.spaces)} namespaces (limits.namespaces_max) exist")
        return self._new_namespace(spec)

    def recall_namespace(self, spec: NamespaceSpec) -> Namespace:
        """As `open_namespace`, of one that was here before: no limit ends it."""
        known = self._by_digest.get(spec.digest)
        return self._new_namespace(spec) if known is None else self.spaces[known]

    def _new_namespace(self, spec: NamespaceSpec) -> Namespace:
        slot_bytes = [0] * TIER_COUNT
        for tier, plan in self.plans.items():
            slot_bytes[tier] = plan.slot_bytes(spec.format.shard_bytes)
            if slot_bytes[tier] > plan.size_bytes and tier is self.top:
                raise InvalidRequest(
                    f"a block of {spec.format.shard_bytes} bytes does not fit a segment of "
                    f"{plan.size_bytes} bytes: raise tiers.{tier.label}.segment_bytes"
                )
        space = Namespace(len(self.spaces) + 1, spec, slot_bytes)
        self.spaces[space.id] = space
        self._by_digest[space.digest] = space.id
        return space

    def space(self, namespace_id: int) -> Namespace:
        """Raises NotFound when there is no such namespace."""
        space = self.spaces.get(namespace_id)
        if space is None:
            raise NotFound(f"namespace {namespace_id} is not open: call OpenNamespace first")
        return space

    # --- lookup

    def lookup(
        self, queries: Sequence[tuple[Namespace, Keys]]
    ) -> tuple[list[Found], list[list[Span]], int]:
        """Per group what is restorable and where it lies, and the tokens restorable in all.

        Raises:
            InvalidRequest: keys of another length than the namespace's.
        """
        if len(queries) == 1 and queries[0][0].needed_blocks is None:
            space, keys = queries[0]
            spans = self._full(space, keys, len(keys))
            count = length(spans)
            return [self._found(space, keys, count, 0, spans)], [spans], count * space.block_tokens
        tokens = self._common_tokens(queries)
        found, all_spans = [], []
        for space, keys in queries:
            count = tokens // space.block_tokens
            first = max(0, count - space.needed_blocks) if space.needed_blocks else 0
            spans = (
                search.back_to(space, self.chains.runs, keys, first, count - 1)[0] if count else []
            )
            found.append(self._found(space, keys, count, first, spans))
            all_spans.append(spans)
        return found, all_spans, tokens

    def _full(self, space: Namespace, keys: Keys, count: int) -> list[Span]:
        space.accept_key_size(keys.size)
        return search.prefix(space, self.chains.runs, keys, count)

    def _common_tokens(self, queries: Sequence[tuple[Namespace, Keys]]) -> int:
        tokens = min(len(keys) * space.block_tokens for space, keys in queries)
        while tokens:
            before = tokens
            for space, keys in queries:
                space.accept_key_size(keys.size)
                limit = tokens // space.block_tokens
                if space.needed_blocks is None:
                    count = length(self._full(space, keys, limit))
                else:
                    count = search.window(space, self.chains.runs, keys, limit, space.needed_blocks)
                tokens = min(tokens, count * space.block_tokens)
            if tokens == before:
                break
        return tokens

    def _found(
        self, space: Namespace, keys: Keys, count: int, first: int, spans: list[Span]
    ) -> Found:
        reason = Reason.NONE
        if count < len(keys):
            key = keys[count]
            placed = key in space.index
            note = space.note_of(key, EVICTED if placed else "")
            reason = _REASONS.get(note, Reason.NEVER_STORED)
            if placed and search.is_ready(space, self.chains.runs, key):
                # It is there, but another group of the same request has less.
                reason = Reason.NOT_ACCEPTABLE
        return Found(count, search.tier_runs(spans), 0.0, reason, first)

    def touch(self, spans: Iterable[Span]) -> None:
        """These blocks were used now: ancestors count as later used than descendants."""
        for run, _, _ in reversed(list(spans)):
            self.chains.touch(run)

    # --- leases

    def lease(
        self,
        space: Namespace,
        keys: Keys,
        count: int,
        first_needed: int,
        spans: list[Span],
        *,
        session_id: int,
        tenant: str,
        group: str,
        now_s: float,
    ) -> Lease:
        """Pins the blocks of `spans` (just looked up: blocks first_needed..count of `keys`).

        True after: none of their copies is freed before the lease ends. `lease.slots` is set
        when all are readable in the first tier; else promote, then `settle_lease`.
        """
        lease = Lease(
            self.next_id(), session_id, tenant, group, space, keys, first_needed, count, now_s
        )
        self.leases[lease.id] = lease
        self._pin_spans(lease, spans)
        self.touch(spans)
        self._snapshot(lease, spans)
        return lease

    def _pin_spans(self, lease: Lease, spans: list[Span]) -> None:
        for run, _, _ in spans:
            if run.leases is None:
                run.leases = set()
            run.leases.add(lease.id)
            lease.runs.add(run.id)

    def _lease_split(self, run: Run, tail: Run) -> None:
        assert tail.leases is not None
        for lease_id in list(tail.leases):
            if self._last_place(self.leases[lease_id], run) is None:
                self.leases[lease_id].runs.add(tail.id)
            else:
                tail.leases.discard(lease_id)  # it ends in the head: the tail is not its

    @staticmethod
    def _last_place(lease: Lease, run: Run) -> int | None:
        """Where in this run the lease ends; None = it goes on below (or that is not known)."""
        locator = run.space.index.get(lease.keys[lease.count - 1]) if lease.count else None
        if locator is None or locator // RUN_BLOCKS_MAX != run.id:
            return None
        return locator % RUN_BLOCKS_MAX

    def leased_end(self, run: Run) -> int:
        """Blocks of the run before this place may be read by a lease; those from it on are free to
        give. A lease of a prefix must not keep what was appended to the chain since.
        """
        if not run.leases:
            return 0
        end = 0
        for lease_id in islice(run.leases, _LEASES_ASKED_MAX + 1):
            place = self._last_place(self.leases[lease_id], run)
            if place is None:
                return len(run)
            end = max(end, place + 1)
        return end if len(run.leases) <= _LEASES_ASKED_MAX else len(run)

    def _snapshot(self, lease: Lease, spans: list[Span]) -> bool:
        """Fixes the lease's answer if every needed block is in the first tier."""
        top, shards = self.top, lease.space.shards
        if not all(search.all_in(run, start, end, top) for run, start, end in spans):
            return False
        slots = array("I")
        for run, start, end in spans:
            held = run.slots[top]
            assert held is not None
            slots += held[start * shards : end * shards]
        lease.slots = slots
        return True

    def lease_spans(self, lease: Lease) -> list[Span]:
        """Where the lease's needed blocks lie now. A block that was lost or evicted meanwhile
        shortens the lease (`count`, `reason`).
        """
        runs, space = self.chains.runs, lease.space
        spans, gap = search.back_to(space, runs, lease.keys, lease.first_needed, lease.count - 1)
        while gap >= 0:
            note = space.note_of(lease.keys[gap], EVICTED)
            lease.reason = _REASONS.get(note, Reason.EVICTED)
            lease.count = gap
            if space.needed_blocks is not None:
                # Half a window is worth nothing; the client asks again.
                lease.count = lease.first_needed
            if lease.count <= lease.first_needed:
                return []
            spans, gap = search.back_to(space, runs, lease.keys, lease.first_needed, gap - 1)
        self._pin_spans(lease, spans)
        return spans

    def settle_lease(self, lease: Lease) -> bool:
        """Whether the lease can be answered now: all its (remaining) blocks are readable."""
        return lease.slots is not None or self._snapshot(lease, self.lease_spans(lease))

    def shorten_lease(self, lease: Lease, reason: Reason) -> None:
        """Settles for the blocks that are readable now (a deadline passed)."""
        if lease.slots is not None:
            return
        count = lease.first_needed
        for run, start, end in self.lease_spans(lease):
            bit = 1 << self.top
            ready = next((p for p in range(start, end) if not run.state[p] & bit), end)
            count += ready - start
            if ready < end:
                break
        if count < lease.count:
            lease.count, lease.reason = count, reason
            if lease.space.needed_blocks is not None:
                lease.count = lease.first_needed
        self._snapshot(lease, self.lease_spans(lease) if lease.needed_count > 0 else [])

    def release(self, lease_id: int) -> bool:
        """Ends a lease; False if there is none. Slots only it kept are free now."""
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            return False
        for run_id in lease.runs:
            run = self.chains.runs.get(run_id)
            if run is not None and run.leases:
                run.leases.discard(lease_id)
                # An empty set is 216 bytes: as much as the books of a block.
                run.leases = run.leases or None
        self.end_holder(lease_id)
        return True

    # --- freeing

    def free(self, run: Run, place: int, tier: TierId, why: str) -> None:
        """Drops a copy. Its slots are free at once, or when the last lease or move that may read
        them ends; a slot of a tier with records is erased first. Does not trim.
        """
        shards = range(run.space.shards)
        labels = [self.label(run, place, shard) for shard in shards] if tier is TierId.SSD else []
        slots = self.chains.drop_copy(run, place, tier)
        for shard, slot in enumerate(slots):
            erasure = self._erasure(tier, slot, labels[shard], why) if labels else None
            holders = set(self.readers.get((tier, slot), ()))
            if run.leases and tier is not TierId.SSD and place < self.leased_end(run):
                holders |= run.leases
            self._let_go(tier, slot, erasure, holders)
        if not run.state[place]:
            run.space.remember(run.key(place), why)
            if not run.condemned:
                self._gone.append((run.space, run.key(place)))

    def _let_go(self, tier: TierId, slot: int, erasure: Erasure | None, holders: set[int]) -> None:
        if holders:
            self._doomed[tier, slot] = holders
            for holder in holders:
                self._doomed_of.setdefault(holder, []).append((tier, slot))
            if erasure is not None:
                self._doomed_erasures[tier, slot] = erasure
        elif erasure is not None:
            self._erase(erasure)
        else:
            self.slots[tier].release((slot,))

    def replace_copy(self, run: Run, place: int, tier: TierId, slots: Sequence[int]) -> None:
        """The block's copy lies in these slots from now on; the former go as if it were freed."""
        for shard, slot in enumerate(self.chains.move_copy(run, place, tier, slots)):
            erasure = self._erasure(tier, slot, self.label(run, place, shard), DISPLACED)
            self._let_go(tier, slot, erasure, set(self.readers.get((tier, slot), ())))

    def take_gone(self) -> list[tuple[Namespace, bytes]]:
        """Blocks that lost their last copy since the last call, in order; not those of a cleared
        epoch, which died all at once.
        """
        taken, self._gone = self._gone, []
        return taken

    def end_holder(self, holder: int) -> None:
        """A lease or a move ended: frees what only it still kept."""
        for tier, slot in self._doomed_of.pop(holder, ()):
            holders = self._doomed[tier, slot]
            holders.discard(holder)
            if holders:
                continue
            del self._doomed[tier, slot]
            erasure = self._doomed_erasures.pop((tier, slot), None)
            if erasure is None:
                self.slots[tier].release((slot,))
            else:
                self._erase(erasure)

    def _erasure(self, tier: TierId, slot: int, label: SlotLabel, why: str) -> Erasure:
        slot_class = self.slots[tier].segments[slot >> SLOT_BITS].slot_class
        assert slot_class is not None
        whole = self.spaces[self._by_digest[label.namespace]].max_age_s > 0
        return Erasure(tier, slot, slot_class[1], label, why == EVICTED, slot_class, whole)

    def _erase(self, erasure: Erasure) -> None:
        self._erasures.append(erasure)
        key = (erasure.tier, erasure.slot_class)
        self.erasing[key] = self.erasing.get(key, 0) + 1

    def discard_target(
        self, tier: TierId, slots: Sequence[int], labels: Sequence[SlotLabel], *, written: bool
    ) -> None:
        """Gives back slots acquired for a copy that is not wanted any longer."""
        if tier is TierId.SSD and written:
            for slot, label in zip(slots, labels, strict=True):
                self._erase(self._erasure(tier, slot, label, EVICTED))
        else:
            self.slots[tier].release(slots)

    def take_erasures(self) -> list[Erasure]:
        """Slots whose records must be erased; call `erased` for each when that is done."""
        taken, self._erasures = self._erasures, []
        return taken

    def erased(self, erasures: Iterable[Erasure]) -> None:
        """The records are gone: the slots are free."""
        for erasure in erasures:
            self.erasing[erasure.tier, erasure.slot_class] -= 1
            self.slots[erasure.tier].release((erasure.slot,))

    def label(self, run: Run, place: int, shard: int) -> SlotLabel:
        """What a copy of this shard is said to be, on disk and in checks."""
        space = run.space
        return SlotLabel(
            namespace=space.digest,
            epoch=space.epoch,
            key=run.key(place),
            parent=run.parent_of(place),
            position=run.position + place,
            shard=shard,
            size_bytes=space.shard_bytes,
            checksum=run.checksums[place * space.shards + shard],
            written_s=run.written[place],
        )

    # --- losing and evicting

    def forget(self, run: Run, places: Iterable[int], why: str) -> int:
        """Drops every copy of these blocks; returns how many had one. Trim afterwards."""
        count = 0
        for place in places:
            if not run.state[place]:
                continue
            count += 1
            for tier in self.tiers:
                if run.state[place] >> tier & 1:
                    self.free(run, place, tier, why)
        return count

    def evict(self, space: Namespace, keys: Keys) -> list[bytes]:
        """Forgets these blocks and all their descendants, leased or not (a lease keeps the bytes,
        hidden, until it ends). Returns the keys forgotten.
        """
        gone: list[bytes] = []
        done = False
        while not done:
            part, done = self.evict_some(space, keys)
            gone += part
        return gone

    def evict_some(
        self, space: Namespace, keys: Keys, blocks_max: int = 256
    ) -> tuple[list[bytes], bool]:
        """A part of evict: descendants go first. Returns the keys forgotten and whether that was
        all; if not, call it again.
        """
        space.accept_key_size(keys.size)
        gone: list[bytes] = []
        left = blocks_max
        for key in keys.split():
            while (root := self._evicted_root(space, key)) is not None:
                left -= self._evict_below(root, left, gone)
                if left <= 0:
                    break
            if left <= 0:
                break
        self.evicted_blocks += len(gone)
        return gone, left > 0

    def _evicted_root(self, space: Namespace, key: bytes) -> Run | None:
        """A run that begins with what is to be evicted with this key; None = nothing is left."""
        found = self.chains.find(space, key)
        if found is not None:
            run, place = found
            return self.chains.split(run, place) if place else run
        # Not here itself, but blocks that came without it may be: they are below it.
        orphans = space.orphans.get(key)
        return self.chains.runs[orphans[0]] if orphans else None

    def _evict_below(self, root: Run, blocks_max: int, gone: list[bytes]) -> int:
        """Forgets up to so many places at the ends of the root's subtree, the root's last. Returns
        how many; adds the keys of those that were blocks to `gone`.
        """
        runs, left, run = self.chains.runs, blocks_max, root
        while left > 0 and root.id in runs:
            while run.children:
                run = runs[next(iter(run.children))]
            first = max(0, len(run) - left)
            places = range(first, len(run))
            left -= len(places)
            gone.extend(run.key(place) for place in places if run.state[place])
            self.forget(run, places, EVICTED)
            run.pins = 0
            above = run.parent
            self.chains.trim(run, EVICTED)
            # Not from the root again: a deep subtree would be walked once for each of its ends.
            run = root if run is root else runs.get(above, root)
        return blocks_max - left

    def lose(self, space: Namespace, key: bytes, tier: TierId) -> None:
        """A copy turned out damaged: it is dropped and never served. Its place stays while
        descendants live, at most `placeholders_max` of them in a namespace.
        """
        found = self.chains.find(space, key)
        if found is None or not found[0].state[found[1]] >> tier & 1:
            return
        run, place = found
        self.corrupt_blocks += 1
        self.free(run, place, tier, CORRUPT)
        self.chains.trim(run, CORRUPT)
        if space.placeholder_count > self._placeholders_max:
            self.evict(space, Keys(key, len(key)))

    def age(self, run: Run, places: Sequence[int]) -> None:
        """These blocks are too old: they are forgotten; as in `lose`, their places may stay."""
        space, key = run.space, run.key(places[0])
        self.evicted_blocks += self.forget(run, places, EVICTED)
        self.chains.trim(run, EVICTED)
        if space.placeholder_count > self._placeholders_max:
            self.evict(space, Keys(key, len(key)))

    def clear(self, space: Namespace) -> int:
        """Starts a new epoch: nothing stored before is found any longer. Returns the blocks that
        died. Their slots come back piece by piece: call `reap`.
        """
        count = space.block_count
        ghost = Namespace(space.id, space.spec, space.slot_bytes)
        ghost.epoch, ghost.key_size = space.epoch, space.key_size
        ghost.max_age_s = space.max_age_s
        ghost.index, ghost.orphans = space.index, space.orphans
        ghost.block_count, ghost.placeholder_count = count, space.placeholder_count
        for run in self.chains.runs.values():
            if run.space is space:
                self.chains.condemn(run, ghost)
                self._condemned.append(run.id)
        space.epoch += 1
        space.index, space.orphans = Index(), {}
        space.forget_notes()
        space.block_count = space.placeholder_count = 0
        self.evicted_blocks += count
        return count

    def reap(self, blocks_max: int = 256) -> bool:
        """Frees slots of cleared namespaces, some blocks at a time. True: there is more."""
        while self._condemned and blocks_max > 0:
            run = self.chains.runs.get(self._condemned[-1])
            if run is None:
                self._condemned.pop()
                continue
            # Leaves first, and from the end of each, so that any part of it is a small part.
            while run.children:
                run = self.chains.runs[next(iter(run.children))]
            first = max(0, len(run) - blocks_max)
            blocks_max -= len(run) - first
            # Not wiped one by one: the new epoch, on disk, is what keeps them dead.
            self.forget(run, range(len(run) - 1, first - 1, -1), DISPLACED)
            self.chains.trim(run, DISPLACED)
        return bool(self._condemned)

    # --- pins

    def pin(self, space: Namespace, keys: Keys) -> int:
        """These blocks are not forgotten until unpinned as often. Returns how many are there."""
        spans = self._cut_spans(space, keys)
        for run, _, _ in spans:
            run.pins += 1
        return length(spans)

    def unpin(self, space: Namespace, keys: Keys) -> int:
        """Undoes one pin of these blocks. Returns how many were pinned."""
        count = 0
        for run, start, end in self._cut_spans(space, keys):
            if run.pins:
                run.pins -= 1
                count += end - start
        return count

    def _cut_spans(self, space: Namespace, keys: Keys) -> list[Span]:
        """Spans of the prefix, with runs cut so that each span is a whole run."""
        spans = self._full(space, keys, len(keys))
        if not spans:
            return []
        run, _, end = spans[-1]
        if end < len(run):
            self.chains.split(run, end)
        run, start, end = spans[0]
        if start:
            spans[0] = (self.chains.split(run, start), 0, end - start)
        return spans

    # --- books

    @property
    def is_erasing(self) -> bool:
        """Whether slots wait for their records to go."""
        return any(self.erasing.values())

    def dirty_blocks(self) -> int:
        """Blocks with a copy in the first tier and in none below."""
        return self.chains.dirty_count

    def check(self, *, held: dict[TierId, int] | None = None) -> None:
        """Raises InvariantViolated when the books disagree. `held`: slots that reservations,
        partials and moves hold, by tier (moves.py and holders know them). O(blocks).
        """
        self.chains.check()
        for tier, slots in self.slots.items():
            slots.check()
            copies = sum(r.held[tier] * r.space.shards for r in self.chains.runs.values())
            doomed = sum(1 for doomed_tier, _ in self._doomed if doomed_tier is tier)
            erasing = sum(n for (erased, _), n in self.erasing.items() if erased is tier)
            expected = copies + doomed + erasing + (held or {}).get(tier, 0)
            used = slots.counts().used_slots
            if used != expected:
                raise InvariantViolated(
                    f"{tier.label}: {used} slots used, but {copies} of copies, {doomed} doomed, "
                    f"{erasing} being erased, {(held or {}).get(tier, 0)} held"
                )
        for lease in self.leases.values():
            for run_id in lease.runs:
                run = self.chains.runs.get(run_id)
                if run is not None and lease.id not in (run.leases or ()):
                    raise InvariantViolated(f"lease {lease.id} holds {run!r} only by half")
        for run in self.chains.runs.values():
            for lease_id in run.leases or ():
                known = self.leases.get(lease_id)
                if known is None or run.id not in known.runs:
                    raise InvariantViolated(f"{run!r} is held by lease {lease_id} for ever")

    def used_share(self, tier: TierId) -> float:
        """Used bytes of the tier, of its capacity; 0..1."""
        return self.slots[tier].used_bytes / self.slots[tier].capacity_bytes

    def __repr__(self) -> str:
        blocks = sum(space.block_count for space in self.spaces.values())
        return (
            f"<Ledger {blocks} blocks in {len(self.chains.runs)} runs of {len(self.spaces)} "
            f"namespaces, {len(self.leases)} leases>"
        )
