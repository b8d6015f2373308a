"""Tally: what the store did, as plain numbers, and the records that `stat` and metrics read.

Does not: decide anything; nothing here is read back by the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvtier.block import Found, Keys, Reason, TierId
from kvtier.counts import BlockUse, NamespaceUse, RouteUse, SessionUse, TierUse
from kvtier.errors import BlockCorrupt, KvTierError
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.ledger import Ledger
from kvtier.session import Session
from kvtier.tiers.cipher import Keyring
from kvtier.transfer.mover import Mover

_RATE_WINDOW_S = 2.0


@dataclass(slots=True)
class Tally:
    """Counters since the start. Blocks and bytes of block content. Event loop only."""

    lookup_count: int = 0
    lookup_blocks: int = 0
    hit_blocks: int = 0
    miss_blocks: int = 0
    stored_blocks: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    leases_revoked: int = 0
    recovered_blocks: int = 0
    recovery_s: float = 0.0
    predecessor_bytes: int = 0
    hit_blocks_by_tier: dict[TierId, int] = field(default_factory=lambda: dict.fromkeys(TierId, 0))
    reasons: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    # Copies that were dropped as damaged, by `damage_of` what was read.
    corrupt: Counter[str] = field(default_factory=Counter)

    def lookup(self, asked: Sequence[tuple[Namespace, Keys]], found: Sequence[Found]) -> None:
        """Counts the answer of one lookup."""
        self.lookup_count += 1
        for (space, keys), one in zip(asked, found, strict=True):
            missed = len(keys) - one.block_count
            self.lookup_blocks += len(keys)
            self.hit_blocks += one.block_count
            self.miss_blocks += missed
            space.hit_blocks += one.block_count
            space.miss_blocks += missed
            for run in one.runs:
                self.hit_blocks_by_tier[run.tier] += run.block_count
            self.reasons[one.reason] += 1


def damage_of(error: KvTierError) -> str:
    """What a copy that could not be read is counted as."""
    return error.damage if isinstance(error, BlockCorrupt) else "unreadable"


class Rates:
    """Bytes a second in and out of each tier over the last couple of seconds."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._before: dict[TierId, tuple[int, int]] = {}
        self.per_s: dict[TierId, tuple[float, float]] = {}

    def update(self, now_s: float, totals: dict[TierId, tuple[int, int]]) -> None:
        """Call often; a new figure is made every two seconds (`_RATE_WINDOW_S`)."""
        elapsed = now_s - self._at_s
        if elapsed < _RATE_WINDOW_S:
            return
        for tier, (went_in, went_out) in totals.items():
            in_before, out_before = self._before.get(tier, (went_in, went_out))
            self.per_s[tier] = ((went_in - in_before) / elapsed, (went_out - out_before) / elapsed)
        self._before, self._at_s = dict(totals), now_s


def bytes_in_and_out(tally: Tally, mover: Mover, ledger: Ledger) -> dict[TierId, tuple[int, int]]:
    """Per tier: bytes that came in (stores, moves) and went out (leases, moves) so far."""
    totals = {tier: [0, 0] for tier in ledger.tiers}
    totals[ledger.top] = [tally.written_bytes, tally.read_bytes]
    for route, counts in mover.counts.items():
        totals[route.target][0] += counts.size_bytes
        totals[route.source][1] += counts.size_bytes
    return {tier: (went_in, went_out) for tier, (went_in, went_out) in totals.items()}


