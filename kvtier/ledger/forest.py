"""Forest: whether the runs of a ledger agree with each other, the index and the policies.

Does not: change anything.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvtier.block import TierId
from kvtier.errors import InvariantViolated
from kvtier.ledger.chain import RUN_BLOCKS_MAX, Run
from kvtier.ledger.policy import Policy
from kvtier.ledger.slots import TierSlots


def check_forest(
    runs: Mapping[int, Run],
    slots: Mapping[TierId, TierSlots],
    policies: Mapping[TierId, Policy],
    dirty: Mapping[int, int],
    dirty_count: int,
) -> None:
    """Raises InvariantViolated when they do not. O(blocks)."""
    held_runs = dict.fromkeys(slots, 0)
    only_top = 1 << min(slots)
    for run in runs.values():
        _check_places(run)
        _check_tiers(runs, slots, run)
        count = 0 if run.condemned else run.state.count(only_top)
        if dirty.get(run.id, 0) != count:
            raise InvariantViolated(f"{run!r}: {count} blocks are only in the first tier")
        for tier in slots:
            held_runs[tier] += bool(run.held[tier])
    if dirty_count != sum(dirty.values()) or not dirty.keys() <= runs.keys():
        raise InvariantViolated(f"{dirty_count} dirty blocks, by run: {dirty}")
    for tier, policy in policies.items():
        if len(policy) != held_runs[tier]:
            raise InvariantViolated(f"{tier.label}: policy orders {len(policy)} runs")


def _check_places(run: Run) -> None:
    space = run.space
    if not run.state or len(run.keys) != len(run.state) * space.key_size:
        raise InvariantViolated(f"{run!r} is empty or torn")
    if not run.state[-1] and run.children is None:
        raise InvariantViolated(f"{run!r} ends in a placeholder that nothing needs")
    stored = [at for at, state in zip(run.written, run.state, strict=True) if state]
    if min(stored, default=run.oldest_s) < run.oldest_s:
        raise InvariantViolated(f"{run!r} has a block that is older than its oldest")
    for place in () if run.condemned else range(len(run)):
        if space.index.get(run.key(place)) != run.id * RUN_BLOCKS_MAX + place:
            raise InvariantViolated(f"{run!r}: the index disagrees at {place}")


def _check_tiers(runs: Mapping[int, Run], slots: Mapping[TierId, TierSlots], run: Run) -> None:
    for tier in slots:
        if run.held[tier] != sum(1 for state in run.state if state >> tier & 1):
            raise InvariantViolated(f"{run!r}: held in {tier.label} is wrong")
        children = [runs[child] for child in run.children or ()]
        if run.below[tier] != sum(1 for c in children if c.held[tier] or c.below[tier]):
            raise InvariantViolated(f"{run!r}: below in {tier.label} is wrong")
        if any(child.parent != run.id for child in children):
            raise InvariantViolated(f"{run!r}: a child knows another parent")
