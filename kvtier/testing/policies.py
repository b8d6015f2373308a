"""Conformance of eviction policies: what the ledger relies on, whatever the order is.

    def test_my_policy():
        check_policy(MyPolicy)

A violation is an AssertionError that names the rule. Quality is not judged here: that is
measured by replaying traces.

Does not: need pytest, slots or blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from kvtier.ledger.policy import Policy

MakePolicy = Callable[[], Policy]


def check_policy(make_policy: MakePolicy) -> None:
    """Runs every rule of `kvtier.ledger.policy.Policy`. Takes less than a second."""
    for check in POLICY_CHECKS:
        check(make_policy)


def check_books(make_policy: MakePolicy) -> None:
    """It orders exactly the runs that were added and not removed, each once, at any time."""
    policy, held, rng = make_policy(), set[int](), random.Random(7)
    next_id = 1
    for _ in range(2_000):
        step = rng.randrange(5)
        if step <= 1 or not held:
            policy.add(next_id)
            held.add(next_id)
            next_id += 1
        elif step == 2:
            policy.touch(rng.choice(sorted(held)))
        elif step == 3:
            policy.split(rng.choice(sorted(held)), next_id)
            held.add(next_id)
            next_id += 1
        else:
            gone = rng.choice(sorted(held))
            policy.remove(gone)
            held.remove(gone)
        order = list(policy.order())
        assert len(order) == len(set(order)), "a run is ordered twice"
        assert set(order) == held, "the order names other runs than are held"
        assert len(policy) == len(held), "len() is not the number of runs"


def check_leaves_go_first(make_policy: MakePolicy) -> None:
    """Of a chain that was touched from its end to its start, the end goes first."""
    policy = make_policy()
    chain = [1, 2, 3, 4]
    for run_id in chain:
        policy.add(run_id)
    for _ in range(3):
        for run_id in reversed(chain):
            policy.touch(run_id)
    order = list(policy.order())
    assert order == list(reversed(chain)), f"an ancestor goes before its descendant: {order}"


def check_tail_goes_first(make_policy: MakePolicy) -> None:
    """The cut-off end of a run goes before the rest of it."""
    policy = make_policy()
    for run_id in (1, 2, 3):
        policy.add(run_id)
    policy.split(2, 4)
    order = list(policy.order())
    assert order.index(4) < order.index(2), f"a head goes before its tail: {order}"


def check_asking_changes_nothing(make_policy: MakePolicy) -> None:
    """Looking at the order, to its end or not, leaves it as it is."""
    policy = make_policy()
    for run_id in (1, 2, 3):
        policy.add(run_id)
    before = list(policy.order())
    next(iter(policy.order()))
    assert list(policy.order()) == before, "asking for the order changed it"


def check_nobody_starves(make_policy: MakePolicy) -> None:
    """A run that is never used again goes at last, however many others are used."""
    policy = make_policy()
    for run_id in range(1, 51):
        policy.add(run_id)
    for _ in range(100):
        for run_id in range(2, 51):
            policy.touch(run_id)
    assert 1 in list(policy.order())[:10], "a run unused for long is kept before used ones"


POLICY_CHECKS: tuple[Callable[[MakePolicy], None], ...] = (
    check_books,
    check_leaves_go_first,
    check_tail_goes_first,
    check_asking_changes_nothing,
    check_nobody_starves,
)
