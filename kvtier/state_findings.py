"""What lies in a state directory, told to an operator: each state, why it is so, what to do.

Reads only, a directory in use as well as one at rest: nothing is set aside, mapped or locked.

Does not: ask the daemon (cli/doctor.py), or look into slabs beyond their headers (scrub does).
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import Signals

from kvtier.config import Config
from kvtier.findings import Finding
from kvtier.machine import directory_bytes, file_system
from kvtier.tiers.identity import read_identity
from kvtier.tiers.page_checks import Damage
from kvtier.tiers.pages import check_file
from kvtier.tiers.scrub_notes import read_notes
from kvtier.tiers.slab_head import SlabHead, read_head
from kvtier.tiers.starts import Start, Verdict, read_starts, verdict_on
from kvtier.tiers.state import STATE_VERSION, read_book, read_version
from kvtier.tiers.versions import SET_ASIDE
from kvtier.units import format_bytes

_LISTED_MAX = 5


def state_findings(config: Config) -> list[Finding]:
    """What lies in the SSD tier's directory of this configuration. "fail": a daemon would not get
    at it. Never raises for what it finds.
    """
    directory = config.state.dir / "ssd"
    if not config.tiers.ssd.enabled:
        return []
    try:
        if not directory.exists():
            return [Finding("state", "ok", f"nothing in {directory} yet: a first start makes it")]
    except PermissionError:
        return [_shut(config.state.dir, [config.state.dir])]
    running = is_locked(config.state.dir)
    found = list(_permissions(config.state.dir, directory))
    if any(finding.status == "fail" for finding in found):
        return found
    questions: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _version(directory),
        lambda: _identity(directory),
        lambda: _starts(directory, running=running),
        lambda: _clean(directory, running=running),
        lambda: _catalogue(directory, running=running),
        lambda: _namespaces(directory),
        lambda: _set_aside(directory),
        lambda: _slabs(config, directory, running=running),
        lambda: _space(config, directory),
        lambda: _scrub(config, directory),
    )
    for question in questions:
        try:
            found += question()
        except OSError as error:
            path = error.filename or directory
            remedy = "look at the device and its file system (dmesg, smartctl)"
            found.append(Finding("state", "fail", f"{path}: {error.strerror}", remedy))
    return found


def is_locked(state_dir: Path) -> bool:
    """Whether a daemon uses this state directory now."""
    try:
        fd = os.open(state_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _permissions(state_dir: Path, directory: Path) -> Iterator[Finding]:
    places = [directory]
    if _may(directory, os.X_OK):  # else nobody knows whether these are there
        places += [directory / "slabs", directory / "catalogue"]
    there = [place for place in places if place.exists()]
    shut = [place for place in there if not _may(place, os.R_OK | os.W_OK | os.X_OK)]
    files = [p for place in there for p in _list(place) if p.is_file()]
    shut += [path for path in files if not _may(path, os.R_OK | os.W_OK)]
    if shut:
        yield _shut(state_dir, shut)
        return
    wide = [path for path in (*there, *files) if path.stat().st_mode & 0o077]
    if wide:
        remedy = f"chmod -R go-rwx {directory}: a KV cache is its users' prompts"
        yield Finding("permissions", "warn", f"others may use {_some(wide)}", remedy)
    else:
        yield Finding("permissions", "ok", f"{directory} is its owner's alone")


def _shut(state_dir: Path, places: list[Path]) -> Finding:
    me = os.geteuid()
    remedy = f"run as the daemon's user, or chown -R {me} {state_dir} and chmod -R u+rwX"
    return Finding("permissions", "fail", f"{_some(places)}: not for uid {me}", remedy)


def _may(path: Path, how: int) -> bool:
    return os.access(path, how, effective_ids=True)


def _version(directory: Path) -> Iterator[Finding]:
    major, minor = STATE_VERSION
    path = directory / "VERSION"
    if not path.exists():
        remedy = "none: the next start takes what is there for its own, and checks it"
        yield Finding("state version", "warn", "there is no VERSION", remedy)
        return
    known = read_version(path)
    if known is None:
        remedy = "none: the next start writes it anew; slabs and slots say their version themselves"
        yield Finding("state version", "warn", "VERSION is damaged", remedy)
    elif known[0] != major:
        yield Finding(
            "state version", "warn",
            f"{known[0]}.{known[1]}, of another kvtier; this one has {major}.{minor}",
            f"start that kvtier; this one would set all of it aside in {SET_ASIDE}/v{known[0]} and "
            "begin with nothing (it comes back when that kvtier starts)",
        )  # fmt: skip
    else:
        newer = f" (a later kvtier wrote it; {major}.{minor} can read it)" * (known[1] > minor)
        yield Finding("state version", "ok", f"{known[0]}.{known[1]}{newer}")


def _identity(directory: Path) -> Iterator[Finding]:
    path = directory / "identity"
    if not path.exists():
        if any((directory / "slabs").glob("*.slab")):
            remedy = "none: the next start asks the slabs"
            yield Finding("identity", "warn", "there is no identity beside slabs", remedy)
        return
    known = read_identity(path.read_bytes())
    if known is None:
        remedy = "none: the next start asks the slabs, which takes it longer"
        yield Finding("identity", "warn", "identity is damaged", remedy)
    else:
        yield Finding("identity", "ok", f"{known[0].hex()[:8]}, start {known[1]}")


def _starts(directory: Path, *, running: bool) -> Iterator[Finding]:
    starts = read_starts(directory / "starts")
    if running:
        starts = starts[:-1] if starts and not starts[-1].ended else starts
    if not starts:
        return
    crashes = [start for start in starts if start.crashed_s is not None]
    detail = f"{len(starts)} known, {len(crashes)} of them crashed"
    if crashes:
        detail += f"; the last one {_crash(crashes[-1])}"
    verdict = verdict_on(starts)
    if verdict is Verdict.SLABS and not running:
        remedy = "the next start sets the catalogue aside, as evidence, and rebuilds it from slabs"
        yield Finding("starts", "warn", f"{detail}: two in a row", f"{remedy}; look at the device")
    elif verdict is Verdict.NOTHING and not running:
        remedy = "the next start begins with an empty tier; copy the directory first to examine it"
        yield Finding("starts", "warn", f"{detail}, reading slabs alone", remedy)
    elif crashes and starts[-1] is crashes[-1]:
        remedy = "look at the device (dmesg, smartctl) and the daemon's log"
        yield Finding("starts", "warn", detail, remedy)
    else:
        yield Finding("starts", "ok", detail)


def _crash(start: Start) -> str:
    name = Signals(start.signal).name if start.signal else "without a word"
    return f"by {name} at {_when(start.crashed_s or 0)}"


def _clean(directory: Path, *, running: bool) -> Iterator[Finding]:
    clean = (directory / "clean").exists()
    if running:
        yield Finding("clean marker", "ok", "absent, as always while a daemon runs")
    elif clean:
        yield Finding("clean marker", "ok", "there: the last daemon ended in order")
    elif (directory / "catalogue").exists():
        remedy = "none: the next start checks everything and finds what was written"
        detail = "absent: the last daemon was killed, or the power failed"
        yield Finding("clean marker", "warn", detail, remedy)


def _catalogue(directory: Path, *, running: bool) -> Iterator[Finding]:
    path = directory / "catalogue" / "data.mdb"
    slabs = any((directory / "slabs").glob("*.slab"))
    if not path.exists():
        if slabs:
            remedy = "none: the next start rebuilds it from slabs (seconds per million blocks)"
            yield Finding("catalogue", "warn", "lost", remedy)
        return
    size = format_bytes(path.stat().st_size)
    if running:
        yield Finding("catalogue", "ok", f"{size}, in use; it was checked at the start")
        return
    found = check_file(path)
    if isinstance(found, Damage):
        remedy = "none: the next start sets it aside under a dated name and rebuilds it from slabs"
        yield Finding("catalogue", "warn", f"{size}, damaged: {found}", remedy)
    else:
        yield Finding("catalogue", "ok", f"{size}, sound")


def _namespaces(directory: Path) -> Iterator[Finding]:
    path = directory / "namespaces"
    if not path.exists():
        if any((directory / "slabs").glob("*.slab")):
            remedy = "none: slabs list the namespaces of their blocks, with their epochs"
            yield Finding("namespaces", "warn", "the file of namespaces is lost", remedy)
        return
    try:
        yield Finding("namespaces", "ok", f"{len(read_book(path.read_bytes()))} known")
    except ValueError as error:
        remedy = "none: the next start sets it aside; slabs list their namespaces and epochs, too"
        yield Finding("namespaces", "warn", f"damaged ({error})", remedy)


def _set_aside(directory: Path) -> Iterator[Finding]:
    for path in sorted(directory.glob("*.damaged-*")):
        name, _, stamp = path.name.partition(".damaged-")
        size = directory_bytes(path) if path.is_dir() else path.stat().st_size
        yield Finding(
            "set aside", "warn",
            f"{path.name}: the {name} was damaged at {_stamp(stamp)} and rebuilt from slabs; "
            f"{format_bytes(size)} kept as evidence",
            f"look at the device (smartctl); if nobody examines it: rm -r {path}",
        )  # fmt: skip
    for path in sorted((directory / SET_ASIDE).glob("v*")):
        version = path.name.removeprefix("v").partition("-")[0]
        yield Finding(
            "set aside", "warn",
            f"state of version {version}, {format_bytes(directory_bytes(path))}",
            f"it comes back when a kvtier of version {version} starts; if none will: rm -r {path}",
        )  # fmt: skip


def _slabs(config: Config, directory: Path, *, running: bool) -> Iterator[Finding]:
    ssd = config.tiers.ssd
    count = ssd.size_bytes // ssd.segment_bytes
    known = {f"{index:05}.slab": index for index in range(count)}
    paths = _list(directory / "slabs")
    strays = [path for path in paths if path.name not in known and path.suffix == ".slab"]
    others = [path for path in paths if path.suffix != ".slab"]
    heads = {path: read_head(path) for path in paths if path.name in known}
    state_ids = [head.state_id for head in heads.values() if head and head.slot_bytes]
    ours = _state_id(directory, state_ids)
    detail = f"{len(heads)} of {count} made, each {format_bytes(ssd.segment_bytes)}"
    yield Finding("slabs", "ok", detail)
    if strays:
        size = format_bytes(sum(path.stat().st_size for path in strays))
        why = "the tier was made larger live, or the configuration smaller"
        remedy = "they go at the next start; to keep them raise tiers.ssd.size_bytes"
        yield Finding("slabs", "warn", f"{_some(strays)} ({size}) beyond the size: {why}", remedy)
    if others:
        remedy = "not kvtier's: move them elsewhere"
        yield Finding("slabs", "warn", f"{_some(others)} among the slabs", remedy)
    odd = [path for path in heads if path.stat().st_size != ssd.segment_bytes]
    if odd and not running:
        remedy = "none: the next start brings them to the size; set tiers.ssd.segment_bytes to keep"
        yield Finding("slabs", "warn", f"{_some(odd)} not of the segments' size", remedy)
    for path, head in heads.items():
        yield from _head(path, path.stat().st_size, head, known[path.name], ours)


def _head(
    path: Path, size_bytes: int, head: SlabHead | None, index: int, ours: bytes
) -> Iterator[Finding]:
    if head is None:
        if size_bytes:
            remedy = "none: it counts as empty, and is used again; look at the device"
            yield Finding("slabs", "warn", f"{path.name} has no readable header", remedy)
    elif head.number != index:
        remedy = "give it its name back, or leave it: it counts as empty and is used again"
        yield Finding("slabs", "warn", f"{path.name} was slab {head.number}: moved?", remedy)
    elif head.slot_bytes and head.state_id != ours:
        remedy = "put it back where it belongs, or leave it: it counts as empty and is used again"
        yield Finding("slabs", "warn", f"{path.name} is of another state directory", remedy)


def _state_id(directory: Path, in_slabs: list[bytes]) -> bytes:
    path = directory / "identity"
    known = read_identity(path.read_bytes()) if path.exists() else None
    if known is not None:
        return known[0]
    return Counter(in_slabs).most_common(1)[0][0] if in_slabs else b""


def _space(config: Config, directory: Path) -> Iterator[Finding]:
    ssd = config.tiers.ssd
    free = file_system(directory).free_bytes
    made = len(list((directory / "slabs").glob("*.slab")))
    missing = max(0, ssd.size_bytes // ssd.segment_bytes - made) * ssd.segment_bytes
    detail = (
        f"{format_bytes(free)} free, {format_bytes(ssd.min_free_bytes)} stay unused "
        f"(tiers.ssd.min_free_bytes), {format_bytes(missing)} of slabs not made yet"
    )
    if free - missing < ssd.min_free_bytes:
        remedy = "free space, or kvtier resize ssd: no more slabs are made, DRAM keeps what waits"
        yield Finding("free space", "warn", detail, remedy)
    else:
        yield Finding("free space", "ok", detail)


def _scrub(config: Config, directory: Path) -> Iterator[Finding]:
    notes = read_notes(directory / "scrub")
    every_s = config.tiers.ssd.scrub_every_s
    if notes is None or not notes.ended_s:
        how = f"one begins by itself every {every_s / 86400:.1f} days" if every_s else "off"
        remedy = "" if every_s else "kvtier scrub now and then, or set tiers.ssd.scrub_every_s"
        yield Finding("scrub", "ok" if every_s else "warn", f"never yet ({how})", remedy)
        return
    detail = f"all was last read by {_when(int(notes.ended_s))}"
    if damaged := sum(notes.damaged.values()):
        remedy = "dropped, not served: check the disk (smartctl)"
        yield Finding("scrub", "warn", f"{detail}; {damaged} damaged copies", remedy)
    else:
        yield Finding("scrub", "ok", f"{detail}: nothing damaged")


def _list(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if _may(directory, os.R_OK | os.X_OK) else []


def _some(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:_LISTED_MAX])
    more = len(paths) - _LISTED_MAX
    return f"{names} and {more} more" if more > 0 else names


def _when(time_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _stamp(stamp: str) -> str:
    match = re.match(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z", stamp)
    return "{}-{}-{} {}:{}:{} UTC".format(*match.groups()) if match else stamp
