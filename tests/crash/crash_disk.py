"""What a power cut may leave of recorded writes: a model of a disk with a volatile cache.

Contents: a write is durable once its file was synced; before, any subset of the 512-byte sectors
written may be there. Names: what was created, renamed or removed is durable, in order, once the
directory was synced; before, any number of the first of them may have happened.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from crash_recording import Event

SECTOR_BYTES = 512
_ALL_SUBSETS_MAX = 4
_RANDOM_SUBSETS = 10
_TORN = 4

Image = dict[str, bytes]


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            _apply(self.durable, change)
        self.pending.clear()


class Disk:
    """Files by number, names apart: a rename moves a name, not bytes."""

    def __init__(self) -> None:
        self.files: dict[int, _File] = {}
        self.durable_names: dict[str, int] = {}
        self.names: dict[str, int] = {}
        self.name_changes: list[tuple[str, str, str, int]] = []

    def take(self, event: Event) -> None:
        """The next call was made."""
        if event.kind == "create":
            if event.path not in self.names:
                number = len(self.files)
                self.files[number] = _File()
                self._rename("create", event.path, "", number)
        elif event.kind == "rename":
            self._rename("rename", event.path, event.target, self.names.get(event.path, -1))
        elif event.kind == "unlink":
            self._rename("unlink", event.path, "", -1)
        elif event.kind == "sync_directory":
            kept = []
            for change in self.name_changes:
                here = change[1].rpartition("/")[0] == event.path
                _name(self.durable_names, change) if here else kept.append(change)
            self.name_changes = kept
        elif event.kind == "sync":
            self.files[self.names[event.path]].sync()
        elif event.kind in ("write", "size", "grow"):
            change = (event.kind, event.offset, event.content)
            self.files[self.names[event.path]].pending.append(change)

    def _rename(self, kind: str, path: str, target: str, number: int) -> None:
        change = (kind, path, target, number)
        self.name_changes.append(change)
        _name(self.names, change)

    def images(self, rng: random.Random) -> Iterator[Image]:
        """Everything, nothing, and a choice of what lies between; the same one may come twice."""
        pending = [(n, i) for n, file in self.files.items() for i in range(len(file.pending))]
        choices: list[tuple[bool, ...]]
        if len(pending) <= _ALL_SUBSETS_MAX:
            choices = list(product((False, True), repeat=len(pending)))
        else:
            choices = [tuple([kept] * len(pending)) for kept in (False, True)]
            choices += [tuple(rng.random() < 0.5 for _ in pending) for _ in range(_RANDOM_SUBSETS)]
        for chosen in choices:
            kept = {place for place, is_kept in zip(pending, chosen, strict=True) if is_kept}
            yield self._image(rng, kept, torn=False)
        if pending:
            for _ in range(_TORN):
                kept = {place for place in pending if rng.random() < 0.7}
                yield self._image(rng, kept, torn=True)

    def _image(self, rng: random.Random, kept: set[tuple[int, int]], *, torn: bool) -> Image:
        names = dict(self.durable_names)
        happened = rng.randint(0, len(self.name_changes))
        for change in self.name_changes[:happened]:
            _name(names, change)
        image = {}
        for path, number in names.items():
            file = self.files[number]
            content = bytearray(file.durable)
            for index, change in enumerate(file.pending):
                if (number, index) not in kept:
                    continue
                if torn and change[0] == "write" and rng.random() < 0.5:
                    _tear(rng, content, change)
                else:
                    _apply(content, change)
            image[path] = bytes(content)
        return image


def _name(names: dict[str, int], change: tuple[str, str, str, int]) -> None:
    kind, path, target, number = change
    if kind == "create":
        names[path] = number
    else:
        found = names.pop(path, -1)
        if kind == "rename" and max(found, number) >= 0:
            names[target] = number if number >= 0 else found


def _apply(content: bytearray, change: tuple[str, int, bytes]) -> None:
    kind, offset, data = change
    if kind == "write":
        if len(content) < offset + len(data):
            content.extend(bytes(offset + len(data) - len(content)))
        content[offset : offset + len(data)] = data
    elif kind == "size":
        del content[offset:]
        content.extend(bytes(offset - len(content)))
    else:
        content.extend(bytes(max(0, offset - len(content))))


def _tear(rng: random.Random, content: bytearray, change: tuple[str, int, bytes]) -> None:
    """Some of the write's sectors are there, the others as before; a sector is never half."""
    _, offset, data = change
    end = offset + len(data)
    at = offset
    while at < end:
        stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        if rng.random() < 0.5:
            _apply(content, ("write", at, data[at - offset : stop - offset]))
        at = stop
