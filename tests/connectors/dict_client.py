"""A kvtier without a daemon: blocks in a dict, behind the client library's verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kvtier.block import BlockFormat, CommitResult, NamespaceSpec, Reason, TierId, TierRun
from kvtier.client.calls import LeasedFound
from kvtier.errors import DaemonUnavailable, LeaseLost


@dataclass
class DictBlock:
    """A block to fill."""

    key: bytes
    view: memoryview


@dataclass
class DictLease:
    """Views of blocks, which may have been taken back."""

    views: list[memoryview]
    lost: bool = False
    reason: Reason = Reason.NONE

    @property
    def block_count(self) -> int:
        return len(self.views)

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("taken back")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.check()


@dataclass
class DictSpace:
    """One namespace, and switches for what may go wrong in it."""

    format: BlockFormat
    stored: dict[bytes, bytearray] = field(default_factory=dict)
    tier: TierId = TierId.DRAM
    lose_leases: bool = False
    leased_at_most: int = 1 << 30
    leased_blocks: int = 0

    def lookup(
        self, keys: Sequence[bytes], *, lease: bool = False, deadline_s: float | None = None
    ) -> LeasedFound[DictLease]:
        count = 0
        while count < len(keys) and keys[count] in self.stored:
            count += 1
        if not count:
            return LeasedFound(0, reason=Reason.NEVER_STORED)
        reason = Reason.NONE if count == len(keys) else Reason.NEVER_STORED
        leased = keys[: min(count, self.leased_at_most)] if lease else []
        self.leased_blocks += len(leased)
        views = [memoryview(self.stored[key]).toreadonly() for key in leased]
        runs = (TierRun(self.tier, count),)
        return LeasedFound(count, runs, 0.0, reason, 0, DictLease(views, self.lose_leases))

    def store(self, keys: Sequence[bytes], fill: Callable[[Any], object]) -> CommitResult:
        absent = [key for key in keys if key not in self.stored]
        for key in absent:
            content = bytearray(self.format.shard_bytes)
            fill(DictBlock(key, memoryview(content)))
            self.stored[key] = content
        return CommitResult(len(absent), 0, 0)


class DictClient:
    """Namespaces by their digest, as the daemon keeps them."""

    def __init__(self) -> None:
        self.spaces: dict[bytes, DictSpace] = {}
        self.specs: list[NamespaceSpec] = []

    def space(
        self,
        *,
        model: str,
        format: BlockFormat,  # noqa: A002 - as the client calls it
        prefill_tokens_per_s: float,
        **fields: str,
    ) -> DictSpace:
        spec = NamespaceSpec(model=model, format=format, **fields)
        self.specs.append(spec)
        return self.spaces.setdefault(spec.digest, DictSpace(format))

    @property
    def only(self) -> DictSpace:
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

    def space(self, **_: Any) -> BrokenSpace:
        if not self.opens:
            raise OSError("no such socket")
        return BrokenSpace()
