"""The prefix forest and the search over it, against a naive one, for random chains."""

from __future__ import annotations

import random

import pytest
from books import DRAM, SSD, Books, chain, keys_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.block import GroupKind, Keys, Reason, TierId
from kvtier.ledger import search
from kvtier.ledger.chain import RUN_BLOCKS_MAX


def test_a_chain_is_one_run_and_a_branch_splits_it() -> None:
    books = Books()
    space, runs = books.space(), books.ledger.chains.runs
    books.store(space, chain("a", 4))
    assert [len(run) for run in runs.values()] == [4]

    books.store(space, chain("b", 2), parent=chain("a", 4)[1])

    assert sorted(len(run) for run in runs.values()) == [2, 2, 2]
    assert books.found(space, chain("a", 4)) == 4
    assert books.found(space, keys_of("a0", "a1", "b0", "b1")) == 4
    books.check()


def test_a_run_has_at_most_so_many_blocks() -> None:
    books = Books(segments=200)
    space = books.space()
    books.store(space, chain("a", RUN_BLOCKS_MAX + 5))
    assert sorted(len(run) for run in books.ledger.chains.runs.values()) == [5, RUN_BLOCKS_MAX]
    assert books.found(space, chain("a", RUN_BLOCKS_MAX + 5)) == RUN_BLOCKS_MAX + 5
    books.check()


def test_parents_in_a_circle_are_kept_apart() -> None:
    books = Books()
    space = books.space()
    books.store(space, keys_of("a"), parent=keys_of("c")[0])
    books.store(space, keys_of("b"), parent=keys_of("a")[0])
    books.store(space, keys_of("c"), parent=keys_of("b")[0])
    books.store(space, keys_of("self"), parent=keys_of("self")[0])
    books.check()
    assert books.found(space, keys_of("a", "b", "c")) == 3
    for name in ("a", "self"):
        books.ledger.evict(space, keys_of(name))
    assert books.ledger.chains.runs == {}
    books.check()


def test_a_lost_block_leaves_a_gap_that_a_later_commit_refills() -> None:
    books = Books()
    space = books.space()
    books.store(space, chain("a", 4))
    books.ledger.lose(space, chain("a", 4)[1], DRAM)
    assert books.found(space, chain("a", 4)) == 1
    assert books.ledger.lookup([(space, chain("a", 4))])[0][0].reason is Reason.CORRUPT
    assert (space.block_count, space.placeholder_count) == (3, 1)

    offer = books.reserve(space, chain("a", 4))
    assert offer.granted == (1,)
    books.commit(offer)

    assert books.found(space, chain("a", 4)) == 4
    assert (space.block_count, space.placeholder_count) == (4, 0)
    books.check()


def test_trim_forgets_only_ends() -> None:
    books = Books()
    space = books.space()
    books.store(space, chain("a", 4))
    for name, places in (("a1", 4), ("a2", 4), ("a3", 1)):
        books.ledger.lose(space, keys_of(name)[0], DRAM)
        assert len(space.index) == places
    books.ledger.lose(space, keys_of("a0")[0], DRAM)
    assert not books.ledger.chains.runs
    books.check()


def test_what_grows_from_a_pinned_stretch_is_not_pinned() -> None:
    """Found: a block appended to a pinned run was pinned with it, and no unpin ended that."""
    books = Books()
    space = books.space()
    books.store(space, chain("a", 2))
    assert books.ledger.pin(space, chain("a", 2)) == 2
    books.store(space, chain("a", 4))
    assert books.ledger.unpin(space, chain("a", 2)) == 2
    assert not any(run.pins for run in books.ledger.chains.runs.values())
    books.check()


def test_a_pin_holds_what_it_names_and_no_more() -> None:
    books = Books(ssd_segments=0)
    space = books.space()
    books.store(space, chain("a", 4))
    assert books.ledger.pin(space, chain("a", 2)) == 2
    books.moves.shrink_to(DRAM, 0)
    assert books.found(space, chain("a", 4)) == 2
    books.ledger.unpin(space, chain("a", 4))
    books.moves.shrink_to(DRAM, 0)
    assert books.found(space, chain("a", 4)) == 0
    books.check()


def test_an_evict_takes_the_subtree_also_of_a_block_that_is_not_there() -> None:
    """Found: descendants that came without the evicted block stayed."""
    books = Books()
    space = books.space()
    books.store(space, chain("a", 4))
    books.store(space, chain("b", 2), parent=chain("a", 4)[2])
    assert len(books.ledger.evict(space, keys_of("a2"))) == 4
    assert (books.found(space, chain("a", 4)), books.used()) == (2, (2, 0))

    books.store(space, chain("c", 3, first=1), parent=keys_of("c0")[0])
    assert books.ledger.evict(space, keys_of("c0", "never")) != []
    assert books.used() == (2, 0)
    assert books.ledger.lookup([(space, chain("a", 4))])[0][0].reason is Reason.EVICTED
    books.check()


