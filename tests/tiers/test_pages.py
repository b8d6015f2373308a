"""The catalogue's file: what is called sound does LMDB no harm, and what is sound is called so."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lmdb
import page_damage
import pytest
from page_damage import HARMS, MAP_BYTES, PAGE, Harm, Workload, files, sound

from kvtier import native
from kvtier.tiers import page_checks as checks
from kvtier.tiers.page_checks import Damage
from kvtier.tiers.pages import check_file
from kvtier.tiers.records import Piece

needs_library = pytest.mark.skipif(
    native.library() is None, reason=f"no library: {native.capabilities().reason}"
)


def filled(directory: Path, count: int, *, deleted: int = 0, turns: int = 1) -> Path:
    """A file with records as the catalogue writes them, after many deletions and rewritings."""
    work = Workload(directory, random.Random(1))
    work.complete()
    for _ in range(turns):
        for first in range(0, count, 500):
            work.put(list(range(first, min(count, first + 500))))
        work.delete(work.rng.sample(range(count), deleted))
    work.close()
    return directory / "data.mdb"


def in_python(file: Path, monkeypatch: pytest.MonkeyPatch) -> Piece | Damage:
    with monkeypatch.context() as without:
        without.setattr(native, "library", lambda: None)
        return check_file(file)


def plain(found: Piece | Damage) -> Damage | tuple[bytes, list[int], bytes]:
    if isinstance(found, Damage):
        return found
    return bytes(found.keys), list(found.lengths), bytes(found.values)


def listed(found: Piece | Damage) -> list[tuple[bytes, bytes]]:
    assert not isinstance(found, Damage), str(found)
    records, at = [], 0
    for number, length in enumerate(found.lengths):
        value = bytes(found.values[at : at + length])
        records.append((bytes(found.keys[4 * number : 4 * number + 4]), value))
        at += length
    assert at == len(found.values)
    return records


def by_lmdb(directory: Path) -> list[tuple[bytes, bytes]]:
    work = Workload(directory, random.Random(1))
    records = work.read()
    work.close()
    return records


# --- what is sound


@pytest.mark.parametrize(
    ("count", "deleted", "turns"),
    [(0, 0, 1), (1, 0, 1), (1, 1, 1), (3000, 0, 1), (3000, 2900, 1), (3000, 1500, 6),
     (20_000, 19_000, 2)],
)  # fmt: skip
def test_the_records_are_those_of_lmdb(
    tmp_path: Path, count: int, deleted: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = filled(tmp_path, count, deleted=deleted, turns=turns)
    assert listed(check_file(file)) == by_lmdb(tmp_path)
    assert plain(in_python(file, monkeypatch)) == plain(check_file(file))


def test_a_large_free_list_lies_on_pages_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 records dropped at once free a thousand pages: their list fits no leaf page."""
    file = filled(tmp_path, 20_000)
    work = Workload(tmp_path, random.Random(1))
    with work.env.begin(write=True) as txn:
        txn.drop(work.slots, delete=False)
    work.close()
    meta = max(
        (0, 1), key=lambda page: struct.unpack_from("<Q", file.read_bytes(), page * PAGE + 144)
    )
    overflow_pages = struct.unpack_from("<Q", file.read_bytes(), meta * PAGE + 40 + 24)[0]
    assert overflow_pages > 1
    assert listed(check_file(file)) == []
    assert listed(in_python(file, monkeypatch)) == []


