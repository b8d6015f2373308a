"""SsdTier: what comes back after which end, what is refused, and what damage does not do."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier import machine, native
from kvtier.block import SLOT_BITS
from kvtier.errors import (
    BlockCorrupt,
    DeviceUnavailable,
    InvariantViolated,
    TierFailed,
)
from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.slab import SLAB_RESERVED_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB, PAGE_BYTES

SIZE = 16 * 1024


def open_tier(directory: Path, *, segments: int = 2) -> tuple[SsdTier, list[SlotRecord]]:
    tier = SsdTier(directory, segments, MIB, min_free_bytes=0)
    records = list(tier.recover())
    tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
    return tier, sorted(records)


def write(tier: SsdTier, count: int = 4, *, seed: int = 1, first_slot: int = 0) -> Blocks:
    blocks = Blocks(tier, count, SIZE, seed=seed, first_slot=first_slot)
    tier.write(blocks.items)
    assert [item.error for item in blocks.items] == [None] * count
    return blocks


def assert_reads(tier: SsdTier, blocks: Blocks) -> None:
    blocks.scrub()
    tier.read(blocks.items)
    assert [item.error for item in blocks.items] == [None] * len(blocks.items)
    assert blocks.held() == blocks.contents


def slab_path(directory: Path, index: int = 0) -> Path:
    return directory / "slabs" / f"{index:05}.slab"


def patch(path: Path, offset: int, content: bytes) -> bytes:
    """Overwrites part of a file; returns what was there."""
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(len(content))
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return before


def die(tier: SsdTier) -> None:
    """Ends the tier like a kill: nothing is synced, no clean marker is left."""
    env = tier._catalogue._env
    assert env is not None
    env.close()
    tier._catalogue._env = None
    tier.close()


@pytest.mark.parametrize("end", [SsdTier.close, die], ids=["close", "kill"])
def test_everything_written_comes_back(tmp_path: Path, end: object) -> None:
    tier, found = open_tier(tmp_path)
    assert found == []
    blocks = write(tier, 70)  # more than one segment
    assert callable(end)
    end(tier)
    assert (tmp_path / "clean").exists() == (end is SsdTier.close)

    tier, found = open_tier(tmp_path)
    assert found == sorted(blocks.records())
    assert not (tmp_path / "clean").exists()
    assert tier.namespaces() == [(NAMESPACE, DESCRIPTOR, 0)]
    assert_reads(tier, blocks)
    newest = max(item.label.generation for item in blocks.items)
    assert write(tier, 1, first_slot=100).items[0].label.generation > newest
    tier.close()


def test_files_are_private_and_of_the_stated_size(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path / "state")
    write(tier)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    status = slab_path(tmp_path / "state").stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == tier.file_bytes == SLAB_RESERVED_BYTES + MIB
    assert status.st_blocks * 512 >= tier.file_bytes
    assert not slab_path(tmp_path / "state", 1).exists()
    tier.close()


HEADER_FIELDS = {
    "magic": 0, "version": 8, "codec": 10, "fidelity": 11, "shard": 12, "key length": 14,
    "parent length": 15, "namespace": 16, "epoch": 32, "position": 40, "slot": 44, "slab": 48,
    "slot bytes": 52, "size": 56, "checksum": 64, "generation": 72, "key": 80, "parent": 144,
    "stored at": 208, "cipher": 212, "salt": 216, "tag": 232, "header checksum": 248,
    "payload": 4096, "payload end": 4096 + SIZE - 1,
}  # fmt: skip


@pytest.mark.parametrize("field", HEADER_FIELDS)
def test_a_flipped_bit_is_corrupt(tmp_path: Path, field: str) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 2)
    offset = SLAB_RESERVED_BYTES + HEADER_FIELDS[field]
    before = patch(slab_path(tmp_path), offset, b"\0")
    patch(slab_path(tmp_path), offset, bytes([before[0] ^ 0x10]))
    blocks.scrub()
    tier.read(blocks.items)
    assert isinstance(blocks.items[0].error, BlockCorrupt)
    assert blocks.items[1].error is None
    assert tier.counts().corrupt_count == 1
    tier.close()


def test_swapped_slots_and_foreign_labels_are_corrupt(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 3)
    slot_bytes = blocks.slot_bytes
    path = slab_path(tmp_path)
    one = path.read_bytes()[SLAB_RESERVED_BYTES : SLAB_RESERVED_BYTES + slot_bytes]
    other = patch(path, SLAB_RESERVED_BYTES + slot_bytes, one)
    patch(path, SLAB_RESERVED_BYTES, other)
    tier.read(blocks.items)
    assert [type(item.error) for item in blocks.items[:2]] == [BlockCorrupt, BlockCorrupt]
    sound = blocks.items[2]
    assert sound.error is None
    label = sound.label
    for field, value in {
        "namespace": bytes(16), "key": bytes(32), "shard": 7, "epoch": 3, "size_bytes": SIZE - 1,
    }.items():  # fmt: skip
        kept = getattr(label, field)
        setattr(label, field, value)
        tier.read([sound])
        assert isinstance(sound.error, BlockCorrupt), field
        setattr(label, field, kept)
    tier.read([sound])
    assert sound.error is None
    tier.close()


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_ssd import open_tier, write
tier, _ = open_tier(Path(sys.argv[1]))
write(tier, 4)
print("acknowledged", flush=True)
tier._catalogue.{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if "{step}" == "put":
    write(tier, 4, seed=2, first_slot=8)
else:
    tier.close()
"""


