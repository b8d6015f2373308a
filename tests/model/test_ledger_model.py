"""The ledger against a model that probes every block, with every rule in any order.

KVTIER_MODEL_EXAMPLES=20000 pytest tests/model     # or --hypothesis-profile=long
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import LedgerMachine, walk

from kvtier.block import TierId
from kvtier.ledger import filling, moves, search
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.chains import Chains
from kvtier.ledger.givers import Givers
from kvtier.ledger.ledger import Ledger

QUIET = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
EXAMPLES = int(os.environ.get("KVTIER_MODEL_EXAMPLES", "0"))


def run_machine(examples: int, *, steps: int, shrink: bool) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        LedgerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            # The same examples each time; another seed only where more are asked for.
            derandomize=not EXAMPLES,
            print_blob=True,
            phases=phases,
            suppress_health_check=QUIET,
        ),
    )


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_the_ledger_is_the_model() -> None:
    run_machine(EXAMPLES or 200, steps=40, shrink=True)


@pytest.mark.timeout(0 if EXAMPLES else 240)
def test_random_walks_of_the_ledger() -> None:
    for seed in range(EXAMPLES or 400):
        try:
            walk(seed, steps=80)
        except Exception as error:
            error.add_note(f"walk(seed={seed}, steps=80)")
            raise


# --- the harness must fail where the ledger is wrong


def source_freed_under_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = moves.Moves.finish_move

    def broken(self: moves.Moves, move: moves.Move) -> bool:
        found = self._ledger.chains.find(self._ledger.spaces[move.namespace_id], move.labels[0].key)
        leases = None
        if found is not None and move.drop_source:
            leases, found[0].leases = found[0].leases, None
        done = finish(self, move)
        if found is not None and leases:
            found[0].leases = leases
        return done

    monkeypatch.setattr(moves.Moves, "finish_move", broken)


def source_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = moves.Moves._plan

    def broken(
        self: moves.Moves, run: Run, place: int, route: moves.Route, *, drop_source: bool
    ) -> moves.Move | None:
        move = plan(self, run, place, route, drop_source=drop_source)
        if move is not None and drop_source:
            self._ledger.free(run, place, route.source, "displaced")
        return move

    monkeypatch.setattr(moves.Moves, "_plan", broken)


def leased_slot_freed_on_evict(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Ledger.free

    def broken(self: Ledger, run: Run, place: int, tier: TierId, why: str) -> None:
        leases, run.leases = run.leases, None
        free(self, run, place, tier, why)
        run.leases = leases

    monkeypatch.setattr(Ledger, "free", broken)


def gap_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    back_to = search.back_to

    def broken(
        space: Namespace, runs: dict[int, Run], keys: search.Keys, first: int, last: int
    ) -> tuple[list[search.Span], int]:
        spans, gap = back_to(space, runs, keys, first, last)
        if gap > first:
            tail, _ = back_to(space, runs, keys, gap + 1, last)
            head, lost = broken(space, runs, keys, first, gap - 1)
            return ([], lost) if lost >= 0 else (head + tail, -1)
        return spans, gap

    monkeypatch.setattr(search, "back_to", broken)


def reserve_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = filling.Filling.reserve

    def broken(self: filling.Filling, space: Namespace, *args: object, **kw: object) -> object:
        offer = reserve(self, space, *args, **kw)  # type: ignore[arg-type]
        slots = self._ledger.slots[self._ledger.top]
        slot_bytes = space.slot_bytes[self._ledger.top]
        if offer.reservation is None and slots.available(space.tenant, slot_bytes):
            slots.acquire(space.tenant, slot_bytes, 1)
        return offer

    monkeypatch.setattr(filling.Filling, "reserve", broken)


def split_forgets_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Chains.split

    def broken(self: Chains, run: Run, place: int) -> Run:
        leases, run.leases = run.leases, None
        tail = split(self, run, place)
        run.leases = leases
        return tail

    monkeypatch.setattr(Chains, "split", broken)


def split_keeps_the_lease_from_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_lease_split", lambda self, run, tail: None)


def half_a_block_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = filling.Filling._commit_shard

    def broken(
        self: filling.Filling, space: Namespace, entry: filling.Entry, shard: int, checksum: int
    ) -> bool:
        partial = self.partials[space.id, entry.key]
        if shard == 1:
            partial.states[0] = filling.COMMITTED
        return commit(self, space, entry, shard, checksum)

    monkeypatch.setattr(filling.Filling, "_commit_shard", broken)


def ancestors_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Givers, "leaf", lambda self, run, tier: run)
    monkeypatch.setattr(Givers, "may_take", lambda self, run, tier: not run.leases and not run.pins)


PLANTED: Sequence[Callable[[pytest.MonkeyPatch], None]] = (
    source_freed_under_a_lease,
    source_freed_too_early,
    leased_slot_freed_on_evict,
    gap_ignored,
    reserve_leaks,
    split_forgets_leases,
    split_keeps_the_lease_from_knowing,
    half_a_block_is_ready,
    ancestors_go_first,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    with pytest.raises((AssertionError, KeyError, IndexError)):
        walk_until_something_is_found()


def walk_until_something_is_found() -> None:
    for seed in range(2000):
        walk(seed, steps=60)
