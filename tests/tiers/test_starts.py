"""A loop of crashes ends: two starts that died of their map, and the next believes less."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtier import native
from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks
from kvtier.tiers import starts as module
from kvtier.tiers.files import Files
from kvtier.tiers.ssd import SsdTier
from kvtier.tiers.starts import WINDOW_S, Start, StartLog, Verdict, read_starts, verdict_on
from kvtier.units import MIB

SIZE = 16 * 1024
NOW = 1_800_000_000
needs_library = pytest.mark.skipif(
    native.library() is None, reason=f"no library: {native.capabilities().reason}"
)


def start(
    at: int, *, crash: int | None = None, verdict: Verdict = Verdict.CATALOGUE,
    recovered: bool = True, ended: bool = False, watched: bool = True,
) -> Start:  # fmt: skip
    """A start `at` s after NOW, with a SIGBUS `crash` s after it, or none."""
    number, signal_s = (signal.SIGBUS, NOW + at + crash) if crash is not None else (0, 0)
    return Start(NOW + at, verdict, watched, recovered, ended, number, signal_s)


@pytest.mark.parametrize(
    ("starts", "verdict"),
    [
        ([], Verdict.CATALOGUE),
        ([start(0, ended=True)], Verdict.CATALOGUE),
        ([start(0, crash=5)], Verdict.CATALOGUE),
        ([start(0, crash=5), start(10, crash=5)], Verdict.SLABS),
        ([start(0, crash=5), start(10, crash=5, recovered=False)], Verdict.SLABS),
        # More than ten minutes lie between them.
        ([start(0, crash=5), start(10, crash=WINDOW_S)], Verdict.CATALOGUE),
        ([start(0, crash=5), start(10, crash=WINDOW_S - 5)], Verdict.SLABS),
        # Killed or ended since: whatever it was, it is over.
        ([start(0, crash=5), start(10, crash=5), start(20)], Verdict.CATALOGUE),
        ([start(0, crash=5), start(10, ended=True), start(20, crash=5)], Verdict.SLABS),
        # What was acted on counts no more; the crash of the start that acted does.
        ([start(0, crash=5), start(10, crash=5), start(20, verdict=Verdict.SLABS)],
         Verdict.CATALOGUE),
        ([start(0, crash=5), start(10, crash=5), start(20, verdict=Verdict.SLABS, crash=5)],
         Verdict.CATALOGUE),
        ([start(20, verdict=Verdict.SLABS, crash=5), start(30, crash=5)], Verdict.SLABS),
        # Making it anew from slabs crashed as well.
        ([start(20, verdict=Verdict.SLABS, crash=5, recovered=False)], Verdict.NOTHING),
        ([start(20, verdict=Verdict.NOTHING, crash=5, recovered=False)], Verdict.NOTHING),
        # Nobody could see a signal: a start that did not get through counts.
        ([start(0, watched=False, recovered=False)] * 2, Verdict.SLABS),
        ([start(0, watched=False)] * 2, Verdict.CATALOGUE),
        ([start(0, watched=False, recovered=False, ended=True)] * 2, Verdict.CATALOGUE),
        ([start(0, recovered=False)] * 2, Verdict.CATALOGUE),  # it was killed, or lost power
    ],
)  # fmt: skip
def test_what_the_next_start_believes(starts: list[Start], verdict: Verdict) -> None:
    assert verdict_on(starts) is verdict


@needs_library  # without, some of these would count as crashes
def test_the_file_says_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "starts"
    for number in range(20):
        log = StartLog(Files(), path, on=True)
        assert log.begin() is Verdict.CATALOGUE
        if number % 2:
            log.recovered()
        if number % 3:
            log.end()
        else:
            os.close(log._fd)  # as a kill does
    known = read_starts(path)
    assert len(known) == 16
    assert [entry.recovered for entry in known] == [bool(n % 2 or n % 3) for n in range(4, 20)]
    assert [entry.ended for entry in known] == [bool(n % 3) for n in range(4, 20)]
    assert all(abs(entry.started_s - time.time()) < 600 for entry in known)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(64 * 20), os.urandom(64 * 16)])
def test_a_damaged_file_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "starts").write_bytes(content)
    assert read_starts(tmp_path / "starts") == []
    log = StartLog(Files(), tmp_path / "starts", on=True)
    assert log.begin() is Verdict.CATALOGUE
    log.end()
    assert len(read_starts(tmp_path / "starts")) == 1


def test_a_disk_that_takes_no_file_does_not_prevent_a_start(tmp_path: Path) -> None:
    log = StartLog(Files(), tmp_path / "none" / "starts", on=True)
    assert log.begin() is Verdict.CATALOGUE
    log.recovered()
    log.end()


_CHILD = """
import ctypes, faulthandler, os, signal, sys
from pathlib import Path
from kvtier.tiers.files import Files
from kvtier.tiers.starts import StartLog
how = sys.argv[2]
if "faulthandler" in how:
    faulthandler.enable()
log = StartLog(Files(), Path(sys.argv[1]), on=True)
log.begin()
if "wild" in how:
    ctypes.string_at(8)