@pytest.mark.parametrize("step", ["put", "close"])
def test_kill_shows_all_that_was_answered_and_nothing_else(tmp_path: Path, step: str) -> None:
    here = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", CHILD.format(step=step), str(tmp_path), str(here)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(here.parents[1])},
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (-signal.SIGKILL, "acknowledged\n"), ran.stderr
    tier, found = open_tier(tmp_path)
    assert [record.slot for record in found] == [0, 1, 2, 3]
    blocks = Blocks(tier, 4, SIZE, seed=1)
    for item, record in zip(blocks.items, found, strict=True):
        item.label = record.label
    assert_reads(tier, blocks)
    tier.close()


@pytest.mark.parametrize("damage", ["torn", "garbage", "truncated", "missing"])
def test_damaged_catalogue_is_set_aside_and_rebuilt(tmp_path: Path, damage: str) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 70)
    rewritten = write(tier, 2, seed=9)  # slots 0 and 1 hold these now
    newer = Blocks(tier, 1, SIZE, seed=9, first_slot=90)  # the same block again, elsewhere
    newer.items[0].label.key = rewritten.items[0].label.key
    tier.write(newer.items)
    die(tier)
    path = tmp_path / "catalogue" / "data.mdb"
    if damage == "torn":
        patch(path, 2 * PAGE_BYTES, os.urandom(path.stat().st_size - 2 * PAGE_BYTES))
    elif damage == "garbage":
        path.write_bytes(os.urandom(100_000))
    elif damage == "truncated":
        os.truncate(path, 3 * PAGE_BYTES)
    else:
        shutil.rmtree(tmp_path / "catalogue")
    if damage == "missing":
        (tmp_path / "namespaces").unlink()

    tier, found = open_tier(tmp_path)
    wanted = [*blocks.records()[2:], rewritten.records()[1], newer.records()[0]]
    assert found == sorted(wanted)
    assert bool(list(tmp_path.glob("catalogue.damaged-*"))) == (damage != "missing")
    assert tier.namespaces() == [(NAMESPACE, DESCRIPTOR, 0)]
    assert_reads(tier, newer)
    die(tier)
    tier, again = open_tier(tmp_path)
    assert again == found
    tier.close()


