"""FailingFiles: the file layer under a store, of which the Nth call of a kind goes wrong.

    errno    it fails with this and does nothing
    short    a write stops half-way, a read brings half: as a full or failing device does it
    slow     it waits until the store has answered something meanwhile (`until_answered`)

`FailingEnvironment` does the same to LMDB's commits, which make system calls of their own.

Does not: lie. What it says was done was done.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from kvtier.tiers.files import Files

# What can go wrong with each operation.
ERRORS = {
    "write": ("EIO", "ENOSPC", "EDQUOT", "short", "slow"),
    "write_slot": ("EIO", "ENOSPC", "EDQUOT", "short", "slow"),
    "sync": ("EIO", "ENOSPC", "slow"),
    "sync_directory": ("EIO",),
    "open": ("EIO", "EMFILE"),
    "allocate": ("EIO", "ENOSPC", "EDQUOT", "slow"),
    "rename": ("EIO", "ENOSPC"),
    "unlink": ("EIO",),
    "read": ("EIO", "short"),
    "read_slot": ("EIO", "short", "slow"),
    "commit": ("EIO", "ENOSPC", "slow"),
    "sync_catalogue": ("EIO", "slow"),
}
SLOW_S = 10.0


@dataclass
class Plan:
    """The `nth` call from now on (with `for_ever` all from there on) of this operation."""

    operation: str
    how: str
    nth: int
    for_ever: bool


class FailingFiles(Files):
    """As the operating system's, but for what is planned. Any thread."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.struck = 0
        self.struck_ever = False
        #: Slow calls, each until its event is set. None: nobody would answer, they do not wait.
        self.waiting: list[threading.Event] | None = None
        #: A slow call ended by itself: nothing was answered meanwhile.
        self.was_stuck = False
        self._seen = 0
        self._lock = threading.Lock()

    def arm(self, plan: Plan | None) -> None:
        with self._lock:
            self.plan, self._seen, self.struck = plan, 0, 0
            self.struck_ever = self.struck_ever and plan is None

    def strikes(self, operation: str) -> str:
        """How this call goes wrong, or "". A slow one has waited when this returns."""
        with self._lock:
            plan = self.plan
            if plan is None or plan.operation != operation:
                return ""
            self._seen += 1
            if self._seen < plan.nth or (self._seen > plan.nth and not plan.for_ever):
                return ""
            self.struck += 1
            self.struck_ever = True
            how = plan.how
            if how != "slow":
                return how
            # A disk that is slow for ever is slow often enough to be seen.
            if self.waiting is None or self.struck > 5:
                return ""
            answered = threading.Event()
            self.waiting.append(answered)
        if not answered.wait(SLOW_S):
            self.was_stuck = True
        return ""

    def fail(self, operation: str) -> str:
        """Raises what is planned for this call; "short" is the caller's to do."""
        how = self.strikes(operation)
        if how and how != "short":
            number = getattr(errno, how)
            raise OSError(number, os.strerror(number))
        return how

    # --- the calls

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        self.fail("open")
        return super().open(path, flags, mode)

    def allocate(self, fd: int, size_bytes: int) -> None:
        self.fail("allocate")
        super().allocate(fd, size_bytes)

    def write(self, fd: int, content: memoryview, offset: int) -> None:
        if self.fail("write"):
            os.pwritev(fd, [content[: len(content) // 2 // 4096 * 4096]], offset)
            raise OSError(errno.EIO, "short write")
        super().write(fd, content, offset)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        if self.fail("read"):
            half = len(into) // 2 // 4096 * 4096
            return super().read(fd, into[:half], offset)
        return super().read(fd, into, offset)

    def sync(self, fd: int) -> None:
        self.fail("sync")
        super().sync(fd)

    def sync_directory(self, directory: Path) -> None:
        self.fail("sync_directory")
        super().sync_directory(directory)

    def rename(self, source: Path, target: Path) -> None:
        self.fail("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.fail("unlink")
        super().unlink(path)

    def write_slots(
        self,
        fds: Sequence[int],
        offsets: Sequence[int],
        headers: Sequence[int],
        payloads: Sequence[int],
        sizes: Sequence[int],
    ) -> list[int]:
        bad = {index: self.strikes("write_slot") for index in range(len(fds))}
        # A short one: its header and half of its payload are on the disk.
        kept = [index for index, how in bad.items() if how in ("", "short")]
        sizes_kept = [
            sizes[index] // 2 // 4096 * 4096 if bad[index] == "short" else sizes[index]
            for index in kept
        ]
        done = super().write_slots(
            [fds[i] for i in kept], [offsets[i] for i in kept], [headers[i] for i in kept],
            [payloads[i] for i in kept], sizes_kept,
        )  # fmt: skip
        errors = [0] * len(fds)
        for index, error in zip(kept, done, strict=True):
            errors[index] = error
        for index, how in bad.items():
            if how:
                errors[index] = errno.EIO if how == "short" else getattr(errno, how)
        return errors

    def read_slots(
        self,
        fds: Sequence[int],
        offsets: Sequence[int],
        headers: Sequence[int],
        payloads: Sequence[int],
        sizes: Sequence[int],
        used: Sequence[int],
    ) -> tuple[list[int], list[int]]:
        checksums, errors = super().read_slots(fds, offsets, headers, payloads, sizes, used)
        for index in range(len(fds)):
            how = self.strikes("read_slot")
            if how:
                errors[index] = errno.EIO if how == "short" else getattr(errno, how)
        return checksums, errors


class FailingEnvironment:
    """An LMDB environment whose write transactions may fail at their commit."""

    def __init__(self, environment: Any, files: FailingFiles) -> None:
        self._environment, self._files = environment, files

    def begin(self, *arguments: Any, **options: Any) -> Any:
        transaction = self._environment.begin(*arguments, **options)
        return _Committing(transaction, self._files) if options.get("write") else transaction

    def sync(self, *arguments: Any) -> None:
        how = self._files.strikes("sync_catalogue")
        if how:
            raise lmdb.Error(f"mdb_env_sync: {os.strerror(getattr(errno, how))}")
        self._environment.sync(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)


class _Committing(AbstractContextManager[Any]):
    """What `begin` gives: commits at the end, or fails as LMDB does when a write fails."""

    def __init__(self, transaction: Any, files: FailingFiles) -> None:
        self._transaction, self._files = transaction, files

    def __enter__(self) -> Any:
        self._transaction.__enter__()
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction, name)

    def commit(self) -> None:
        self._strike()
        self._transaction.commit()

    def _strike(self) -> None:
        how = self._files.strikes("commit")
        if how:
            self._transaction.abort()
            raise lmdb.Error(f"mdb_txn_commit: {os.strerror(getattr(errno, how))}")

    def __exit__(self, kind: Any, value: Any, trace: Any) -> Any:
        if kind is None:
            self._strike()
        return self._transaction.__exit__(kind, value, trace)


@contextmanager
def failing_lmdb(files: FailingFiles) -> Iterator[None]:
    """Environments opened meanwhile are failing ones."""
    original = lmdb.open
    lmdb.open = lambda *a, **k: FailingEnvironment(original(*a, **k), files)
    try:
        yield
    finally:
        lmdb.open = original
