"""A kvtier without a daemon: blocks in a dict, behind the client library's verbs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvtier.block import BlockFormat, CommitResult, Found, NamespaceSpec, Reason, TierId, TierRun
from kvtier.errors import DaemonUnavailable, LeaseLost


@dataclass
class DictBlock:
    key: bytes
    view: memoryview


@dataclass
class DictReservation:
    space: DictSpace
    blocks: list[DictBlock]

    def commit(self) -> CommitResult:
        for block in self.blocks:
            self.space.stored.setdefault(block.key, bytearray(block.view))
        return CommitResult(len(self.blocks), 0, 0)


@dataclass
class DictLease:
    views: list[memoryview]
    lost: bool = False

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("taken back")


@dataclass
class DictSpace:
    format: BlockFormat
    stored: dict[bytes, bytearray] = field(default_factory=dict)
    tier: TierId = TierId.DRAM
    lose_leases: bool = False
    leased_at_most: int = 1 << 30
    leased_blocks: int = 0

    def lookup(self, keys: Sequence[bytes]) -> Found:
        count = 0
        while count < len(keys) and keys[count] in self.stored:
            count += 1
        reason = Reason.NONE if count == len(keys) else Reason.NEVER_STORED
        return Found(count, (TierRun(self.tier, count),) if count else (), reason=reason)

    @contextmanager
    def lease(self, keys: Sequence[bytes]) -> Iterator[DictLease]:
        keys = keys[: self.leased_at_most]
        self.leased_blocks += len(keys)
        yield DictLease([memoryview(self.stored[k]).toreadonly() for k in keys], self.lose_leases)

    @contextmanager
    def reserve(
        self, keys: Sequence[bytes], *, parent: bytes | None = None, position: int = 0
    ) -> Iterator[DictReservation]:
        size_bytes = self.format.shard_bytes
        absent = [key for key in keys if key not in self.stored]
        views = [memoryview(bytearray(size_bytes)) for _ in absent]
        blocks = [DictBlock(key, view) for key, view in zip(absent, views, strict=True)]
        yield DictReservation(self, blocks)


class DictClient:
    """Namespaces by their digest, as the daemon keeps them."""

    def __init__(self) -> None:
        self.spaces: dict[bytes, DictSpace] = {}
        self.specs: list[NamespaceSpec] = []

    def open_namespace(self, *, model: str, format: BlockFormat, **fields: str) -> DictSpace:  # noqa: A002
        spec = NamespaceSpec(model=model, format=format, **fields)
        self.specs.append(spec)
        return self.spaces.setdefault(spec.digest, DictSpace(format))

    @property
    def space(self) -> DictSpace:
        (space,) = self.spaces.values()
        return space


class BrokenSpace:
    """Every verb fails, each time."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise DaemonUnavailable(f"{name}: nobody there")

        return fail


class BrokenClient:
    """A client whose namespace opens and whose every verb then fails (or that fails at once)."""

    def __init__(self, *, opens: bool = True) -> None:
        self.opens = opens

    def open_namespace(self, **_: Any) -> BrokenSpace:
        if not self.opens:
            raise OSError("no such socket")
        return BrokenSpace()
