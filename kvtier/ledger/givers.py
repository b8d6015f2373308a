"""Givers: which runs of a tier may give room now, in which order, and what is on its way out.

A run that nobody reads or pins gives its blocks, leaves before ancestors; a tenant's guaranteed
share is not asked for by others. `moves.py` decides how much of a run is taken, and how.

Does not: take anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvtier.block import TierId
from kvtier.ledger.chain import Run
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.segment import SlotClass

# Runs asked for room in one search, and runs looked at to find them.
_CANDIDATES_MAX = 256
_LOOKED_AT_MAX = 4096


class Givers:
    """Candidates for giving room. `leaving`: slots that running demotions will free, by tier and
    (tenant, slot size).
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.leaving: dict[tuple[TierId, SlotClass], int] = {}

    def going_bytes(self, tier: TierId, tenant: str | None) -> int:
        """Bytes that demotions and erasures under way will free: a tenant's, or everybody's."""
        leaving = sum(
            count * size
            for (of, (whose, size)), count in self.leaving.items()
            if of is tier and tenant in (None, whose)
        )
        return leaving + sum(
            count * size
            for (of, (whose, size)), count in self._ledger.erasing.items()
            if of is tier and tenant in (None, whose)
        )

    def spare_bytes(self, tier: TierId, tenant: str) -> int:
        """What may be taken of the tenant: what it uses, and goes on using, beyond its guaranteed
        share; anything when it has none.
        """
        guaranteed = self._ledger.guaranteed_bytes.get((tenant, tier), 0)
        if not guaranteed:
            return self._ledger.slots[tier].capacity_bytes
        used = self._ledger.slots[tier].used_bytes_by_tenant.get(tenant, 0)
        return max(0, used - self.going_bytes(tier, tenant) - guaranteed)

    def candidates(self, tier: TierId, slot_class: SlotClass | None = None) -> Iterator[Run]:
        """Runs (of that tenant and slot size) that may give blocks, in the policy's order; leaves
        in place of their ancestors, and a parent after its last child.

        Runs that may not give now (leased, or pinned at the bottom) are in use: they go to the
        end of the order, or a few thousand of them would hide all others for ever.
        """
        runs, policy = self._ledger.chains.runs, self._ledger.chains.policies[tier]
        yielded = 0
        for run_id in list(islice(policy.order(), _LOOKED_AT_MAX)):
            run: Run | None = runs.get(run_id)
            if run is None or not run.held[tier]:
                continue
            if slot_class not in (None, (run.space.tenant, run.space.slot_bytes[tier])):
                continue
            run = self.leaf(run, tier)
            if not self.may_take(run, tier):
                policy.touch(run_id)
                continue
            while run is not None and run.held[tier] and self.may_take(run, tier):
                yield run
                if run.id in runs and run.held[tier]:
                    break
                run = runs.get(run.parent) if run.parent else None
            yielded += 1
            if yielded == _CANDIDATES_MAX:
                return

    def leaf(self, run: Run, tier: TierId) -> Run:
        """A run at or below this one that holds copies in the tier and has none below it."""
        runs = self._ledger.chains.runs
        while run.below[tier]:
            children = (runs[child] for child in run.children or ())
            run = next(c for c in children if c.held[tier] or c.below[tier])
        return run

    def may_take(self, run: Run, tier: TierId) -> bool:
        if run.below[tier] or (run.leases and run.last_in(tier) < self._ledger.leased_end(run)):
            return False
        return not (run.pins and tier is self._ledger.tiers[-1])