if "abort" in how:
    os.abort()
if "torn" in how:
    import mmap
    with open(sys.argv[1] + ".torn", "w+b") as file:
        file.truncate(8192)
        torn = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        torn[5000]
os.kill(os.getpid(), getattr(signal, how))
"""


@needs_library
@pytest.mark.parametrize(
    ("how", "number", "seen"),
    [
        ("SIGBUS", signal.SIGBUS, True), ("torn map", signal.SIGBUS, True),
        ("wild pointer", signal.SIGSEGV, True), ("abort", signal.SIGABRT, True),
        ("torn map, faulthandler", signal.SIGBUS, True), ("SIGKILL", signal.SIGKILL, False),
        ("SIGTERM", signal.SIGTERM, False),
    ],
)  # fmt: skip
def test_a_dying_process_says_of_what(
    how: str, number: signal.Signals, seen: bool, tmp_path: Path
) -> None:
    """And it still dies of that, with whatever others wanted to say about it."""
    path = tmp_path / "starts"
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert child.returncode == -number, child.stderr
    assert ("Fatal Python error" in child.stderr) == ("faulthandler" in how)
    [entry] = read_starts(path)
    assert entry.signal == (number if seen else 0)
    assert not seen or abs(entry.signal_s - time.time()) < 600


@needs_library
def test_signals_are_as_they_were_after_the_end(tmp_path: Path) -> None:
    def handlers() -> list[int]:
        """What sigaction has for each: the first word of the struct."""
        found = []
        libc = ctypes.CDLL(None)
        for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT):
            action = (ctypes.c_uint64 * 32)()
            assert libc.sigaction(number, None, action) == 0
            found.append(action[0])
        return found

    before = handlers()
    log = StartLog(Files(), tmp_path / "starts", on=True)
    log.begin()
    assert all(ours != theirs for ours, theirs in zip(handlers(), before, strict=True))
    log.end()
    assert handlers() == before


# --- what a tier makes of it


def crashed(directory: Path, *, ago_s: int = 0, recovered: bool = True) -> None:
    """As if a start had died of a SIGBUS so long ago."""
    path = directory / "starts"
    now = int(time.time()) - ago_s
    entry = Start(now - 1, Verdict.CATALOGUE, True, recovered, False, signal.SIGBUS, now)
    with path.open("ab") as file:
        file.write(module._pack(entry))


def open_tier(directory: Path) -> tuple[SsdTier, int]:
    tier = SsdTier(directory, 2, MIB, min_free_bytes=0, record_crashes=True)
    count = len(tier.recover())
    tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
    return tier, count


def filled(directory: Path) -> None:
    tier, _ = open_tier(directory)
    blocks = Blocks(tier, 8, SIZE)
    tier.write(blocks.items)
    assert [item.error for item in blocks.items] == [None] * 8
    tier.close()


def test_after_two_crashes_the_catalogue_is_made_anew_and_the_old_one_kept(tmp_path: Path) -> None:
    filled(tmp_path)
    crashed(tmp_path)
    crashed(tmp_path)
    tier, count = open_tier(tmp_path)
    assert count == 8
    assert len(list(tmp_path.glob("catalogue.damaged-*"))) == 1
    tier.close()
    tier, count = open_tier(tmp_path)  # once is enough
    assert count == 8
    assert len(list(tmp_path.glob("catalogue.damaged-*"))) == 1
    tier.close()


def test_crashes_far_apart_are_no_loop(tmp_path: Path) -> None:
    filled(tmp_path)
    crashed(tmp_path, ago_s=WINDOW_S + 60)
    crashed(tmp_path)
    tier, count = open_tier(tmp_path)
    assert count == 8
    assert not list(tmp_path.glob("catalogue.damaged-*"))
    tier.close()


def test_when_making_it_anew_crashes_too_the_tier_starts_empty(tmp_path: Path) -> None:
    filled(tmp_path)
    crashed(tmp_path)
    crashed(tmp_path)
    tier = SsdTier(tmp_path, 2, MIB, min_free_bytes=0, record_crashes=True)
    tier.load()
    tier._starts._note = lambda _: None  # type: ignore[method-assign, assignment]
    tier.close()
    content = bytearray((tmp_path / "starts").read_bytes())
    struct.pack_into("<IIQ", content, len(content) - 32, 7, 7 ^ 0xFFFFFFFF, int(time.time()))
    (tmp_path / "starts").write_bytes(content)  # it died of a SIGBUS

    tier, count = open_tier(tmp_path)
    assert count == 0
    assert not list((tmp_path / "slabs").iterdir())
    assert list(tmp_path.glob("catalogue.damaged-*"))
    blocks = Blocks(tier, 4, SIZE, seed=3)
    tier.write(blocks.items)
    assert [item.error for item in blocks.items] == [None] * 4
    tier.close()
    tier, count = open_tier(tmp_path)
    assert count == 4
    tier.close()


def test_a_tier_that_is_not_asked_to_records_nothing(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path, 2, MIB, min_free_bytes=0)
    tier.recover()
    tier.close()
    assert not (tmp_path / "starts").exists()