@pytest.mark.parametrize("slots_max", [60, 3000, 40_000])
def test_no_transaction_leaves_a_file_that_is_called_damaged(
    tmp_path: Path, slots_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a reader keeps old pages, and when the map grows."""
    rng = random.Random(slots_max)
    work = Workload(tmp_path, rng, map_bytes=1 << 20)
    reader = None
    for number in range(150):
        try:
            work.step(slots_max)
        except lmdb.MapFullError:
            if reader is not None:
                reader.abort()
                reader = None
            work.map_bytes *= 2
            work.env.set_mapsize(work.map_bytes)
        if number % 20 == 0:
            reader = work.env.begin()
        elif number % 20 == 10 and reader is not None:
            reader.abort()
            reader = None
        found = check_file(tmp_path / "data.mdb")
        assert not isinstance(found, Damage), f"after {number}: {found}"
        if number % 50 == 25:
            assert plain(in_python(tmp_path / "data.mdb", monkeypatch)) == plain(found)
    if reader is not None:
        reader.abort()
    work.close()


_WRITER = """
import random, sys
from pathlib import Path
from page_damage import Workload
work = Workload(Path(sys.argv[1]), random.Random(int(sys.argv[2])))
while True:
    work.step(3000)
    sys.stdout.write(".")
    sys.stdout.flush()
"""


def test_a_kill_in_the_middle_of_a_transaction_leaves_a_sound_file(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = os.pathsep.join([str(Path(page_damage.__file__).parent), *filter(None, sys.path)])
    for number in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert writer.stdout is not None
        assert writer.stdout.read(rng.randrange(1, 30))
        writer.kill()  # wherever it is in the next one
        writer.wait()
        writer.stdout.close()
        found = check_file(tmp_path / "data.mdb")
        assert not isinstance(found, Damage), str(found)


def test_an_empty_file_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.mdb").touch()
    assert listed(check_file(tmp_path / "data.mdb")) == []
    assert listed(in_python(tmp_path / "data.mdb", monkeypatch)) == []
    assert by_lmdb(tmp_path) == []


def test_what_a_newer_minor_version_adds_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = filled(tmp_path, 10)
    env = lmdb.open(str(tmp_path), map_size=MAP_BYTES, max_dbs=2, metasync=False)
    main, others = env.open_db(None), env.open_db(b"others")
    with env.begin(write=True) as txn:
        txn.put(b"more", b"of it" * 100, db=main)
        for number in range(300):
            txn.put(b"%d" % number, b"other" * (number % 9), db=others)
    env.close()
    assert len(listed(check_file(file))) == 10
    assert plain(in_python(file, monkeypatch)) == plain(check_file(file))


# --- what is not


@needs_library
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_the_library_and_python_say_the_same(
    harm: Harm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    verdicts: Counter[object] = Counter()
    for whole in files(7, tmp_path, 4):
        for _ in range(25):
            content = bytearray(whole)
            harm(content, rng)
            (tmp_path / "data.mdb").write_bytes(content)
            found = plain(check_file(tmp_path / "data.mdb"))
            assert plain(in_python(tmp_path / "data.mdb", monkeypatch)) == found
            verdicts[found.problem if isinstance(found, Damage) else 0] += 1
    assert set(verdicts) - {0}, "no harm was done"


def counted(what: str, *options: str) -> int:
    run = subprocess.run(
        [sys.executable, page_damage.__file__, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert run.returncode == 0, run.stdout
    found = re.search(rf"^ *(\d+) {what}$", run.stdout, re.MULTILINE)
    return int(found[1]) if found else 0


def test_what_passes_neither_kills_lmdb_nor_fails_in_it() -> None:
    assert counted("passed", "--seed", "3", "--count", "300") >= 30


def test_and_what_does_not_pass_would_have() -> None:
    assert counted("rejected and harmful", "--seed", "4", "--count", "60", "--all") >= 10


def newest_meta(content: bytearray) -> int:
    return max((0, PAGE), key=lambda at: struct.unpack_from("<Q", content, at + 144)[0])


def node(content: bytearray, page: int, index: int) -> int:
    (offset,) = struct.unpack_from("<H", content, page * PAGE + 16 + 2 * index)
    return page * PAGE + int(offset)


def slots_root(content: bytearray) -> int:
    """Of the database of slots: a branch page, of leaves."""
    (main_root,) = struct.unpack_from("<Q", content, newest_meta(content) + 40 + 48 + 40)
    at = node(content, main_root, 1)
    assert content[at + 8 : at + 13] == b"slots"
    return int(struct.unpack_from("<Q", content, at + 13 + 40)[0])


def a_record(content: bytearray) -> None:
    leaf = struct.unpack_from("<I", content, node(content, slots_root(content), 1))[0]
    content[node(content, leaf, 2) + 60] ^= 4


def a_record_of_another_slot(content: bytearray) -> None:
    """Sound in itself; a checksum alone would not tell."""
    leaf = struct.unpack_from("<I", content, node(content, slots_root(content), 1))[0]
    at = node(content, leaf, 0)
    (length,) = struct.unpack_from("<I", content, at)
    content[at + 12 : at + 12 + length] = sound(7, bytes(length - 12))[1]


def a_separator(content: bytearray) -> None:
    """Greater than the first key below: that one would be looked for elsewhere."""
    at = node(content, slots_root(content), 2) + 8
    (key,) = struct.unpack_from("<I", content, at)
    struct.pack_into("<I", content, at, key + 1)


def a_leaf_in_the_place_of_another(content: bytearray) -> None:
    root = slots_root(content)
    one, two = node(content, root, 2), node(content, root, 3)
    content[one : one + 6] = content[two : two + 6]


def a_count(content: bytearray) -> None:
    content[newest_meta(content) + 40 + 48 + 32] ^= 1


def the_last_page(content: bytearray) -> None:
    content[newest_meta(content) + 136] += 1


def a_last_page_beyond_belief(content: bytearray) -> None:
    content[newest_meta(content) + 141] = 1


def a_free_page(content: bytearray) -> None:
    """One that is in use: it would be given away and overwritten."""
    (root,) = struct.unpack_from("<Q", content, newest_meta(content) + 40 + 40)
    at = node(content, root, 0)
    struct.pack_into("<Q", content, at + 24, root)


def a_length(content: bytearray) -> None:
    leaf = struct.unpack_from("<I", content, node(content, slots_root(content), 1))[0]
    content[node(content, leaf, 3)] += 2


def a_dirty_page(content: bytearray) -> None:
    content[slots_root(content) * PAGE + 10] |= 0x10


def a_turn(content: bytearray) -> None:
    content[newest_meta(content) + 144] += 2


def the_flags_of_slots(content: bytearray) -> None:
    (main_root,) = struct.unpack_from("<Q", content, newest_meta(content) + 40 + 48 + 40)
    content[node(content, main_root, 1) + 13 + 4] = 0


def a_value_as_a_database(content: bytearray) -> None:
    (main_root,) = struct.unpack_from("<Q", content, newest_meta(content) + 40 + 48 + 40)
    content[node(content, main_root, 0) + 4] = 2


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (a_record, checks._RECORD), (a_record_of_another_slot, checks._RECORD),
        (a_separator, checks._KEYS), (a_leaf_in_the_place_of_another, checks._KEYS),
        (a_count, checks._COUNTS),
        (the_last_page, checks._LEAKED), (a_last_page_beyond_belief, checks._LAST),
        (a_free_page, checks._TWICE), (a_length, checks._NODES),
        (a_dirty_page, checks._HEADER),
        (a_turn, checks._META), (the_flags_of_slots, checks._DATABASE),
        (a_value_as_a_database, checks._VALUE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_each_kind_of_damage_is_found(
    tmp_path: Path,
    harm: Callable[[bytearray], None],
    problem: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = filled(tmp_path, 300, turns=2)
    content = bytearray(file.read_bytes())
    harm(content)
    file.write_bytes(content)
    found = check_file(file)
    assert isinstance(found, Damage)
    assert found.problem == problem, str(found)
    assert in_python(file, monkeypatch) == found


@pytest.mark.parametrize(
    "content", [b"x", bytes(100), bytes(8192), random.Random(1).randbytes(40_000)]
)
def test_odd_files_are_damaged(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.mdb"
    file.write_bytes(content)
    assert isinstance(check_file(file), Damage)
    assert in_python(file, monkeypatch) == check_file(file)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")
