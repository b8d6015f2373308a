"""An SSD tier comes back from whatever of its state directory is left, and never says too much."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.block import SLOT_BITS, BlockFormat, NamespaceSpec, SlotIO, SlotLabel
from kvtier.errors import DaemonUnavailable, TierFailed
from kvtier.native import AlignedBuffer
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.files import Files
from kvtier.tiers.identity import START_BITS
from kvtier.tiers.slab import SLAB_RESERVED_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.units import KIB, MIB

SIZE = 4 * KIB
SLOT_BYTES = 8 * KIB
PER_SLAB = MIB // SLOT_BYTES
SPECS = {
    name: NamespaceSpec(name, BlockFormat(1, 1, 1, "float16", 16, opaque_bytes=SIZE))
    for name in ("one", "two")
}


def key_of(name: int) -> bytes:
    return name.to_bytes(2, "big") * 16


class Life:
    """A tier from its start to its end. `found` is what came back: name of block -> its record."""

    def __init__(self, directory: Path, *, files: Files | None = None, segments: int = 3) -> None:
        self.tier = SsdTier(directory, segments, MIB, min_free_bytes=0, files=files)
        self.listed = list(self.tier.recover())
        self.found = {int.from_bytes(r.label.key[:2], "big"): r for r in self.listed}
        assert len(self.found) == len(self.listed), "a block came back twice"
        self.items: list[SlotIO] = []  # those written last
        self.tier.check()

    def put(
        self, names: range, *, first: int | None = None, space: str = "one", epoch: int = 1,
        parent: int | None = None,
    ) -> list[SlotRecord]:  # fmt: skip
        """Writes blocks, a chain, in the slots from number `first` (their names) on."""
        spec = SPECS[space]
        self.tier.register_namespace(spec.digest, spec.to_json(), epoch)
        self.items = items = []
        above = b"" if parent is None else key_of(parent)
        with AlignedBuffer(len(names) * SIZE) as memory:
            for at, name in enumerate(names):
                memory.view[at * SIZE : (at + 1) * SIZE] = content(name)
                number = name if first is None else first + at
                slot = number // PER_SLAB << SLOT_BITS | number % PER_SLAB
                label = SlotLabel(spec.digest, epoch, key_of(name), above, at, 0, SIZE)
                items.append(SlotIO(slot, SLOT_BYTES, memory.address + at * SIZE, label))
                above = key_of(name)
            self.tier.write(items)
        assert not any(item.error for item in items)
        return [SlotRecord(item.slot, item.slot_bytes, item.label) for item in items]

    def reads(self, records: list[SlotRecord] | None = None) -> set[int]:
        """Names of the blocks whose bytes are there, which must be theirs."""
        good = set()
        with AlignedBuffer(SIZE) as memory:
            for record in self.listed if records is None else records:
                item = SlotIO(record.slot, record.slot_bytes, memory.address, record.label)
                self.tier.read([item])
                if item.error is None:
                    name = int.from_bytes(record.label.key[:2], "big")
                    assert bytes(memory.view) == content(name)
                    good.add(name)
        return good

    @property
    def start_number(self) -> int:
        [record] = self.put(range(399, 400), first=383)
        return record.label.generation >> START_BITS

    def kill(self) -> None:
        """As the kernel would: nothing is synced or marked clean."""
        self.tier._catalogue.abandon()
        for slab in self.tier._slabs:
            slab.close()

    def close(self) -> None:
        self.tier.close()


def content(name: int) -> bytes:
    return (b"block %d " % name).ljust(32, b".") * (SIZE // 32)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A directory with blocks 0..299 in three slabs, cleanly closed; 150 and 160 were evicted and
    200..219 are of a namespace that was cleared; its blocks 220..224 are of the new epoch.
    """
    directory = tmp_path / "ssd"
    life = Life(directory)
    records = life.put(range(200))
    gone = [records[150], records[160]]
    life.put(range(200, 220), space="two")
    life.tier.set_epoch(SPECS["two"].digest, 2)
    life.put(range(220, 225), space="two", epoch=2)
    life.put(range(225, 300))
    life.tier.erase(gone, durable=True)
    life.close()
    return directory


ALL = set(range(300)) - {150, 160} - set(range(200, 220))


def delete(*names: str) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        for name in names:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return run


def damage(name: str, at: int) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[at] ^= 0x40
        (directory / name).write_bytes(content)

    return run


LOST = ["catalogue", "namespaces", "identity", "clean"]


@pytest.mark.parametrize(
    "names", [c for n in range(5) for c in itertools.combinations(LOST, n)], ids="+".join
)
def test_whatever_small_file_is_lost_slabs_know(left: Path, names: tuple[str, ...]) -> None:
    delete(*names)(left)
    for _ in range(2):
        life = Life(left)
        assert life.found.keys() == ALL
        assert life.reads() == ALL
        assert {d: e for d, _, e in life.tier.namespaces()} == {
            SPECS["one"].digest: 1, SPECS["two"].digest: 2,
        }  # fmt: skip
        for name, record in life.found.items():
            alone = name in (0, 220, 225)
            assert record.label.parent == (b"" if alone else key_of(name - 1))
        life.kill()


