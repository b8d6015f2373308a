"""Every tier keeps the rules of tiers/base.py; and the suite catches tiers that do not."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from kvtier import machine
from kvtier.block import SlotIO, TierId
from kvtier.errors import BlockCorrupt, TierFailed
from kvtier.testing import conformance
from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks, MakeTier
from kvtier.testing.faults import FaultyTier
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.cipher import Keyring
from kvtier.tiers.dram import DramTier
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB

KINDS = ("dram", "single-tenant", "cxl", "ssd", "ssd buffered", "ssd tmpfs", "ssd encrypted")


@pytest.fixture(params=KINDS)
def make_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterable[MakeTier]:
    numbers = itertools.count()
    base = tmp_path
    if request.param == "ssd tmpfs":
        base = Path(f"/dev/shm/kvtier-test-{tmp_path.name}")
        if machine.file_system(base).type != "tmpfs":
            pytest.skip("/dev/shm is no tmpfs")

    def ssd() -> SsdTier:
        directory = base / str(next(numbers))
        mode = "off" if request.param == "ssd buffered" else "auto"
        keyring = None
        if request.param == "ssd encrypted":
            pytest.importorskip("cryptography")
            keyring = Keyring(bytes(32), wanted=lambda _: True)
        tier = SsdTier(directory, 2, MIB, direct_io=mode, min_free_bytes=0, keyring=keyring)
        tier.recover()
        tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
        return tier

    makers: dict[str, MakeTier] = {
        "dram": lambda: DramTier(2, MIB),
        "single-tenant": lambda: DramTier(2, MIB, trust="single-tenant"),
        "cxl": lambda: DramTier(2, MIB, tier=TierId.CXL, huge_pages="off"),
    }
    yield makers.get(request.param, ssd)
    if base != tmp_path:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("check", conformance.TIER_CHECKS, ids=lambda check: check.__name__)
def test_tier_keeps_the_rules(check: Callable[[MakeTier], None], make_tier: MakeTier) -> None:
    check(make_tier)


def test_faulty_tier_without_faults_is_the_tier(make_tier: MakeTier) -> None:
    conformance.check_tier(lambda: FaultyTier(make_tier()))


# --- planted bugs: the suite must see each of them


class OtherBytes(DramTier):
    """Verifies, then brings something else."""

    def read(self, batch: Sequence[SlotIO]) -> None:
        faulty = FaultyTier(DramTier(1, MIB), seed=1)
        super().read(batch)
        for item in batch[-1:]:
            faulty._flip(item.address, item.label.size_bytes)
        faulty.close()


class IgnoresFailure(DramTier):
    """A failing item is reported as a good one."""

    def read(self, batch: Sequence[SlotIO]) -> None:
        super().read(batch)
        for item in batch:
            item.error = None


class FailsTheBatch(DramTier):
    """One failing item takes the others with it."""

    def read(self, batch: Sequence[SlotIO]) -> None:
        super().read(batch)
        errors = [item.error for item in batch if item.error]
        for item in batch:
            item.error = errors[0] if errors else None


class ForgetsGenerations(DramTier):
    """Generations start again."""

    def write(self, batch: Sequence[SlotIO]) -> None:
        self._generations = itertools.count(1)
        super().write(batch)


class ErasesNeighbours(DramTier):
    """Erasing one slot scribbles over the segment."""

    def erase(self, slots: Iterable[SlotRecord], *, durable: bool) -> None:
        for record in slots:
            self.recycle(record.slot >> 20)


class Uncounted(DramTier):
    """Counts nothing."""

    def _count(self, more: object) -> None:
        return


@pytest.mark.parametrize(
    "planted",
    [OtherBytes, IgnoresFailure, FailsTheBatch, ForgetsGenerations, ErasesNeighbours, Uncounted],
)
def test_suite_catches_planted_bugs(planted: type[DramTier]) -> None:
    with pytest.raises(AssertionError):
        conformance.check_tier(lambda: planted(2, MIB))


def test_suite_catches_faults() -> None:
    def broken() -> FaultyTier:
        tier = FaultyTier(DramTier(2, MIB))
        tier.corrupt_read(2, for_ever=True)
        return tier

    with pytest.raises(AssertionError, match="read"):
        conformance.check_tier(broken)


# --- FaultyTier itself


def test_planned_faults_strike_once_or_for_ever() -> None:
    tier = FaultyTier(DramTier(1, MIB), seed=5)
    blocks = Blocks(tier, 4, 8192)

    tier.fail_write(2)
    tier.write(blocks.items)
    assert [bool(item.error) for item in blocks.items] == [False, True, False, False]
    tier.write(blocks.items)
    assert not any(item.error for item in blocks.items)

    tier.fail_read(3, for_ever=True)
    tier.read(blocks.items)
    assert [type(item.error) for item in blocks.items[2:]] == [TierFailed, TierFailed]
    tier.read(blocks.items)
    assert all(item.error for item in blocks.items)
    assert tier.counts().error_count == 7

    tier.heal()
    tier.corrupt_write(1)
    tier.write(blocks.items)
    tier.read(blocks.items)
    assert isinstance(blocks.items[0].error, BlockCorrupt)
    assert not any(item.error for item in blocks.items[1:])

    tier.fail_sync()
    tier.fail_erase()
    with pytest.raises(TierFailed):
        tier.sync()
    with pytest.raises(TierFailed):
        tier.erase([], durable=True)
    tier.sync()
    tier.erase([], durable=True)
    tier.close()


def test_gate_forces_an_interleaving() -> None:
    import threading

    tier = FaultyTier(DramTier(1, MIB))
    blocks = Blocks(tier, 1, 4096)
    gate = tier.hold("write")
    writer = threading.Thread(target=tier.write, args=(blocks.items,))
    writer.start()
    assert gate.reached.wait(10)
    assert tier.counts().written_slots == 0
    gate.open()
    writer.join(10)
    assert tier.counts().written_slots == 1
    tier.close()
