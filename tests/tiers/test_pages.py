"""The catalogue's file is never called sound when lmdb.verify would not, and its records are those
that LMDB itself gives.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import lmdb
import lmdb.verify
import pytest

from kvtier import native
from kvtier.tiers.pages import sound_records

MAP_BYTES = 64 << 20
pytestmark = pytest.mark.skipif(
    native.library() is None, reason=f"no library: {native.capabilities().reason}"
)


def filled(directory: Path, count: int, *, deleted: int = 0, turns: int = 1, seed: int = 1) -> Path:
    """A file with records as the catalogue writes them, after many deletions and rewritings."""
    rng = random.Random(seed)
    env = lmdb.open(str(directory), map_size=MAP_BYTES, max_dbs=1, metasync=False, readahead=False)
    main, slots = env.open_db(None), env.open_db(b"slots", integerkey=True)
    with env.begin(write=True) as txn:
        txn.put(b"complete", b"1", db=main)
    for _ in range(turns):
        for first in range(0, count, 500):
            with env.begin(write=True, db=slots) as txn:
                for slot in range(first, min(count, first + 500)):
                    txn.put(slot.to_bytes(4, "little"), rng.randbytes(rng.randrange(74, 203)))
        with env.begin(write=True, db=slots) as txn:
            for slot in rng.sample(range(count), deleted):
                txn.delete(slot.to_bytes(4, "little"))
    env.close()
    return directory / "data.mdb"


def by_lmdb(directory: Path) -> list[tuple[int, bytes]]:
    env = lmdb.open(str(directory), map_size=MAP_BYTES, max_dbs=1, readonly=True, lock=False)
    slots = env.open_db(b"slots", integerkey=True, create=False)
    with env.begin(db=slots) as txn:
        found = [(int.from_bytes(key, "little"), value) for key, value in txn.cursor()]
    env.close()
    return found


def by_us(file: Path) -> list[tuple[int, bytes]] | None:
    piece = sound_records(file)
    if piece is None:
        return None
    keys = struct.unpack(f"={len(piece.lengths)}I", piece.keys)
    found, at = [], 0
    for key, length in zip(keys, piece.lengths, strict=True):
        found.append((key, bytes(piece.values[at : at + length])))
        at += length
    assert at == len(piece.values)
    return found


@pytest.mark.parametrize(
    ("count", "deleted", "turns"),
    [(0, 0, 1), (1, 0, 1), (1, 1, 1), (3000, 0, 1), (3000, 2900, 1), (3000, 1500, 6),
     (20_000, 19_000, 2)],
)  # fmt: skip
def test_the_records_are_those_of_lmdb(
    tmp_path: Path, count: int, deleted: int, turns: int
) -> None:
    file = filled(tmp_path, count, deleted=deleted, turns=turns)
    assert lmdb.verify.verify(str(tmp_path)) == []  # type: ignore[no-untyped-call]
    assert by_us(file) == by_lmdb(tmp_path)


def test_a_large_free_list_lies_on_pages_of_its_own(tmp_path: Path) -> None:
    """20,000 records deleted at once free a thousand pages: their list fits no leaf page."""
    file = filled(tmp_path, 20_000)
    env = lmdb.open(str(tmp_path), map_size=MAP_BYTES, max_dbs=1)
    slots = env.open_db(b"slots", integerkey=True)
    with env.begin(write=True) as txn:
        txn.drop(slots, delete=False)
    env.close()
    assert by_us(file) == by_lmdb(tmp_path) == []


def python_says(directory: Path) -> bool:
    try:
        return not lmdb.verify.verify(str(directory))  # type: ignore[no-untyped-call]
    except (lmdb.verify.VerifyError, OSError, ValueError, struct.error):
        return False


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_header(content: bytearray, rng: random.Random) -> None:
    """Where it hurts: page headers, pointers, meta pages."""
    page = rng.choice([0, 1, rng.randrange(len(content) // 4096)])
    content[page * 4096 + rng.randrange(180 if page < 2 else 48)] ^= 1 << rng.randrange(8)


def tear(content: bytearray, rng: random.Random) -> None:
    sector = rng.randrange(len(content) // 512) * 512
    content[sector : sector + 512] = bytes(512)


def swap(content: bytearray, rng: random.Random) -> None:
    one, two = (rng.randrange(len(content) // 4096) * 4096 for _ in range(2))
    page = content[one : one + 4096]
    content[one : one + 4096] = content[two : two + 4096]
    content[two : two + 4096] = page


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


@pytest.mark.parametrize("harm", [flip, flip_header, tear, swap, cut])
def test_what_is_called_sound_is_sound(
    tmp_path: Path, harm: Callable[[bytearray, random.Random], None]
) -> None:
    file = filled(tmp_path, 600, deleted=300, turns=3)
    whole, rng = file.read_bytes(), random.Random(4)
    unsound = doubted = 0
    for _ in range(300):
        content = bytearray(whole)
        harm(content, rng)
        file.write_bytes(content)
        found = by_us(file)
        if found is not None:
            assert python_says(tmp_path)
            assert found == by_lmdb(tmp_path)
        else:
            unsound += 1
            doubted += python_says(tmp_path)
    assert unsound, "no harm was done"
    # Not needed for safety; but what is doubted for nothing is asked of Python, which takes long.
    assert doubted <= unsound // 10


def test_odd_files_are_for_python(tmp_path: Path) -> None:
    for content in (b"", b"x", bytes(100), bytes(8192), bytes(random.Random(1).randbytes(40_000))):
        (tmp_path / "data.mdb").write_bytes(content)
        assert sound_records(tmp_path / "data.mdb") is None
    with pytest.raises(FileNotFoundError):
        sound_records(tmp_path / "none")


def test_without_the_library_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = filled(tmp_path, 10)
    monkeypatch.setattr(native, "library", lambda: None)
    assert sound_records(file) is None


def test_another_database_is_for_python(tmp_path: Path) -> None:
    file = filled(tmp_path, 10)
    env = lmdb.open(str(tmp_path), map_size=MAP_BYTES, max_dbs=2)
    env.open_db(b"others", dupsort=True)
    env.close()
    assert sound_records(file) is None
    assert python_says(tmp_path)