@pytest.mark.parametrize(
    "harm",
    [
        damage("namespaces", 30),
        damage("identity", 3),
        damage("identity", 30),
        damage("catalogue/data.mdb", 4200),
        delete("catalogue/data.mdb"),
    ],
)
def test_whatever_small_file_is_damaged_slabs_know(left: Path, harm: Callable[..., None]) -> None:
    harm(left)
    life = Life(left)
    assert life.found.keys() == ALL
    assert life.reads() == ALL
    life.close()


@pytest.mark.parametrize("names", [(), ("catalogue",)])
def test_a_truncated_slab_is_misses(left: Path, names: tuple[str, ...]) -> None:
    delete(*names)(left)
    slab = left / "slabs" / "00001.slab"
    with slab.open("r+b") as file:
        file.truncate(SLAB_RESERVED_BYTES + 10 * SLOT_BYTES + 100)
    life = Life(left)
    kept = {name for name in ALL if not PER_SLAB + 10 <= name < 2 * PER_SLAB}
    assert life.reads() == kept
    if names:
        assert life.found.keys() == kept
    life.close()


@pytest.mark.parametrize("names", [(), ("catalogue",), ("catalogue", "namespaces", "identity")])
def test_swapped_slabs_are_misses(left: Path, names: tuple[str, ...]) -> None:
    delete(*names)(left)
    slabs = left / "slabs"
    (slabs / "00000.slab").rename(slabs / "x")
    (slabs / "00001.slab").rename(slabs / "00000.slab")
    (slabs / "x").rename(slabs / "00001.slab")
    before = max(start_numbers(left), default=0)
    life = Life(left)
    kept = {name for name in ALL if name >= 2 * PER_SLAB}
    assert life.found.keys() == kept
    assert life.reads() == kept
    assert life.start_number > before
    life.put(range(300, 304), first=0)  # the slab is cut anew
    life.close()
    again = Life(left)
    assert again.reads() == kept | set(range(300, 304)) | {399}
    again.close()


def start_numbers(directory: Path) -> list[int]:
    """Of all generations that stand in slot headers anywhere."""
    found = []
    for path in (directory / "slabs").glob("*.slab"):
        content = path.read_bytes()
        found += [
            int.from_bytes(content[at + 72 : at + 80], "little") >> START_BITS
            for at in range(SLAB_RESERVED_BYTES, len(content), SLOT_BYTES)
            if content[at : at + 8] == b"KVTSLOT\0"
        ]
    return found


