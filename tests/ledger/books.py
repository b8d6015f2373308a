"""Small ledgers for stories: two tiers, short keys, one line to store a chain."""

from __future__ import annotations

from kvtier.block import BlockFormat, GroupKind, Keys, NamespaceSpec, SegmentPlan, TierId
from kvtier.ledger.chain import Namespace
from kvtier.ledger.filling import RESERVE_KEYS_MAX, Filling, Offer
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.units import KIB

DRAM, SSD = TierId.DRAM, TierId.SSD


def keys_of(*names: str) -> Keys:
    return Keys.of([name.encode().ljust(16, b".") for name in names])


def chain(name: str, count: int, first: int = 0) -> Keys:
    return keys_of(*(f"{name}{n}" for n in range(first, first + count)))


class Books:
    """A ledger with its reservations and moves, and shortcuts that never hide a decision."""

    def __init__(self, *, segments: int = 4, segment_kib: int = 16, ssd_segments: int = 4) -> None:
        plans = [SegmentPlan(DRAM, segments, segment_kib * KIB)]
        if ssd_segments:
            plans.append(SegmentPlan(SSD, ssd_segments, 32 * KIB, header_bytes=4 * KIB))
        self.ledger = Ledger(plans)
        self.filling = Filling(self.ledger)
        self.moves = Moves(self.ledger)

    def space(
        self,
        tenant: str = "red",
        *,
        kib: int = 4,
        shards: int = 1,
        group: GroupKind = GroupKind.FULL,
        window: int = 0,
        model: str = "tiny",
    ) -> Namespace:
        shape = BlockFormat(
            1, 1, 1, "float32", block_tokens=1, shards=shards, opaque_bytes=kib * KIB * shards,
            group=group, window_tokens=window,
        )  # fmt: skip
        return self.ledger.open_namespace(NamespaceSpec(model=model, format=shape, tenant=tenant))

    def reserve(
        self,
        space: Namespace,
        keys: Keys,
        *,
        parent: bytes = b"",
        shard: int = 0,
        session_id: int = 1,
        count_max: int = 65_536,
        deadline_s: float = 10,
    ) -> Offer:
        return self.filling.reserve(
            space, keys, parent=parent, position=0, shard=shard, session_id=session_id,
            count_max=count_max, now_s=0, deadline_s=deadline_s,
        )  # fmt: skip

    def commit(self, offer: Offer, indexes: list[int] | None = None) -> list[bytes]:
        assert offer.reservation is not None
        entries = self.filling.begin_commit(offer.reservation, indexes)
        checksums = [hash(entry.key) & 0xFFFF | 1 for entry in entries]
        return self.filling.finish_commit(offer.reservation, entries, checksums).ready

    def store(self, space: Namespace, keys: Keys, *, parent: bytes = b"") -> None:
        for part in keys.parts(RESERVE_KEYS_MAX):
            for shard in range(space.shards):
                offer = self.reserve(space, part, parent=parent, shard=shard)
                if offer.reservation is not None:
                    self.commit(offer)
            parent = part[len(part) - 1]

    def found(self, space: Namespace, keys: Keys) -> int:
        return self.ledger.lookup([(space, keys)])[0][0].block_count

    def lease(self, space: Namespace, keys: Keys, session_id: int = 1) -> int:
        found, spans, _ = self.ledger.lookup([(space, keys)])
        return self.ledger.lease(
            space, keys, found[0].block_count, found[0].first_needed, spans[0],
            session_id=session_id, tenant=space.tenant, group="", now_s=0,
        ).id  # fmt: skip

    def finish(self) -> None:
        """All moves and erasures under way succeed."""
        while self.moves.moves or self.ledger.is_erasing:
            for move in list(self.moves.moves.values()):
                for label in move.labels:
                    label.checksum = hash(label.key) & 0xFFFF | 1
                self.moves.finish_move(move)
            self.ledger.erased(self.ledger.take_erasures())

    def used(self) -> tuple[int, ...]:
        return tuple(s.counts().used_slots for s in self.ledger.slots.values())

    def check(self) -> None:
        held = self.filling.held_slots()
        for tier, count in self.moves.held_slots().items():
            held[tier] = held.get(tier, 0) + count
        self.ledger.check(held=held)
