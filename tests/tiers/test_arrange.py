"""arrange: which records count and what chains they make; the library and Python say the same."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import native
from kvtier.block import SLOT_BITS, SlotLabel
from kvtier.tiers.arrange import arrange
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.packing import pack_record
from kvtier.tiers.records import STRETCH_BLOCKS_MAX, Arranger, Found, Piece, Shape

A, B = b"a" * 16, b"b" * 16
CUTS = [(8192, 1), (8192, 100), (0, 0)]
SEGMENT_BYTES = 64 * 8192
SHAPES = {A: Shape(1, 8192, 4096, 1), B: Shape(7, 8192, 4096, 2)}


def label(key: str, parent: str = "", **changes: Any) -> SlotLabel:
    plain = SlotLabel(A, 1, named(key), named(parent), 0, 0, 4096, 5, generation=1 << 32)
    return replace(plain, **changes)


def named(key: str) -> bytes:
    return key.encode().ljust(16, b".") if key else b""


def record(slot: int, key: str, parent: str = "", **changes: Any) -> SlotRecord:
    return SlotRecord(slot, changes.pop("slot_bytes", 8192), label(key, parent, **changes))


def piece(records: Sequence[SlotRecord]) -> Piece:
    packed = [pack_record(*one) for one in records]
    keys, values = b"".join(k for k, _ in packed), b"".join(v for _, v in packed)
    return Piece(keys, array("I", [len(value) for _, value in packed]), values)


def both(pieces: Sequence[Piece]) -> Found:
    """What Python says, once the library (if it is there) said the same."""
    found = Arranger(pieces, CUTS, SEGMENT_BYTES, SHAPES).run()
    if native.library() is None:
        return found
    other = arrange(pieces, CUTS, SEGMENT_BYTES, SHAPES)
    assert list(other.stretches()) == list(found.stretches())
    assert other.verdicts == found.verdicts
    assert (other.dropped, other.stale) == (found.dropped, found.stale)
    assert other.generation_max == found.generation_max
    assert (other.block_count, other.damaged_count) == (found.block_count, found.damaged_count)
    assert list(other) == list(found)
    return found


def chains(found: Found) -> list[list[str]]:
    return [
        [
            one.keys[at : at + one.key_size].rstrip(b".").decode()
            for at in range(0, len(one.keys), one.key_size)
        ]
        for one in found.stretches()
    ]


def test_nothing_is_nothing() -> None:
    assert chains(both([])) == []


def test_chains_and_branches_parent_first() -> None:
    records = [
        record(0, "c", "b", position=2),
        record(1, "a", checksum=77),
        record(2, "b", "a", position=1),
        record(3, "x", "b", position=2),
        record(4, "m", "gone", position=9),
        record(5, "y", "x", position=3),
    ]
    found = both([piece(records[:2]), piece(records[2:])])
    assert chains(found) == [["a", "b"], ["c"], ["x", "y"], ["m"]]
    stretches = list(found.stretches())
    assert [(one.parent, one.position) for one in stretches] == [
        (b"", 0), (named("b"), 2), (named("b"), 2), (named("gone"), 9),
    ]  # fmt: skip
    assert list(stretches[0].slots) == [1, 2]
    assert list(stretches[0].checksums) == [77, 5]
    assert sorted(found) == sorted(records)
    assert found.dropped == found.stale == []


def test_long_chains_are_cut_and_older_ones_come_first() -> None:
    count = STRETCH_BLOCKS_MAX + 3
    young = [record(n, f"y{n}", f"y{n - 1}" if n else "", generation=9) for n in range(20)]
    old = record(30, "old", generation=8)
    assert chains(both([piece([*young, old])])) == [["old"], [f"y{n}" for n in range(20)]]
    cuts, bytes_ = [(8192, 1)], 8192 * count
    long = piece([record(n, f"k{n}", f"k{n - 1}" if n else "") for n in range(count)])
    for found in (
        arrange([long], cuts, bytes_, SHAPES), Arranger([long], cuts, bytes_, SHAPES).run(),
    ):  # fmt: skip
        assert [len(names) for names in chains(found)] == [STRETCH_BLOCKS_MAX, 3]


@pytest.mark.parametrize(
    "odd",
    [
        record(5, "k", epoch=2),
        record(5, "k", namespace=b"?" * 16),
        record(5, "k", slot_bytes=4096),
        record(5, "k", generation=0),  # older than the cut
        record(1 << SLOT_BITS | 5, "k", generation=99),
        record(64, "k"),  # beyond the segment
        record(2 << SLOT_BITS, "k"),  # not cut
        record(9 << SLOT_BITS, "k"),  # no such segment
        record(5, "k", size_bytes=4095),
        record(5, "k", shard=1),
    ],
)
def test_what_is_of_another_shape_is_dropped(odd: SlotRecord) -> None:
    found = both([piece([record(1, "good"), odd])])
    assert chains(found) == [["good"]]
    assert (found.dropped, found.stale) == ([odd.slot], [])


def test_an_unknown_codec_is_dropped() -> None:
    found = both([piece([record(1, "k", codec=200)])])
    assert found.dropped == [1]


def test_damage_is_dropped_and_counted() -> None:
    whole = piece([record(1, "a"), record(2, "b", "a"), record(3, "c", "b")])
    values = bytearray(whole.values)
    values[whole.lengths[0] + 50] ^= 1
    found = both([whole._replace(values=bytes(values))])
    assert (found.dropped, found.damaged_count) == ([2], 1)
    assert chains(found) == [["a"], ["c"]]
    keys = array("I", [1, 7, 3]).tobytes()
    assert both([whole._replace(keys=keys)]).dropped == [7]
    short = Piece(array("I", [1]).tobytes(), array("I", [3]), b"abc")
    assert both([short, whole]).dropped == [1]


def test_of_rivals_the_newest_counts() -> None:
    records = [
        record(1, "k", generation=5), record(2, "k", generation=7), record(3, "k", generation=6),
    ]  # fmt: skip
    found = both([piece(records)])
    assert [list(one.slots) for one in found.stretches()] == [[2]]
    assert (found.stale, found.generation_max) == ([1, 3], 7)


def test_shards_come_together_or_not_at_all() -> None:
    of_b: dict[str, Any] = {"namespace": B, "epoch": 7}
    records = [
        record(1, "w", shard=1, checksum=11, **of_b),
        record(2, "w", shard=0, checksum=10, **of_b),
        record(3, "half", "w", shard=1, **of_b),
        record(4, "w", shard=1, checksum=12, **of_b, generation=1 << 33),
        record(5, "child", "half", shard=0, **of_b),
        record(6, "child", "half", shard=1, **of_b),
    ]
    found = both([piece(records)])
    assert chains(found) == [["child"], ["w"]] or chains(found) == [["w"], ["child"]]
    of_w = next(one for one in found.stretches() if named("w") in one.keys)
    assert (list(of_w.slots), list(of_w.checksums)) == ([2, 4], [10, 12])
    assert found.stale == [1, 3]


def test_a_circle_of_parents_is_stale() -> None:
    records = [
        record(1, "x", "y"), record(2, "y", "x"), record(3, "self", "self"), record(4, "ok"),
        record(5, "below", "x"),
    ]  # fmt: skip
    found = both([piece(records)])
    assert chains(found) == [["ok"]]
    assert found.stale == [1, 2, 3, 5]


def test_one_key_of_another_length_does_not_speak_for_all() -> None:
    odd = record(0, "odd")
    odd.label.key += b"!"
    found = both([piece([odd, record(1, "a"), record(2, "b", "a")])])
    assert chains(found) == [["a", "b"]]
    assert found.stale == [0]


def test_unknown_descriptions_take_any_size() -> None:
    shapes = {A: Shape(1, 0, 0, 1)}
    records = piece([record(1, "a", size_bytes=17), record(2, "b", size_bytes=18)])
    assert arrange([records], CUTS, SEGMENT_BYTES, shapes).block_count == 2
    assert Arranger([records], CUTS, SEGMENT_BYTES, shapes).run().block_count == 2


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_both_agree_on_anything(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"k{n}" for n in range(rng.randrange(1, 30))]
    records = []
    for at in sorted(rng.sample(range(128), rng.randrange(1, 100))):
        slot = at // 64 << SLOT_BITS | at % 64
        of_b = rng.random() < 0.4
        changes: dict[str, Any] = {
            "namespace": B if of_b else A,
            "epoch": (7 if of_b else 1) + (rng.random() < 0.03),
            "shard": rng.randrange(2) if of_b else 0,
            "generation": rng.choice([99, 100, *range(1 << 32, (1 << 32) + 40)]),
            "position": rng.randrange(9),
            "checksum": rng.getrandbits(64),
            "size_bytes": 4096 - (rng.random() < 0.03),
        }
        records.append(record(slot, rng.choice(names), rng.choice(["", *names]), **changes))
    at = rng.randrange(len(records) + 1)
    first, second = piece(records[:at]), piece(records[at:])
    values = bytearray(second.values)
    if values and rng.random() < 0.3:
        values[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
    found = both([first, second._replace(values=bytes(values))])
    kept = found.verdicts.count(0)
    assert kept + len(found.dropped) + len(found.stale) == len(records)
