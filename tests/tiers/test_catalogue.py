"""The catalogue when LMDB or the disk is not well: damage, failed syncs, evidence."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from kvtier.block import Codec, Fidelity, SlotLabel
from kvtier.errors import TierFailed
from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks
from kvtier.tiers.catalogue import Catalogue, CatalogueDamaged
from kvtier.tiers.files import Files
from kvtier.tiers.packing import pack_record
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB, PAGE_BYTES

SIZE = 16 * 1024
WAIT_S = 20.0


def open_tier(directory: Path) -> tuple[SsdTier, int]:
    tier = SsdTier(directory, 2, MIB, min_free_bytes=0)
    count = len(tier.recover())
    tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
    return tier, count


def filled(directory: Path) -> SsdTier:
    tier, _ = open_tier(directory)
    blocks = Blocks(tier, 8, SIZE)
    tier.write(blocks.items)
    assert [item.error for item in blocks.items] == [None] * 8
    return tier


@pytest.mark.parametrize("page", [0, 1, 2, 3, 4, 5, 6, 7])
def test_a_page_that_rotted_after_a_clean_stop_is_found_before_it_is_mapped(
    page: int, tmp_path: Path
) -> None:
    filled(tmp_path).close()
    assert (tmp_path / "clean").exists()
    data = tmp_path / "catalogue" / "data.mdb"
    content = bytearray(data.read_bytes())
    if (page + 1) * PAGE_BYTES > len(content):
        pytest.skip(f"the catalogue has no page {page}")
    for at in range(page * PAGE_BYTES, (page + 1) * PAGE_BYTES):
        content[at] ^= 0xA5
    data.write_bytes(content)
    tier, count = open_tier(tmp_path)
    assert count == 8
    tier.check()
    tier.close()


def test_damage_that_lmdb_finds_while_it_reads_is_set_aside_in_the_same_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path).close()
    # A check that sees nothing, and lists nothing.
    monkeypatch.setattr("kvtier.tiers.catalogue.check_twice", lambda _: None)
    data = tmp_path / "catalogue" / "data.mdb"
    content = bytearray(data.read_bytes())
    # Page numbers within pages: LMDB compares flags of what it follows, and says so.
    for page in range(2, len(content) // PAGE_BYTES):
        content[page * PAGE_BYTES + 10 : page * PAGE_BYTES + 12] = b"\0\0"
    data.write_bytes(content)
    tier, count = open_tier(tmp_path)
    assert count == 8
    assert list(tmp_path.glob("catalogue.damaged-*"))
    tier.close()


def test_evidence_is_kept_but_does_not_grow(tmp_path: Path) -> None:
    filled(tmp_path).close()
    for _ in range(5):
        (tmp_path / "catalogue" / "data.mdb").write_bytes(b"no catalogue" * 1000)
        tier, count = open_tier(tmp_path)
        assert count == 8
        tier.close()
    assert 1 <= len(list(tmp_path.glob("catalogue.damaged-*"))) <= 3


def opened(directory: Path) -> Catalogue:
    catalogue = Catalogue(Files(), directory, 0)
    if not catalogue.open():
        catalogue.complete()
    return catalogue


def records(slots: range) -> list[tuple[bytes, bytes]]:
    label = SlotLabel(NAMESPACE, 0, bytes(32), b"", 0, 0, SIZE, 7, Codec.RAW, Fidelity.EXACT, 1)
    return [pack_record(slot, SIZE, label) for slot in slots]


def slots_of(catalogue: Catalogue) -> list[int]:
    keys = b"".join(keys for keys, _, _ in catalogue.pieces(100))
    return [int.from_bytes(keys[at : at + 4], "little") for at in range(0, len(keys), 4)]


class _Env:
    """The environment, with something wrong or slow about it."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)


def wrapped(catalogue: Catalogue, kind: type[_Env]) -> Any:
    assert catalogue._env is not None
    wrapper = kind(catalogue._env)
    catalogue._env = wrapper  # type: ignore[assignment]
    return wrapper


# --- opening