def test_after_a_flipped_record_the_catalogue_is_made_anew(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 3)
    tier.close()
    path = tmp_path / "catalogue" / "data.mdb"
    content = path.read_bytes()
    place = content.rindex(blocks.items[1].label.key)
    for at in (place, content.index(blocks.items[1].label.key)):
        patch(path, at, bytes([content[at] ^ 1]))
    tier, found = open_tier(tmp_path)
    # Only the slot can say what was in the record; and an evict would not find it to wipe it.
    assert found == blocks.records()
    assert tier.counts().corrupt_count == 1
    assert list(tmp_path.glob("catalogue.damaged-*"))
    tier.close()


def test_a_rebuild_that_was_killed_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 4)
    die(tier)
    shutil.rmtree(tmp_path / "catalogue")
    tier = SsdTier(tmp_path, 2, MIB, min_free_bytes=0)
    monkeypatch.setattr(tier._catalogue, "complete", lambda: None)  # killed just before
    monkeypatch.setattr(tier._catalogue, "put", list)
    assert list(tier.recover()) == []
    die(tier)
    tier, found = open_tier(tmp_path)
    assert found == sorted(blocks.records())
    tier.close()


@pytest.mark.parametrize("rebuild", [False, True], ids=["catalogue", "rebuild"])
def test_durable_erase_and_older_epochs_stay_gone(tmp_path: Path, *, rebuild: bool) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 4)
    tier.erase(blocks.records()[:1], durable=True)
    tier.register_namespace(b"another-one-here", b"{}", 5)
    other = Blocks(tier, 1, SIZE, seed=3, first_slot=8)
    other.items[0].label.namespace, other.items[0].label.epoch = b"another-one-here", 5
    tier.write(other.items)
    tier.set_epoch(NAMESPACE, 1)
    with pytest.raises(InvariantViolated):
        tier.set_epoch(NAMESPACE, 0)
    fresh = Blocks(tier, 1, SIZE, seed=4, first_slot=9)
    fresh.items[0].label.epoch = 1
    tier.write(fresh.items)
    die(tier)
    if rebuild:
        shutil.rmtree(tmp_path / "catalogue")
        patch(tmp_path / "namespaces", 40, b"###")

    tier, found = open_tier(tmp_path)
    assert [record.slot for record in found] == [8, 9]
    assert sorted(epoch for _, _, epoch in tier.namespaces()) == [1, 5]
    tier.close()


