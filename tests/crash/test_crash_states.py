"""Power cuts: every state that recorded lives may leave comes back as promised; bugs are caught.

KVTIER_CRASH_STATES and KVTIER_CRASH_SEED choose size and seed; tests/crash/README.md has the rest.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import crash_plants
import pytest
from crash_check import Child, check
from crash_disk import Disk, Image
from crash_recording import Event, parse

STATES = int(os.environ.get("KVTIER_CRASH_STATES", "20000"))
SEED = int(os.environ.get("KVTIER_CRASH_SEED", "1"))
STEPS = 120
PARTS = 8
traced = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed (Debian: strace)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: what is tried is the order of writes, not a disk."""
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


@traced
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_state_that_a_power_cut_may_leave_keeps_the_promises(part: int, folder: Path) -> None:
    seed, states = SEED + 1000 * part, STATES // PARTS
    verdict = check(seed, states, steps=STEPS, folder=folder)
    assert verdict.states == states
    assert not verdict.problems, "\n".join(
        [f"again: python -m tests.crash --seed {seed} --states {states}", *verdict.problems[:20]]
    )


@traced
@pytest.mark.timeout(600)
@pytest.mark.parametrize("plant", [*crash_plants.WRITING, *crash_plants.READING])
def test_a_planted_bug_is_caught(plant: str, folder: Path) -> None:
    problems = []
    for seed in range(SEED, SEED + 5):
        problems = check(seed, 600, steps=60, folder=folder, plant=plant).problems
        if problems:
            break
    assert problems, f"nobody noticed: python -m tests.crash --seed {SEED} --plant {plant}"


def test_a_child_that_dies_before_it_began_is_a_violation(folder: Path) -> None:
    child = Child([], folder / "image", "no such plant")
    child.start()
    assert any("before it recovered" in problem for problem in child.finish())


# --- the model of the disk itself


def images(*events: Event) -> list[Image]:
    disk = Disk()
    for event in events:
        disk.take(event)
    made: list[Image] = []
    for seed in range(64):
        made += [image for image in disk.images(random.Random(seed)) if image not in made]
    return made


CREATED = (Event("create", "a"), Event("sync_directory"))


def test_what_was_synced_is_there_and_nothing_else_can_be() -> None:
    assert images(*CREATED, Event("write", "a", 0, b"x" * 512), Event("sync", "a")) == [
        {"a": b"x" * 512}
    ]


def test_unsynced_writes_are_there_in_any_combination() -> None:
    one, two = Event("write", "a", 0, b"1" * 512), Event("write", "a", 512, b"2" * 512)
    contents = {image["a"] for image in images(*CREATED, one, two)}
    assert contents == {b"", b"1" * 512, bytes(512) + b"2" * 512, b"1" * 512 + b"2" * 512}


def test_a_write_is_torn_between_sectors_never_within_one() -> None:
    event = Event("write", "a", 256, b"1" * 768)  # half a sector, then a whole one
    contents = {image["a"] for image in images(*CREATED, event)}
    first = bytes(256) + b"1" * 256
    assert contents == {b"", first, bytes(512) + b"1" * 512, first + b"1" * 512}


def test_names_happen_in_order_and_only_a_synced_directory_is_sure() -> None:
    made = images(
        *CREATED, Event("write", "a", 0, b"old"), Event("sync", "a"),
        Event("create", "b"), Event("write", "b", 0, b"new"), Event("sync", "b"),
        Event("rename", "b", target="a"),
    )  # fmt: skip
    assert {"a": b"old"} in made
    assert {"a": b"old", "b": b"new"} in made
    assert {"a": b"new"} in made
    assert len(made) == 3


def test_a_trace_is_read_as_it_was_written() -> None:
    hexed = "".join(f"\\x{byte:02x}" for byte in b"/life/data")
    marks = "".join(f"\\x{byte:02x}" for byte in b"/marks")
    trace = "\n".join(
        (
            f'openat(AT_FDCWD<\\x2f>, "{hexed}", O_RDWR|O_CREAT, 0600) = 5<{hexed}>',
            f"lseek(5<{hexed}>, 8192, SEEK_SET) = 8192",
            (
                f'writev(5<{hexed}>, [{{iov_base="\\x01", iov_len=1}}, '
                '{iov_base="\\x02", iov_len=1}], 2) = 2'
            ),
            f'pwritev2(5<{hexed}>, [{{iov_base="\\x03", iov_len=1}}], 1, 4096, 0) = 1',
            f'pwrite64(5<{hexed}>, "\\x04", 1, 77) = -1 ENOSPC (No space left on device)',
            f"fdatasync(5<{hexed}>) = 0",
            f'pwritev(6<{hexed}>(deleted), [{{iov_base="\x05", iov_len=1}}], 1, 0) = 1',
            f'write(3<{marks}>, "\\x7b\\x7d\\x0a", 3) = 3',
        )
    )
    assert parse(trace, Path("/life"), Path("/marks")) == [
        Event("create", "data"),
        Event("write", "data", 8192, b"\1\2"),
        Event("write", "data", 4096, b"\3"),
        Event("sync", "data"),
        Event("mark", mark={}),
    ]
