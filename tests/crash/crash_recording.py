"""What a traced process did to the files under a directory, as strace tells it, in order.

Not recorded: reads, `lock.mdb` (made anew at each start), writes by a mapping (LMDB makes none).
The process must touch these files from one thread at a time.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CALLS = (
    "openat,lseek,pwrite64,pwritev,pwritev2,write,writev,fdatasync,fsync,ftruncate,fallocate,rename,renameat,"
    "renameat2,unlink,unlinkat,mkdir"
)
_LINE = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)")
_FD = re.compile(r"^(\d+)<([^>]*)>(\(deleted\))?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True)
class Event:
    """One call: `kind` is write, sync, sync_directory, size, create, rename, unlink or mark."""

    kind: str
    path: str = ""
    offset: int = 0
    content: bytes = b""
    target: str = ""
    mark: dict[str, Any] = field(default_factory=dict)


def record(directory: Path, marks: Path, seed: int, steps: int, plant: str = "") -> list[Event]:
    """Runs the workload under strace; paths are relative to `directory`. Raises on its failure."""
    trace = marks.with_suffix(".strace")
    command = [
        "strace", "-y", "-xx", "-s", "1000000", "-e", "abbrev=none",
        "-e", f"trace={CALLS}", "-o", str(trace),
        sys.executable, str(Path(__file__).with_name("crash_workload.py")),
        str(directory), str(marks), str(seed), str(steps),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "KVTIER_CRASH_PLANT": plant}, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise AssertionError(f"the workload failed: {done.stderr.decode()[-4000:]}")
    events = parse(trace.read_text("ascii"), directory, marks)
    assert events, "nothing was recorded"
    assert events[-1].mark == {"kind": "end"}, "the recording is not whole"
    return events


def parse(trace: str, directory: Path, marks: Path) -> list[Event]:
    """The events in a trace; where LMDB seeks first (`lseek`, `writev`), at that place."""
    events: list[Event] = []
    position = 0
    for line in trace.splitlines():
        match = _LINE.match(line)
        if match is None or match[3] == "-1":
            continue
        if match[1] == "lseek":
            position = int(match[3])
            continue
        for event in _events(match[1], match[2], str(directory), str(marks)):
            at = position if match[1] == "writev" else event.offset
            events.append(replace(event, offset=at))
            position += len(event.content)
    return events


def _events(call: str, arguments: str, root: str, marks: str) -> list[Event]:
    texts = [_bytes(text) for text in _TEXT.findall(arguments)]
    if call in ("rename", "renameat", "renameat2"):
        names = [_inside(text.decode(), root) for text in texts]
        return [Event("rename", names[0], target=names[1])] if all(names) else []
    if call in ("unlink", "unlinkat"):
        name = _inside(texts[0].decode(), root)
        return [Event("unlink", name)] if name and "AT_REMOVEDIR" not in arguments else []
    if call == "mkdir":
        return []
    if call == "openat":
        name = _inside(texts[0].decode(), root)
        if not name or "O_CREAT" not in arguments:
            return []
        made = [Event("create", name)]
        return [*made, Event("size", name, 0)] if "O_TRUNC" in arguments else made
    fd = _FD.match(arguments)
    if fd is None or fd[3]:  # what has no name any longer is not on any image
        return []
    path = _decoded(fd[2])
    if path == marks:
        return [Event("mark", mark=json.loads(texts[0]))]
    name = _inside(path, root)
    if not name and path != root:
        return []
    if call in ("fdatasync", "fsync"):
        directory = path == root or os.path.isdir(path)  # noqa: PTH112 - strings throughout
        return [Event("sync_directory" if directory else "sync", name)]
    numbers = [int(part) for part in re.findall(r"(?<=, )\d+(?=,|$)", arguments)]
    if call == "ftruncate":
        return [Event("size", name, numbers[-1])]
    if call == "fallocate":
        return [Event("grow", name, sum(numbers[-2:]))]
    if call == "writev":
        return [Event("write", name, 0, b"".join(texts))]
    offset = numbers[-2] if call == "pwritev2" else numbers[-1]  # its last argument is flags
    return [Event("write", name, offset, b"".join(texts))]


def _inside(path: str, root: str) -> str:
    name = path.removeprefix(root + "/")
    return "" if name == path or name.endswith("lock.mdb") else name


def _decoded(text: str) -> str:
    return _bytes(text).decode() if text.startswith("\\x") else text


def _bytes(text: str) -> bytes:
    value: bytes = (
        ast.literal_eval(f'b"{text}"') if len(text) < 64 else bytes.fromhex(text.replace("\\x", ""))
    )
    return value
