"""Data files of the catalogue, harmed in many ways; and what LMDB does with those.

    python tests/tiers/page_damage.py --seed 1 --count 10000

Each harmed file that `check_file` passes is opened, read, written to and closed by LMDB in a child
process: a signal or an error there is a violation, and what comes out must be sound, too. With
`--all`, those it does not pass are tried as well, to see how many of them would have done harm.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import xxhash

from kvtier.tiers.page_checks import Damage
from kvtier.tiers.pages import check_file

MAP_BYTES = 64 << 20
PAGE = 4096
SEGMENT_SLOTS = 1 << 8  # of this workload
Harm = Callable[[bytearray, random.Random], None]


def sound(slot: int, body: bytes) -> tuple[bytes, bytes]:
    """A record as the catalogue writes it, as far as the file is concerned."""
    key = slot.to_bytes(4, "little")
    return key, xxhash.xxh3_64_intdigest(key + body).to_bytes(8, "little") + key + body


class Workload:
    """Random transactions on a catalogue, as the tier makes them."""

    def __init__(self, directory: Path, rng: random.Random, map_bytes: int = MAP_BYTES) -> None:
        self.rng = rng
        self.map_bytes = map_bytes
        self.env = lmdb.open(
            str(directory), map_size=map_bytes, max_dbs=1, metasync=False, readahead=False
        )
        self.main = self.env.open_db(None)
        self.slots = self.env.open_db(b"slots", integerkey=True)

    def put(self, slots: list[int]) -> None:
        with self.env.begin(write=True, db=self.slots) as txn:
            for slot in slots:
                txn.put(*sound(slot, self.rng.randbytes(self.rng.randrange(66, 190))))

    def delete(self, slots: list[int]) -> None:
        with self.env.begin(write=True, db=self.slots) as txn:
            for slot in slots:
                txn.delete(slot.to_bytes(4, "little"))

    def delete_segment(self, segment: int) -> None:
        end = (segment + 1) * SEGMENT_SLOTS
        with self.env.begin(write=True, db=self.slots) as txn, txn.cursor() as cursor:
            found = cursor.set_range((segment * SEGMENT_SLOTS).to_bytes(4, "little"))
            while found and int.from_bytes(cursor.key(), "little") < end:
                found = cursor.delete()

    def complete(self) -> None:
        with self.env.begin(write=True) as txn:
            txn.put(b"complete", b"1", db=self.main)

    def read(self) -> list[tuple[bytes, bytes]]:
        with self.env.begin(db=self.slots) as txn:
            txn.get(b"complete", db=self.main)
            return list(txn.cursor())

    def step(self, slots_max: int) -> None:
        """One transaction."""
        rng, kind = self.rng, self.rng.randrange(10)
        some = [rng.randrange(slots_max) for _ in range(rng.choice((1, 8, 64, 400)))]
        if kind < 5:
            self.put(some)
        elif kind < 8:
            self.delete(some)
        elif kind == 8:
            self.delete_segment(rng.randrange(slots_max // SEGMENT_SLOTS + 1))
        else:
            first = rng.randrange(slots_max)
            self.put(list(range(first, first + rng.choice((1, 100, 700)))))

    def close(self) -> None:
        self.env.close()


def files(seed: int, directory: Path, count: int) -> Iterator[bytes]:
    """So many sound data files: small and large, filled in order and at random, emptied again."""
    rng = random.Random(seed)
    for number in range(count):
        path = directory / f"made-{seed}-{number}"
        work = Workload(path, rng)
        slots_max = rng.choice((40, 700, 3000, 3000))
        work.complete()
        if rng.random() < 0.5:
            work.put(list(range(slots_max)))
        for _ in range(rng.choice((0, 5, 40, 40))):
            work.step(slots_max)
        work.close()
        yield (path / "data.mdb").read_bytes()
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


# --- harm


def pages_of(content: bytearray) -> int:
    return max(1, len(content) // PAGE)


def _flags(content: bytearray, page: int) -> int:
    return int.from_bytes(content[page * PAGE + 10 : page * PAGE + 12], "little")


def _tree_page(content: bytearray, rng: random.Random) -> int:
    """A branch page where there is one, else any."""
    branches = [p for p in range(2, pages_of(content)) if _flags(content, p) == 1]
    return rng.choice(branches) if branches and rng.random() < 0.6 else rng.randrange(
        pages_of(content)
    )  # fmt: skip


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_byte(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] = rng.randrange(256)


def flip_header(content: bytearray, rng: random.Random) -> None:
    """Where it hurts: page headers, pointers, meta pages."""
    page = rng.choice((0, 1, _tree_page(content, rng)))
    content[page * PAGE + rng.randrange(180 if page < 2 else 48)] ^= 1 << rng.randrange(8)


def change_word(content: bytearray, rng: random.Random) -> None:
    """A field of a header, a meta page or a node becomes a little more or less, or something
    plausible.
    """
    page = rng.choice((0, 1, _tree_page(content, rng), _tree_page(content, rng)))
    form = rng.choice(("<H", "<H", "<I", "<Q"))
    at = page * PAGE + rng.randrange(0, 176 if page < 2 else 200, 2)
    (value,) = struct.unpack_from(form, content, at)
    change = rng.choice((-2, -1, 1, 2, 8, -8, rng.randrange(-5000, 5000)))
    changed = max(0, value + change) if rng.random() < 0.8 else rng.randrange(pages_of(content))
    struct.pack_into(form, content, at, changed % (1 << 8 * struct.calcsize(form)))


def change_node(content: bytearray, rng: random.Random) -> None:
    """A node's length, flags, key length or key, of a page that may be in use."""
    page = _tree_page(content, rng)
    lower = int.from_bytes(content[page * PAGE + 12 : page * PAGE + 14], "little")
    if page < 2 or not 16 < lower <= PAGE:
        flip_header(content, rng)
        return
    pointer = page * PAGE + 16 + 2 * rng.randrange((lower - 16) // 2)
    node = page * PAGE + int.from_bytes(content[pointer : pointer + 2], "little")
    at = node + rng.randrange(14)
    if at < len(content):
        content[at] = rng.choice((content[at] ^ 1, content[at] ^ 128, rng.randrange(256)))


def swap_pointers(content: bytearray, rng: random.Random) -> None:
    """Two nodes of a page change places, or become one."""
    page = _tree_page(content, rng)
    one, two = (page * PAGE + 16 + 2 * rng.randrange(12) for _ in range(2))
    keep = content[one : one + 2]
    content[one : one + 2] = content[two : two + 2]
    if rng.random() < 0.7:
        content[two : two + 2] = keep


def tear(content: bytearray, rng: random.Random) -> None:
    sector = rng.randrange(len(content) // 512) * 512
    content[sector : sector + 512] = bytes(512)


def swap(content: bytearray, rng: random.Random) -> None:
    one, two = (rng.randrange(pages_of(content)) * PAGE for _ in range(2))
    page = content[one : one + PAGE]
    content[one : one + PAGE] = content[two : two + PAGE]
    content[two : two + PAGE] = page


def repeat(content: bytearray, rng: random.Random) -> None:
    """A page is what another one is, with its own number."""
    one, two = (rng.randrange(2, max(3, pages_of(content))) for _ in range(2))
    if (max(one, two) + 1) * PAGE <= len(content):
        content[one * PAGE + 8 : (one + 1) * PAGE] = content[two * PAGE + 8 : (two + 1) * PAGE]


def old_meta(content: bytearray, rng: random.Random) -> None:
    """The newest transaction never came to the disk; something else may be wrong as well."""
    first, second = (struct.unpack_from("<Q", content, page * PAGE + 144)[0] for page in (0, 1))
    newest = int(first < second)
    if max(first, second) >= 2:
        other = content[(1 - newest) * PAGE + 32 : (1 - newest) * PAGE + 152]
        content[newest * PAGE + 32 : newest * PAGE + 152] = other
        struct.pack_into("<Q", content, newest * PAGE + 144, max(first, second) - 2)
    if rng.random() < 0.7:
        change_word(content, rng)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def twice(content: bytearray, rng: random.Random) -> None:
    """Two harms, of which the second may hide the first."""
    for harm in rng.sample(HARMS[:-1], 2):
        if content:
            harm(content, rng)


HARMS: list[Harm] = [
    flip, flip_byte, flip_header, change_word, change_node, swap_pointers, tear, swap, repeat,
    old_meta, cut, twice,
]  # fmt: skip


# --- what LMDB does with it


def exercise(directory: Path, seed: int) -> None:
    """Reads and writes all over the file. Raises whatever LMDB raises."""
    work = Workload(directory, random.Random(seed))
    try:
        before = work.read()
        slots = [int.from_bytes(key, "little") for key, _ in before]
        assert slots == sorted(set(slots))
        slots_max = max(slots, default=100) + 50
        for _ in range(12):
            work.step(min(slots_max, 4000))
        work.delete(slots[::2])
        work.put(slots[:200])
        for segment in range(min(slots_max, 4000) // SEGMENT_SLOTS + 1):
            work.delete_segment(segment)
        work.put(list(range(300)))
        work.read()
        work.env.sync(True)
    finally:
        work.close()
    found = check_file(directory / "data.mdb")
    assert not isinstance(found, Damage), f"after all that: {found}"


def outcome(directory: Path, content: bytes, seed: int) -> str:
    """What went wrong when a child process used this file; empty if nothing did."""
    for name in ("data.mdb", "lock.mdb"):
        (directory / name).unlink(missing_ok=True)
    (directory / "data.mdb").write_bytes(content)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(directory / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC), 2)
            exercise(directory, seed)
            status = 0
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
            os.write(2, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return ""
    said = (directory / "said").read_text(errors="replace")[:200]
    return f"signal {os.WTERMSIG(status)} {said}" if os.WIFSIGNALED(status) else said


def run(seed: int, count: int, directory: Path, *, rejected_too: bool = False) -> Counter[str]:
    """Harms `count` files; counts what became of them. Violations start with "VIOLATION"."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    made = list(files(seed, directory, max(2, min(40, count // 50))))
    place = directory / "harmed"
    place.mkdir(exist_ok=True)
    for number in range(count):
        whole = rng.choice(made)
        content = bytearray(whole)
        harm = rng.choice(HARMS)
        harm(content, rng)
        if content == whole:
            continue
        (place / "data.mdb").write_bytes(content)
        found = check_file(place / "data.mdb")
        passed = not isinstance(found, Damage)
        counts["passed" if passed else "rejected"] += 1
        counts[f"{harm.__name__}: " + ("passed" if passed else "rejected")] += 1
        if passed or rejected_too:
            said = outcome(place, bytes(content), number)
            if passed and said:
                keep = Path(tempfile.gettempdir()) / f"violation-{seed}-{number}.mdb"
                keep.write_bytes(content)
                counts[f"VIOLATION number {number} {harm.__name__}: {said} ({keep})"] += 1
            elif said:
                counts["rejected and harmful"] += 1
                counts[f"rejected, would have been: {said.split(':')[0][:30]}"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = run(options.seed, options.count, Path(directory), rejected_too=options.all)
    lines = [f"{many:7} {what}" for what, many in sorted(counts.items())]
    sys.stdout.write("\n".join([f"seed {options.seed}", *lines, ""]))
    return any(what.startswith("VIOLATION") for what in counts)


if __name__ == "__main__":
    sys.exit(main())