def test_what_is_not_the_files_fault_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = opened(tmp_path)
    catalogue.put(records(range(5)))
    catalogue.close()
    for error in (lmdb.MemoryError("planned"), lmdb.DiskError("planned"), OSError(28, "planned")):
        with monkeypatch.context() as failing:
            failing.setattr(lmdb, "open", _raises(error))
            catalogue = Catalogue(Files(), tmp_path, 0)
            with pytest.raises(TierFailed, match="planned"):
                catalogue.open()
    assert not list(tmp_path.glob("catalogue.damaged-*"))
    catalogue = opened(tmp_path)
    assert slots_of(catalogue) == [0, 1, 2, 3, 4]
    catalogue.close()


@pytest.mark.parametrize(
    ("number", "times", "expected"),
    [
        (errno.EIO, 1, "there"),
        (errno.EIO, 2, "set aside"),
        (errno.ENOMEM, 1, "there"),
        (errno.ENOMEM, 2, "tried again later"),
        (errno.EACCES, 2, "tried again later"),
    ],
)
def test_a_failure_of_reading_that_passes_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int, expected: str
) -> None:
    catalogue = opened(tmp_path)
    catalogue.put(records(range(5)))
    catalogue.close()
    read, left = os.preadv, [times]

    def failing(*arguments: Any) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(*arguments)

    catalogue = Catalogue(Files(), tmp_path, 0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", failing)
        if expected == "tried again later":
            with pytest.raises(TierFailed, match=os.strerror(number)):
                catalogue.open()
        else:
            assert catalogue.open() is (expected == "there")
    assert not left[0]
    assert bool(list(tmp_path.glob("catalogue.damaged-*"))) is (expected == "set aside")
    if expected == "tried again later":
        assert catalogue.open()
    assert slots_of(catalogue) == ([] if expected == "set aside" else [0, 1, 2, 3, 4])
    catalogue.close()


def _raises(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_directory_that_is_a_file_is_set_aside(tmp_path: Path) -> None:
    opened(tmp_path).close()
    for path in (tmp_path / "catalogue").iterdir():
        path.unlink()
    (tmp_path / "catalogue" / "data.mdb").mkdir()
    catalogue = opened(tmp_path)
    assert len(list(tmp_path.glob("catalogue.damaged-*"))) == 1
    catalogue.put(records(range(2)))
    catalogue.close()


def test_what_is_not_believed_is_set_aside_once(tmp_path: Path) -> None:
    opened(tmp_path).close()
    catalogue = Catalogue(Files(), tmp_path, 0)
    catalogue.distrust("for this test")
    assert not catalogue.open()
    assert catalogue.set_aside_count == 1
    catalogue.complete()
    catalogue.close()
    catalogue = Catalogue(Files(), tmp_path, 0)
    assert catalogue.open()
    catalogue.close()


# --- a map that is too small


def small(directory: Path) -> Catalogue:
    catalogue = Catalogue(Files(), directory, 0)
    catalogue._map_bytes, catalogue._map_bytes_max = MIB // 4, 2 * MIB
    assert not catalogue.open()
    return catalogue


def test_the_map_grows_up_to_its_limit_and_what_is_deleted_makes_room(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    done = 0
    with contextlib.suppress(TierFailed):
        while done < 40_000:
            catalogue.put(records(range(done, done + 500)))
            done += 500
    assert 2000 < done < 40_000
    assert slots_of(catalogue) == list(range(done))  # all or none
    with pytest.raises(TierFailed, match=r"is full at 2.0 MiB.*tiers.ssd.size_bytes"):
        catalogue.put(records(range(done, done + 2000)))
    catalogue.delete(range(0, done, 3))
    for segment in range(2):
        catalogue.delete_segment(segment)
    assert slots_of(catalogue) == []
    catalogue.put(records(range(1000)))
    catalogue.sync()
    catalogue.close()
    catalogue = opened(tmp_path)
    assert slots_of(catalogue) == list(range(1000))
    catalogue.close()


def test_without_address_space_the_old_map_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = small(tmp_path)
    catalogue.put(records(range(100)))
    with monkeypatch.context() as failing:
        failing.setattr(mmap, "mmap", _raises(OSError(12, "planned")))
        with pytest.raises(TierFailed, match="LimitAS"):
            catalogue.put(records(range(5000)))
    assert slots_of(catalogue) == list(range(100))
    catalogue.put(records(range(5000)))
    assert slots_of(catalogue) == list(range(5000))
    catalogue.close()


# --- LMDB gives up


class _Panics(_Env):
    """As after a meta page that could not be written: nothing but closing it helps."""

    closed = False

    def begin(self, **_: Any) -> Any:
        raise lmdb.PanicError("planned")

    def close(self) -> None:
        self.closed = True
        self.env.close()


def test_after_a_panic_it_is_checked_and_opened_again(tmp_path: Path) -> None:
    catalogue = opened(tmp_path)
    catalogue.put(records(range(3)))
    env = wrapped(catalogue, _Panics)
    catalogue.put(records(range(3, 6)))
    assert env.closed
    assert slots_of(catalogue) == list(range(6))
    catalogue.sync()
    catalogue.close()


def test_after_a_panic_of_a_damaged_file_only_a_restart_helps(tmp_path: Path) -> None:
    catalogue = opened(tmp_path)
    catalogue.put(records(range(300)))
    wrapped(catalogue, _Panics)
    data = tmp_path / "catalogue" / "data.mdb"
    with data.open("r+b") as file:
        file.write(bytes(2 * PAGE_BYTES))
    with pytest.raises(CatalogueDamaged, match="restart the daemon"):
        catalogue.put(records(range(300, 303)))
    with pytest.raises(TierFailed, match="not open"):
        catalogue.put(records(range(300, 303)))
    catalogue.close()
    assert not (tmp_path / "clean").exists()
    catalogue = opened(tmp_path)
    assert len(list(tmp_path.glob("catalogue.damaged-*"))) == 1
    catalogue.close()


class _Corrupted(_Env):
    def begin(self, **_: Any) -> Any:
        raise lmdb.CorruptedError("planned")


def test_damage_found_later_says_what_to_do(tmp_path: Path) -> None:
    catalogue = opened(tmp_path)
    env = wrapped(catalogue, _Corrupted)
    with pytest.raises(CatalogueDamaged, match=r"planned.*restart the daemon"):
        catalogue.put(records(range(2)))
    catalogue._env = env.env
    catalogue.close()


# --- syncs


class _SlowSync(_Env):
    """Its first sync is held until let go."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.begun, self.go = threading.Event(), threading.Event()
        self.saw: list[int] = []

    def sync(self, force: bool) -> None:
        with self.env.begin() as txn:
            self.saw.append(txn.stat(self.env.open_db(b"slots", txn, create=False))["entries"])
        self.begun.set()
        assert self.go.wait(WAIT_S)
        self.env.sync(force)


def test_a_sync_holds_up_no_transaction_and_answers_only_for_those_before_it(
    tmp_path: Path,
) -> None:
    catalogue = opened(tmp_path)
    env = wrapped(catalogue, _SlowSync)
    catalogue.put(records(range(1)))
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(catalogue.sync)
        assert env.begun.wait(WAIT_S)
        pool.submit(catalogue.put, records(range(1, 5))).result(WAIT_S)
        pool.submit(catalogue.delete, [0]).result(WAIT_S)
        # These wrote before they asked, and after the sync that is under way began.
        asked = threading.Barrier(6)
        others = [pool.submit(_ask, asked, catalogue) for _ in range(5)]
        asked.wait(WAIT_S)
        assert not first.done()
        assert not any(other.done() for other in others)
        env.go.set()
        for future in [first, *others]:
            future.result(WAIT_S)
    assert env.saw[0] == 1
    assert env.saw[1] == 4  # a sync of its own for them
    assert len(env.saw) <= 6
    catalogue.close()


def _ask(asked: threading.Barrier, catalogue: Catalogue) -> None:
    asked.wait(WAIT_S)
    catalogue.sync()


class _FailsOnce(_Env):
    """Its next transaction fails when it is committed, as by an EIO of its sync."""

    fails = True

    def begin(self, **options: Any) -> Any:
        return self._failing(options) if self.fails else self.env.begin(**options)

    @contextmanager
    def _failing(self, options: dict[str, Any]) -> Iterator[Any]:
        with self.env.begin(**options) as txn:
            yield txn
            self.fails = False
            raise lmdb.DiskError("planned")


def test_a_sync_after_a_failed_transaction_does_not_rest_on_a_meta_page_that_may_be_lost(
    tmp_path: Path,
) -> None:
    """The failed sync covered the meta page of the transaction before: the kernel forgot it."""
    catalogue = opened(tmp_path)
    catalogue.put(records(range(3)))
    env = wrapped(catalogue, _FailsOnce)
    with pytest.raises(TierFailed, match="planned"):
        catalogue.put(records(range(3, 6)))
    before = env.env.info()["last_txnid"]
    catalogue.sync()
    assert env.env.info()["last_txnid"] == before + 1
    catalogue.sync()
    assert env.env.info()["last_txnid"] == before + 1
    assert slots_of(catalogue) == [0, 1, 2]
    catalogue.close()


def test_after_a_failed_sync_a_disk_that_is_well_again_is_used_again(tmp_path: Path) -> None:
    tier = filled(tmp_path)
    env = wrapped(tier._catalogue, _FailingSync)
    with pytest.raises(TierFailed, match="sync failed"):
        tier.sync()
    more = Blocks(tier, 1, SIZE, seed=1, first_slot=20)
    tier.write(more.items)
    assert "a sync failed" in str(more.items[0].error)
    tier.probe()
    assert tier._catalogue._env is not env
    tier.write(more.items)
    assert [item.error for item in more.items] == [None]
    tier.sync()
    tier.close()
    assert (tmp_path / "clean").exists()
    tier, count = open_tier(tmp_path)
    assert count == 9
    tier.close()


def test_after_a_failed_sync_a_file_that_rotted_is_not_used_again(tmp_path: Path) -> None:
    tier = filled(tmp_path)
    wrapped(tier._catalogue, _FailingSync)
    with pytest.raises(TierFailed, match="sync failed"):
        tier.sync()
    with (tmp_path / "catalogue" / "data.mdb").open("r+b") as file:
        file.write(bytes(2 * PAGE_BYTES))
    with pytest.raises(CatalogueDamaged, match="restart the daemon"):
        tier.probe()
    tier.close()
    assert not (tmp_path / "clean").exists()
    tier, count = open_tier(tmp_path)
    assert count == 8
    tier.close()


def test_readers_that_are_gone_are_looked_for(tmp_path: Path) -> None:
    tier = filled(tmp_path)
    tier.tend()
    tier.close()
    tier.tend()


class _FailingSync(_Env):
    """Its first sync fails as after an EIO of fsync."""

    fails = True

    def sync(self, force: bool) -> None:
        if self.fails:
            self.fails = False
            raise lmdb.DiskError("planned: fsync")
        self.env.sync(force)


def test_a_failed_sync_is_never_made_good_by_a_later_one(tmp_path: Path) -> None:
    tier = filled(tmp_path)
    catalogue = tier._catalogue
    env = catalogue._env
    assert env is not None
    catalogue._env = _FailingSync(env)  # type: ignore[assignment]
    with pytest.raises(TierFailed, match="sync failed"):
        tier.sync()
    with pytest.raises(TierFailed, match="tries again"):
        tier.sync()  # the kernel would say yes this time
    more = Blocks(tier, 1, SIZE, seed=1, first_slot=20)
    tier.write(more.items)
    assert isinstance(more.items[0].error, TierFailed)
    with pytest.raises(TierFailed):
        tier.close()
    assert not (tmp_path / "clean").exists()
    env.close()
    tier, count = open_tier(tmp_path)
    assert count == 8  # nobody promised them; nothing was lost here
    tier.sync()
    tier.close()
