"""Accounts: everything `kvtier stat` and metrics show of a running store, put together when asked.

Does not: count (tally.py and the others do), or decide anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvtier import native
from kvtier.block import TierId
from kvtier.counts import NamespaceUse, StoreCounts
from kvtier.keeper import Keeper
from kvtier.session import Session
from kvtier.tally import namespace_uses, route_uses, session_uses, tier_uses
from kvtier.tiers.cipher import Keyring


def accounts(keeper: Keeper, sessions: Iterable[Session], namespaces_max: int) -> StoreCounts:
    """Everything `kvtier stat` shows."""
    now_s, tally, ledger = keeper.now_s(), keeper.tally, keeper.ledger
    reservations = keeper.filling.reservations.values()
    errors = {TierId.DRAM: keeper.dram.counts().error_count}
    if keeper.ssd is not None:
        errors[TierId.SSD] = keeper.ssd.counts().error_count
    states = {} if keeper.recovering.is_over else {TierId.SSD: keeper.recovering.state}
    detail = keeper.health.error or keeper.recovering.problem or keeper.housekeeping.problem
    if locked := sum(bool(space.locked) for space in ledger.spaces.values()):
        detail = detail or f"{locked} namespaces are encrypted under another key: they miss"
    state = "draining" if keeper.draining else "bypassed" if keeper.bypassed else "serving"
    return StoreCounts(
        uptime_s=now_s - keeper.started_s,
        state=state,
        tiers=tier_uses(
            ledger,
            tally,
            keeper.rates,
            keeper.mover,
            errors,
            detail,
            states,
            keeper.housekeeping.day_bytes,
        ),
        lookup_count=tally.lookup_count,
        lookup_blocks=tally.lookup_blocks,
        hit_blocks=tally.hit_blocks,
        miss_blocks=tally.miss_blocks,
        reasons={reason: count for reason, count in tally.reasons.items() if count},
        lease_count=len(ledger.leases),
        lease_oldest_s=max((now_s - le.started_s for le in ledger.leases.values()), default=0),
        reservation_count=len(reservations),
        reservation_oldest_s=max((now_s - r.started_s for r in reservations), default=0),
        sessions=session_uses(sessions, now_s),
        routes=route_uses(keeper.mover),
        namespaces=tuple(all_namespaces(keeper)[:namespaces_max]),
        corrupt_count=ledger.corrupt_blocks,
        corrupt=dict(tally.corrupt),
        scrub=keeper.scrubbing.use(),
        stored_blocks=tally.stored_blocks,
        evicted_blocks=ledger.evicted_blocks,
        events_revision=keeper.events.revision,
        native_kernels=native.capabilities().native,
        recovered_blocks=tally.recovered_blocks,
        recovery_s=tally.recovery_s,
        leases_revoked=tally.leases_revoked,
        predecessor_bytes=tally.predecessor_bytes,
    )


def all_namespaces(keeper: Keeper) -> list[NamespaceUse]:
    """All namespaces, those with most blocks first. Event loop."""
    keyring = keeper.ssd.keyring if keeper.ssd is not None else Keyring()
    return namespace_uses(keeper.ledger, keyring)