def tier_uses(
    ledger: Ledger,
    tally: Tally,
    rates: Rates,
    mover: Mover,
    errors: dict[TierId, int],
    ssd_detail: str,
    states: dict[TierId, str],
    ssd_day_bytes: int,
) -> tuple[TierUse, ...]:
    """One record a tier, fast to slow. `states` of tiers that do not simply serve."""
    totals = bytes_in_and_out(tally, mover, ledger)
    blocks = dict.fromkeys(ledger.tiers, 0)
    payload = dict.fromkeys(ledger.tiers, 0)
    for run in ledger.chains.runs.values():
        for tier in ledger.tiers:
            if run.held[tier]:
                blocks[tier] += run.held[tier]
                payload[tier] += run.held[tier] * run.space.spec.format.size_bytes
    uses = []
    for tier in ledger.tiers:
        slots = ledger.slots[tier].counts()
        owned_bytes = slots.used_bytes + slots.wasted_bytes
        in_rate, out_rate = rates.per_s.get(tier, (0.0, 0.0))
        uses.append(
            TierUse(
                tier=tier,
                capacity_bytes=ledger.slots[tier].capacity_bytes,
                used_bytes=slots.used_bytes,
                payload_bytes=payload[tier],
                block_count=blocks[tier],
                segment_count=ledger.plans[tier].count,
                segments_used=slots.segments_used,
                fragmentation=max(0.0, 1 - payload[tier] / owned_bytes) if owned_bytes else 0.0,
                in_bytes=totals[tier][0],
                out_bytes=totals[tier][1],
                in_bytes_per_s=in_rate,
                out_bytes_per_s=out_rate,
                hit_blocks=tally.hit_blocks_by_tier[tier],
                error_count=errors.get(tier, 0),
                state=states.get(tier, "degraded" if tier in ledger.closed_tiers else "serving"),
                detail=ssd_detail if tier is TierId.SSD else "",
                written_day_bytes=ssd_day_bytes if tier is TierId.SSD else 0,
            )
        )
    return tuple(uses)


def namespace_uses(ledger: Ledger, keyring: Keyring) -> list[NamespaceUse]:
    """All namespaces, those with most blocks first."""
    uses = [
        NamespaceUse(
            namespace_id=space.id,
            spec=space.spec,
            digest=space.digest,
            epoch=space.epoch,
            block_count=space.block_count,
            size_bytes=space.block_count * space.spec.format.size_bytes,
            hit_blocks=space.hit_blocks,
            miss_blocks=space.miss_blocks,
            bypassed=space.bypassed,
            encrypted=keyring.key_of(space.digest) is not None or bool(space.locked),
            locked=space.locked,
            max_age_s=space.max_age_s,
        )
        for space in ledger.spaces.values()
    ]
    return sorted(uses, key=lambda use: -use.block_count)


def block_uses(
    ledger: Ledger, space: Namespace, after_key: bytes, count_max: int
) -> list[BlockUse]:
    """A page of a namespace's blocks, chain after chain, behind the one with `after_key`; none
    when that one is gone meanwhile.
    """
    after = ledger.chains.find(space, after_key) if after_key else None
    if after_key and after is None:
        return []
    after_run, after_place = (after[0].id, after[1]) if after else (0, -1)
    runs = ledger.chains.runs
    uses: list[BlockUse] = []
    for run_id in sorted(run_id for run_id in runs if run_id >= after_run):
        run = runs[run_id]
        if run.space is not space:
            continue
        first = after_place + 1 if run_id == after_run else 0
        for place in range(first, len(run)):
            if run.state[place]:
                uses.append(_block_use(ledger, run, place))
                if len(uses) == count_max:
                    return uses
    return uses


def _block_use(ledger: Ledger, run: Run, place: int) -> BlockUse:
    return BlockUse(
        key=run.key(place),
        parent=run.parent_of(place),
        position=run.position + place,
        tiers=tuple(tier for tier in ledger.tiers if run.state[place] >> tier & 1),
        size_bytes=run.space.spec.format.size_bytes,
        lease_count=len(run.leases or ()),
        pin_count=run.pins,
    )


def session_uses(sessions: Iterable[Session], now_s: float) -> tuple[SessionUse, ...]:
    """One record an attached client."""
    return tuple(
        SessionUse(
            client_name=session.client_name,
            tenant=session.tenant,
            group=session.group,
            pid=session.pid,
            lease_count=len(session.leases),
            reservation_count=len(session.reservations),
            age_s=now_s - session.started_s,
        )
        for session in sessions
    )


def route_uses(mover: Mover) -> tuple[RouteUse, ...]:
    """One record a route that was ever used."""
    return tuple(
        RouteUse(
            route=str(route),
            move_count=counts.move_count,
            size_bytes=counts.size_bytes,
            failed_count=counts.failed_count,
            in_flight=counts.in_flight,
            queued=counts.queued,
        )
        for route, counts in mover.counts.items()
    )
