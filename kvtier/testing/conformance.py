"""Conformance suites: what every implementation of a protocol must do, as functions to call.

    def test_my_tier(tmp_path):
        check_tier(lambda: MyTier(tmp_path))

`make_tier` returns a fresh, empty tier; it is called several times, the former one having been
closed. A tier that wants namespaces registered registers `NAMESPACE` first. A violation is an
AssertionError that names the rule.

Does not: need pytest, or know what a tier is made of.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from kvtier import native
from kvtier.block import SLOT_BITS, SlotIO, SlotLabel
from kvtier.errors import BlockCorrupt, TierFailed
from kvtier.tiers.base import SlotRecord, Tier
from kvtier.units import KIB, PAGE_BYTES, align_up

NAMESPACE = b"kvtier-conformed"
DESCRIPTOR = b'{"model": "conformance"}'

MakeTier = Callable[[], Tier]


class Blocks:
    """A batch of blocks in memory of their own, all of one size, and the items that name them.

    `contents[i]` is what item i should hold; the items' addresses lie in `buffer`, page-aligned.
    """

    def __init__(
        self, tier: Tier, count: int, size_bytes: int, *, seed: int = 0, first_slot: int = 0
    ) -> None:
        self.size_bytes = size_bytes
        self.stride = align_up(size_bytes, PAGE_BYTES)
        self.buffer = native.AlignedBuffer(self.stride * count)
        source = random.Random(seed)
        self.contents = [source.randbytes(size_bytes) for _ in range(count)]
        self.slot_bytes = tier.plan.slot_bytes(size_bytes)
        per_segment = tier.plan.size_bytes // self.slot_bytes
        self.items = []
        for index, content in enumerate(self.contents):
            self.buffer.view[index * self.stride : index * self.stride + size_bytes] = content
            segment, place = divmod(first_slot + index, per_segment)
            assert segment < tier.plan.count, "the tier under test is too small for this check"
            label = SlotLabel(
                NAMESPACE, 0, source.randbytes(32), b"", index, 0, size_bytes
            )  # checksum 0: the tier fills it in
            address = self.buffer.address + index * self.stride
            self.items.append(SlotIO(segment << SLOT_BITS | place, self.slot_bytes, address, label))

    def scrub(self) -> None:
        """Overwrites the memory, so that what a read brings is what the tier had."""
        self.buffer.view[:] = b"\xa5" * self.buffer.size_bytes

    def held(self) -> list[bytes]:
        """What lies at the items' addresses now."""
        starts = range(0, self.buffer.size_bytes, self.stride)
        return [bytes(self.buffer.view[start : start + self.size_bytes]) for start in starts]

    def records(self) -> list[SlotRecord]:
        """The items as records, for `erase`."""
        return [SlotRecord(item.slot, item.slot_bytes, item.label) for item in self.items]


def check_tier(make_tier: MakeTier) -> None:
    """Runs every rule of `kvtier.tiers.base`. Takes well under a minute."""
    for check in TIER_CHECKS:
        check(make_tier)


def check_round_trip(make_tier: MakeTier) -> None:
    """What was written is read back, for sizes around every alignment, several at a time."""
    for size_bytes in (1, 4095, 4096, 4097, 64 * KIB, 100_000):
        with _open(make_tier) as tier:
            blocks = Blocks(tier, 3, size_bytes, seed=size_bytes)
            tier.write(blocks.items)
            _assert_all_done(blocks.items, f"write of {size_bytes} bytes")
            for item, content in zip(blocks.items, blocks.contents, strict=True):
                wanted = native.checksum_bytes(content)
                assert item.label.checksum == wanted, "write fills in the checksum of the bytes"
            _assert_reads_back(tier, blocks, f"{size_bytes} bytes")
            _assert_counts(tier, blocks)


def check_unaligned_addresses(make_tier: MakeTier) -> None:
    """Addresses of any alignment do, and not one byte beyond `size_bytes` is touched."""
    with _open(make_tier) as tier:
        blocks = Blocks(tier, 1, 5_000, seed=3)
        [item], [content] = blocks.items, blocks.contents
        with native.AlignedBuffer(4 * PAGE_BYTES) as odd:
            odd.view[:] = b"\xee" * odd.size_bytes
            odd.view[13 : 13 + len(content)] = content
            item.address = odd.address + 13
            tier.write([item])
            _assert_all_done([item], "write from an odd address")
            odd.view[:] = b"\xee" * odd.size_bytes
            tier.read([item])
            _assert_all_done([item], "read to an odd address")
            wanted = b"\xee" * 13 + content
            wanted += b"\xee" * (odd.size_bytes - len(wanted))
            assert bytes(odd.view) == wanted, "read touches its bytes and no others"


def check_generations_grow(make_tier: MakeTier) -> None:
    """Every write gets a generation greater than any before."""
    with _open(make_tier) as tier:
        blocks = Blocks(tier, 4, PAGE_BYTES)
        seen = 0
        for _ in range(3):
            tier.write(blocks.items)
            generations = [item.label.generation for item in blocks.items]
            assert len(set(generations)) == len(generations), "generations differ in a batch"
            assert min(generations) > seen, "generations grow from write to write"
            seen = max(generations)


def check_rewrite(make_tier: MakeTier) -> None:
    """A slot written again holds the new block, and the old label no longer reads."""
    with _open(make_tier) as tier:
        old = Blocks(tier, 2, 8 * KIB, seed=1)
        new = Blocks(tier, 1, 8 * KIB, seed=2)
        tier.write(old.items)
        tier.write(new.items)
        _assert_reads_back(tier, new, "after rewriting")
        old.scrub()
        tier.read(old.items)
        assert isinstance(old.items[0].error, BlockCorrupt), "an overwritten block is corrupt"
        assert old.items[1].error is None, "its neighbour is not"
        assert old.held()[1] == old.contents[1], "the neighbour's bytes are whole"