def test_windows_and_states_need_only_their_end() -> None:
    books = Books(segments=8)
    sliding = books.space(group=GroupKind.SLIDING, window=3)
    state = books.space(group=GroupKind.STATE)
    full = books.space()
    keys = chain("a", 6)
    for space in (sliding, state, full):
        books.store(space, keys)
    for gap in ("a0", "a1", "a2"):
        books.ledger.lose(sliding, keys_of(gap)[0], DRAM)
    assert books.found(sliding, keys) == 6
    books.ledger.lose(state, keys_of("a5")[0], DRAM)
    found, _, tokens = books.ledger.lookup([(full, keys), (sliding, keys), (state, keys)])
    assert tokens == 5
    assert [one.first_needed for one in found] == [0, 3, 4]
    assert found[0].reason is Reason.NOT_ACCEPTABLE
    books.ledger.lose(state, keys_of("a4")[0], DRAM)
    # 4 would need a2 and a3 of the window: the longest length good for all is none.
    assert books.ledger.lookup([(full, keys), (sliding, keys), (state, keys)])[2] == 0
    books.check()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), needed=st.integers(1, 4))
def test_search_finds_what_probing_finds(seed: int, needed: int) -> None:
    rng = random.Random(seed)
    books = Books(segments=32)
    space = books.space()
    names = [f"{rng.choice('ab')}{n}" for n in range(rng.randint(1, 60))]
    stretches = list(range(0, len(names), rng.randint(1, 9)))
    rng.shuffle(stretches)
    for start in stretches:
        end = start + rng.randint(1, 12)
        parent = keys_of(names[start - 1])[0] if start else b""
        books.store(space, keys_of(*names[start:end]), parent=parent)
    for _ in range(rng.choice((0, 1, 3, 30))):
        books.ledger.lose(space, keys_of(rng.choice(names))[0], DRAM)
    for _ in range(rng.randint(0, 2)):
        books.ledger.evict(space, keys_of(rng.choice(names)))
    books.check()
    keys, runs = keys_of(*names), books.ledger.chains.runs
    ready = [search.is_ready(space, runs, key) for key in keys.split()]
    longest = ready.index(False) if False in ready else len(names)
    assert books.found(space, keys) == longest
    window = next(n for n in range(len(names), -1, -1) if all(ready[max(0, n - needed) : n]))
    assert search.window(space, runs, keys, len(names), needed) == window


@pytest.mark.parametrize("holes", [1, 15, 16, 17, 100])
def test_a_chain_full_of_holes_is_searched_right(holes: int) -> None:
    books = Books(segments=128)
    space = books.space()
    keys = chain("a", 400)
    books.store(space, keys)
    for hole in range(holes):
        books.ledger.lose(space, keys[399 - 3 * hole - 1], DRAM)
    assert books.found(space, keys) == 399 - 3 * (holes - 1) - 1


def test_runs_of_an_answer_name_the_fastest_tier() -> None:
    books = Books()
    space = books.space()
    books.store(space, chain("a", 4))
    books.moves.make_room(DRAM, space, 14)
    books.finish()
    found = books.ledger.lookup([(space, chain("a", 4))])[0][0]
    assert [(run.tier, run.block_count) for run in found.runs] == [(DRAM, 2), (SSD, 2)]


def test_a_key_under_another_parent_is_taken_singly() -> None:
    books = Books()
    space = books.space()
    books.store(space, keys_of("a", "b", "c"))
    keys: Keys = keys_of("c", "a", "b")
    assert books.found(space, keys) == 3
    assert TierId.DRAM in {run.tier for run in books.ledger.lookup([(space, keys)])[0][0].runs}


def test_a_large_subtree_is_evicted_in_parts() -> None:
    books = Books(segments=16)
    space = books.space()
    books.store(space, chain("a", 6))
    for n in range(4):
        books.store(space, chain(f"leaf{n}-", 5), parent=chain("a", 6)[n + 1])
    gone: list[bytes] = []
    done = False
    while not done:
        part, done = books.ledger.evict_some(space, keys_of("a1"), 3)
        assert len(part) <= 3
        gone += part
        books.check()
        assert done or books.found(space, keys_of("a0", "a1")) == 2, "the root goes last"
    assert len(gone) == len(set(gone)) == 25
    assert books.found(space, chain("a", 6)) == 1
    assert books.used()[0] == 1