@pytest.mark.parametrize("names", [(), ("catalogue",), ("catalogue", "identity")])
def test_a_slab_of_another_state_directory_is_not_ours(
    left: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """It may hold what was evicted here: a backup of another node brings nothing back."""
    other = Life(tmp_path / "other")
    other.put(range(200))
    other.close()
    shutil.copy(tmp_path / "other" / "slabs" / "00001.slab", left / "slabs" / "00001.slab")
    delete(*names)(left)
    life = Life(left)
    kept = {name for name in ALL if not PER_SLAB <= name < 2 * PER_SLAB}
    assert life.found.keys() == kept
    life.put(range(310, 312), first=PER_SLAB)
    life.close()
    again = Life(left)
    assert again.reads() == kept | {310, 311}
    again.close()


@pytest.mark.parametrize("names", [(), *((name,) for name in LOST), tuple(LOST)], ids="+".join)
def test_no_generation_is_used_twice(
    left: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one of a slot that was written, but never listed: a nonce depends on it."""
    life = Life(left)
    [listed] = life.put(range(320, 321))

    def killed(_: object) -> None:
        raise TierFailed("planned: killed before the transaction")

    with monkeypatch.context() as patch:
        patch.setattr(life.tier._catalogue, "put", killed)
        with pytest.raises(AssertionError):
            life.put(range(321, 322))
    life.kill()
    (left / "clean").touch()
    delete(*names)(left)
    again = Life(left)
    assert again.start_number == (listed.label.generation >> START_BITS) + 1
    assert again.start_number == again.start_number
    again.kill()


def test_starts_that_wrote_nothing_listed_are_counted(left: Path) -> None:
    numbers = set()
    for _ in range(3):
        life = Life(left)
        [record] = life.put(range(330, 331))
        numbers.add(record.label.generation >> START_BITS)
        life.tier.erase([record], durable=True)
        life.kill()
    assert len(numbers) == 3


class FullDisk(Files):
    """Small files cannot be written."""

    full = False

    def replace(self, path: Path, content: bytes) -> None:
        if self.full and path.name == "identity":
            raise OSError(28, "No space left on device")
        super().replace(path, content)


def test_a_full_disk_keeps_no_tier_from_being_read(left: Path) -> None:
    files = FullDisk()
    files.full = True
    life = Life(left, files=files)
    assert life.reads() == ALL
    with pytest.raises(AssertionError):
        life.put(range(300, 301))
    with pytest.raises(TierFailed):
        life.tier.recycle(0)
    files.full = False
    life.put(range(300, 301))
    life.close()


def test_of_two_copies_the_newer_counts_and_the_older_never_comes_back(left: Path) -> None:
    """Found: the older one was dropped from the catalogue only; once the newer one was evicted, a
    rebuild brought the older one back.
    """
    life = Life(left)
    old = life.found[7]
    [new] = life.put(range(7, 8), first=350)
    life.kill()  # before anybody erased the older one
    for lost in ([], ["catalogue"]):
        delete(*lost)(left)
        life = Life(left)
        assert life.found[7].slot == new.slot
        life.kill()
    life = Life(left)
    life.tier.erase([life.found[7]], durable=True)
    life.kill()
    for lost in ([], ["catalogue"], ["catalogue", "namespaces", "identity"]):
        delete(*lost)(left)
        life = Life(left)
        assert 7 not in life.found
        assert life.reads([old]) == set()
        life.kill()


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_what_was_written_and_never_listed_never_comes_back(
    left: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Found: its header stayed in the slot. An evict of the block, stored again elsewhere, did not
    know of it; once the catalogue was lost, a rebuild brought it back.
    """
    life = Life(left)
    stray = unlisted(life, monkeypatch, Killed if end == "killed" else TierFailed)
    if end == "killed":
        life.kill()
    else:
        life.close()
    life = Life(left)
    assert life.found.keys() == ALL
    [stored] = life.put(range(300, 301), first=350)
    life.tier.erase([stored], durable=True)
    life.close()
    delete("catalogue")(left)
    life = Life(left)
    assert life.found.keys() == ALL
    assert life.reads([stray]) == set()
    life.close()


class Killed(BaseException):
    """The process ends here."""


def unlisted(life: Life, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> SlotRecord:
    """Block 300 is written, durably, and not listed; its header cannot be wiped either."""

    def fail(*_: object) -> None:
        raise error("planned")

    def fail_to_wipe(*_: object) -> None:
        raise TierFailed("planned")

    with monkeypatch.context() as patch:
        patch.setattr(life.tier._catalogue, "put", fail)
        patch.setattr(life.tier._wipes, "wipe", fail_to_wipe)
        with pytest.raises((Killed, AssertionError)):
            life.put(range(300, 301))
    [item] = life.items
    return SlotRecord(item.slot, item.slot_bytes, item.label)


def test_a_stop_meanwhile_is_no_damage(left: Path) -> None:
    for names in ([], ["catalogue"]):
        delete(*names)(left)
        tier = SsdTier(left, 3, MIB, min_free_bytes=0)
        with pytest.raises(DaemonUnavailable):
            tier.find(stopping=lambda: True)
        tier.close()
        life = Life(left)
        assert life.found.keys() == ALL
        life.close()


def test_a_stop_before_strays_are_gone_leaves_no_clean_marker(left: Path) -> None:
    Life(left).kill()
    tier = SsdTier(left, 3, MIB, min_free_bytes=0)
    found = tier.find()
    with pytest.raises(DaemonUnavailable):
        tier.forget(found, stopping=lambda: True)
    tier.close()
    assert not (left / "clean").exists()
    life = Life(left)
    assert life.found.keys() == ALL
    life.close()
    assert (left / "clean").exists()


def test_it_can_be_tried_again(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = SsdTier(left, 3, MIB, min_free_bytes=0)

    def fails(*_: object) -> None:
        raise TierFailed("planned")

    with monkeypatch.context() as patch:
        patch.setattr("kvtier.tiers.recovery.arrange", fails)
        for _ in range(2):
            with pytest.raises(TierFailed, match="planned"):
                tier.recover()
    assert not (left / "clean").exists()
    assert len(tier.recover()) == len(ALL)
    tier.close()


def test_epochs_cannot_be_set_before_they_were_read(left: Path) -> None:
    """Found: a list of namespaces written without reading the old one replaced it."""
    tier = SsdTier(left, 3, MIB, min_free_bytes=0)
    with pytest.raises(TierFailed):
        tier.register_namespace(b"n" * 16, b"{}", 1)
    with pytest.raises(TierFailed):
        tier.set_epoch(SPECS["one"].digest, 5)
    tier.load()
    assert len(tier.namespaces()) == 2
    tier.set_epoch(SPECS["one"].digest, 5)
    assert {r.label.namespace for r in tier.recover()} == {SPECS["two"].digest}
    tier.close()


def test_without_the_library_the_same_comes_back(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(left)
    natively = life.listed
    life.kill()
    monkeypatch.setattr("kvtier.native.library", lambda: None)
    life = Life(left)
    assert life.listed == natively
    life.close()