def check_wrong_label(make_tier: MakeTier) -> None:
    """Reading with the label of other bytes is BlockCorrupt, for that item only."""
    with _open(make_tier) as tier:
        blocks = Blocks(tier, 3, 16 * KIB, seed=4)
        tier.write(blocks.items)
        sound = blocks.items[1].label
        blocks.items[1].label = replace(sound, checksum=sound.checksum ^ 1)
        blocks.scrub()
        tier.read(blocks.items)
        errors = [item.error for item in blocks.items]
        assert isinstance(errors[1], BlockCorrupt), "bytes that the label does not describe"
        assert errors[0] is None, "a failing item leaves the others alone"
        assert errors[2] is None, "a failing item leaves the others alone"
        held = blocks.held()
        assert (held[0], held[2]) == (blocks.contents[0], blocks.contents[2]), "others are whole"
        assert tier.counts().corrupt_count == 1, "corrupt reads are counted"
        blocks.items[1].label = sound
        _assert_reads_back(tier, blocks, "after a corrupt read")


def check_failures_are_told(make_tier: MakeTier) -> None:
    """A batch with an item that cannot be read says so, on the item and in the counts."""
    with _open(make_tier) as tier:
        blocks = Blocks(tier, 2, PAGE_BYTES, seed=5)
        tier.write(blocks.items[:1])
        blocks.items[1].label.checksum = 12345
        blocks.scrub()
        tier.read(blocks.items)
        told = blocks.items[1].error
        assert isinstance(told, BlockCorrupt | TierFailed), "a slot never written does not read"
        assert blocks.items[0].error is None, "the written one does"
        assert blocks.held()[0] == blocks.contents[0], "the written one does"
        counts = tier.counts()
        assert counts.corrupt_count + counts.error_count == 1, "failures are counted"
        tier.read(blocks.items[:1])
        assert blocks.items[0].error is None, "an earlier error does not stick"


def check_erase(make_tier: MakeTier) -> None:
    """Erasing, durably or not, leaves other slots alone and the slot usable."""
    for durable in (False, True):
        with _open(make_tier) as tier:
            blocks = Blocks(tier, 3, 8 * KIB, seed=6)
            tier.write(blocks.items)
            tier.erase(blocks.records()[:1], durable=durable)
            tier.erase([], durable=durable)
            kept = blocks.items[1:]
            blocks.scrub()
            tier.read(kept)
            _assert_all_done(kept, "read beside an erased slot")
            assert blocks.held()[1:] == blocks.contents[1:], "neighbours of an erased slot"
            again = Blocks(tier, 1, 8 * KIB, seed=7)
            tier.write(again.items)
            _assert_reads_back(tier, again, "an erased slot written again")


def check_threads(make_tier: MakeTier) -> None:
    """Batches of different slots at the same time, in different threads, do not meet."""
    with _open(make_tier) as tier:
        batches = [Blocks(tier, 4, 8 * KIB, seed=10 + i, first_slot=4 * i) for i in range(4)]
        wrong: list[str] = []

        def turn(blocks: Blocks) -> None:
            try:
                for _ in range(5):
                    tier.write(blocks.items)
                    _assert_reads_back(tier, blocks, "beside other threads")
                    for item, content in zip(blocks.items, blocks.contents, strict=True):
                        start = item.address - blocks.buffer.address
                        blocks.buffer.view[start : start + len(content)] = content
            except AssertionError as error:
                wrong.append(str(error))

        threads = [threading.Thread(target=turn, args=(blocks,)) for blocks in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[0]
        generations = [item.label.generation for blocks in batches for item in blocks.items]
        assert len(set(generations)) == len(generations), "generations differ between threads"


def check_empty_and_sync(make_tier: MakeTier) -> None:
    """Empty batches, sync, check, counts and repr may be called at any time."""
    with _open(make_tier) as tier:
        tier.write([])
        tier.read([])
        tier.sync()
        tier.check()
        counts = tier.counts()
        assert (counts.written_slots, counts.read_slots, counts.error_count) == (0, 0, 0)
        assert type(tier).__name__ in repr(tier), "repr is the status"
        assert " at 0x" not in repr(tier), "repr is the status"


TIER_CHECKS: tuple[Callable[[MakeTier], None], ...] = (
    check_round_trip,
    check_unaligned_addresses,
    check_generations_grow,
    check_rewrite,
    check_wrong_label,
    check_failures_are_told,
    check_erase,
    check_threads,
    check_empty_and_sync,
)


@contextmanager
def _open(make_tier: MakeTier) -> Iterator[Tier]:
    tier = make_tier()
    try:
        yield tier
        tier.check()
    finally:
        tier.close()


def _assert_all_done(items: Sequence[SlotIO], what: str) -> None:
    for item in items:
        assert item.error is None, f"{what}: {item.error}"


def _assert_reads_back(tier: Tier, blocks: Blocks, what: str) -> None:
    blocks.scrub()
    tier.read(blocks.items)
    _assert_all_done(blocks.items, f"read, {what}")
    assert blocks.held() == blocks.contents, f"read gives the bytes that were written, {what}"


def _assert_counts(tier: Tier, blocks: Blocks) -> None:
    counts = tier.counts()
    wanted = (len(blocks.items), blocks.size_bytes * len(blocks.items))
    assert (counts.written_slots, counts.written_bytes) == wanted, "writes are counted"
    assert (counts.read_slots, counts.read_bytes) == wanted, "reads are counted"