def test_erase_of_what_the_slot_no_longer_holds_does_nothing(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    old = write(tier, 1)
    new = write(tier, 1, seed=2)
    tier.erase(old.records(), durable=True)
    assert_reads(tier, new)
    tier.erase(new.records(), durable=False)
    tier.close()
    tier, found = open_tier(tmp_path)
    assert found == []
    tier.close()


def test_a_recut_or_recycled_segment_forgets_what_it_held(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    write(tier, 3)
    small = Blocks(tier, 2, PAGE_BYTES, seed=5)
    tier.write(small.items)
    die(tier)
    shutil.rmtree(tmp_path / "catalogue")
    tier, found = open_tier(tmp_path)
    assert found == sorted(small.records())
    tier.recycle(0)
    die(tier)
    shutil.rmtree(tmp_path / "catalogue")
    tier, found = open_tier(tmp_path)
    assert found == []
    tier.close()


def test_a_smaller_plan_keeps_what_fits(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 70)
    tier.close()
    tier, found = open_tier(tmp_path, segments=1)
    assert found == [record for record in sorted(blocks.records()) if record.slot >> SLOT_BITS == 0]
    assert not slab_path(tmp_path, 1).exists()
    tier.close()


def test_a_full_disk_fails_new_slabs_and_nothing_else(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 2)
    tier._min_free_bytes = 1 << 60
    beyond = Blocks(tier, 2, SIZE, seed=2, first_slot=2)
    beyond.items[1].slot = 1 << SLOT_BITS
    tier.write(beyond.items)
    assert beyond.items[0].error is None
    assert isinstance(beyond.items[1].error, TierFailed)
    assert str(tmp_path) in str(beyond.items[1].error)
    assert tier.counts().error_count == 1
    assert_reads(tier, blocks)
    tier._min_free_bytes = 0
    tier.write(beyond.items[1:])
    assert beyond.items[1].error is None
    tier.close()


def test_no_space_while_preallocating_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tier, _ = open_tier(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    blocks = Blocks(tier, 2, SIZE)
    tier.write(blocks.items)
    assert all("No space left" in str(item.error) for item in blocks.items)
    assert list((tmp_path / "slabs").iterdir()) == []
    monkeypatch.undo()
    write(tier)
    tier.close()


def test_a_failed_sync_fails_its_items_once_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = open_tier(tmp_path)
    write(tier, 2, first_slot=50)  # the last of one segment, the first of the next
    bad_fd = tier._slabs[0].fd
    real = os.fdatasync

    def failing(fd: int) -> None:
        if fd == bad_fd:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    blocks = Blocks(tier, 2, SIZE, seed=8)
    blocks.items[1].slot = 1 << SLOT_BITS
    monkeypatch.setattr(os, "fdatasync", failing)
    tier.write(blocks.items)
    assert isinstance(blocks.items[0].error, TierFailed)
    assert blocks.items[1].error is None
    monkeypatch.undo()

    # Another thread's sync failed while we wrote: ours may not be believed.
    before = tier._slabs[0].sync_failures
    with pytest.raises(TierFailed, match="a sync of these bytes failed"):
        tier._slabs[0].sync(before - 1)
    die(tier)
    tier, found = open_tier(tmp_path)
    assert 0 not in [record.slot for record in found]
    tier.close()


def test_errors_of_reading_are_told_per_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = write(tier, 2)
    real = native.slots_read

    def failing(*arguments: list[int], depth: int) -> tuple[list[int], list[int]]:
        checksums, errors = real(*arguments, depth=depth)
        return checksums, [errno.EIO, *errors[1:]]

    monkeypatch.setattr(native, "slots_read", failing)
    tier.read(blocks.items)
    assert isinstance(blocks.items[0].error, TierFailed)
    assert blocks.items[1].error is None
    assert tier.counts().error_count == 1
    tier.close()


def test_direct_io_can_be_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "direct_io_works", lambda _: False)
    with pytest.raises(DeviceUnavailable, match="O_DIRECT"):
        SsdTier(tmp_path, 1, MIB, direct_io="require")
    assert SsdTier(tmp_path, 1, MIB).direct_io is False


def test_unregistered_and_too_many_namespaces(tmp_path: Path) -> None:
    tier, _ = open_tier(tmp_path)
    blocks = Blocks(tier, 1, SIZE)
    blocks.items[0].label.namespace = bytes(16)
    tier.write(blocks.items)
    assert "not registered" in str(blocks.items[0].error)
    crowd = Blocks(tier, 60, SIZE)
    for index, item in enumerate(crowd.items):
        item.label.namespace = struct.pack("<QQ", 1, index)
        tier.register_namespace(item.label.namespace, os.urandom(500).hex().encode(), 0)
    tier.write(crowd.items)
    told = [str(item.error) for item in crowd.items if item.error]
    assert told
    assert all("do not fit" in text for text in told)
    good = [item for item in crowd.items if item.error is None]
    tier.read(good)
    assert not any(item.error for item in good)
    tier.close()


def test_the_map_grows(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, 2, MIB, min_free_bytes=0)
    tier._catalogue._map_bytes = 64 * 1024
    tier.recover()
    tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
    blocks = Blocks(tier, 200, 1)
    for _ in range(3):
        tier.write(blocks.items)
    assert not any(item.error for item in blocks.items)
    assert tier._catalogue._map_bytes > 64 * 1024
    tier.close()


@pytest.mark.parametrize("content", [b"", b"3.0 0123456789abcdef\n", b"1.0 nonsense", b"\xff" * 9])
def test_a_damaged_version_is_no_newer_one(tmp_path: Path, content: bytes) -> None:
    open_tier(tmp_path)[0].close()
    whole = (tmp_path / "VERSION").read_bytes()
    (tmp_path / "VERSION").write_bytes(content)
    open_tier(tmp_path)[0].close()
    assert (tmp_path / "VERSION").read_bytes() == whole
