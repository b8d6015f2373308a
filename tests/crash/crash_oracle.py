"""What may and what must be there after a power cut at one point of a recorded life."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Block = tuple[int, int]  # space, name


@dataclass
class Oracle:
    """Fed with the marks up to the cut. `issued`: version -> its epoch, of every block."""

    issued: dict[Block, dict[int, int]] = field(default_factory=dict)
    written: dict[Block, int] = field(default_factory=dict)  # answered, not yet synced
    promised: dict[Block, int] = field(default_factory=dict)  # must be there
    forbidden: dict[Block, int] = field(default_factory=dict)  # up to this version: never again
    epochs: dict[int, int] = field(default_factory=dict)  # must be this one or later
    begun: dict[int, int] = field(default_factory=dict)  # may be this one
    purged: dict[int, int] = field(default_factory=dict)  # of older epochs no byte is left

    def take(self, mark: dict[str, Any]) -> None:
        getattr(self, f"_{mark['kind']}_{mark.get('act', '')}", lambda _: None)(mark)

    def _begin_write(self, mark: dict[str, Any]) -> None:
        for space, name, version, epoch in mark["blocks"]:
            self.issued.setdefault((space, name), {})[version] = epoch

    def _done_write(self, mark: dict[str, Any]) -> None:
        for space, name, version, _ in mark["blocks"]:
            self.written[space, name] = version

    def _done_sync(self, _: dict[str, Any]) -> None:
        self.promised.update(self.written)
        self.written.clear()

    _done_close = _done_sync

    def _release(self, mark: dict[str, Any]) -> None:
        """From here on nobody promises these blocks; whether they are gone is another matter."""
        for space, name, _ in mark["blocks"]:
            self.promised.pop((space, name), None)
            self.written.pop((space, name), None)

    _begin_evict = _begin_drop = _begin_recycle = _release

    def _gone(self, mark: dict[str, Any]) -> None:
        for space, name, version in mark["blocks"]:
            self.forbidden[space, name] = version

    _done_evict = _done_recycle = _gone

    def _begin_clear(self, mark: dict[str, Any]) -> None:
        space = mark["space"]
        self.begun[space] = mark["epoch"]
        for places in (self.promised, self.written):
            for place in [place for place in places if place[0] == space]:
                del places[place]

    def _done_clear(self, mark: dict[str, Any]) -> None:
        self.epochs[mark["space"]] = mark["epoch"]

    _done_register = _done_clear
    _begin_purge = _begin_clear

    def _done_purge(self, mark: dict[str, Any]) -> None:
        self._done_clear(mark)
        self.purged[mark["space"]] = mark["epoch"]

    # --- the judgement

    def remains(self, written: set[tuple[Block, int]]) -> list[str]:
        """`written`: versions of blocks of which some sector lies on the disk."""
        return [
            f"block {place} version {version} was purged, and some of it is still on the disk"
            for place, version in written
            if self.issued.get(place, {}).get(version, 0) < self.purged.get(place[0], 0)
        ]

    def problems(
        self, found: dict[Block, int], epochs: dict[int, int], *, names: bool
    ) -> list[str]:
        """`found`: version of every block that could be read, -1 where it is none we issued.
        `names`: the file of namespaces was there; without it slabs know those they hold.
        """
        said = []
        for space, least in self.epochs.items():
            most = self.begun.get(space, least)
            known = epochs.get(space, -1 if names else least)
            if not least <= known <= max(least, most):
                said.append(f"space {space} is in epoch {epochs.get(space)}, not {least} to {most}")
        for place, version in found.items():
            epoch = self.issued.get(place, {}).get(version)
            if epoch is None:
                said.append(f"block {place} has bytes nobody wrote")
            elif version <= self.forbidden.get(place, 0):
                said.append(f"block {place} version {version} was evicted for good and is back")
            elif epoch < self.epochs.get(place[0], 0):
                said.append(f"block {place} version {version} is of epoch {epoch}: cleared")
        for place, version in self.promised.items():
            if found.get(place, 0) != version:
                said.append(f"block {place} version {version} was durable; {found.get(place)}")
        return said
