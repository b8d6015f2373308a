r"""GroupCommit: batches written side by side are made sure together: one sync, one transaction.

    writer A  [payload]----\
    writer B  [payload]-----+--> [fdatasync of all their slabs, one transaction] --> both answered
    writer C       [payload]----------------------------+--> the next group

The first to come leads its group. It waits while others are still writing their payload, at most
`wait_s` and only until the group holds `bytes_max`; a writer who is alone never waits. While one
group is made sure, the next one gathers.

Does not: write, sync or list by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

T = TypeVar("T")
WAIT_S: Final = 0.005
BYTES_MAX: Final = 128 * 1024 * 1024


class _Group(Generic[T]):
    def __init__(self) -> None:
        self.parts: list[T] = []
        self.size_bytes = 0
        self.done = False
        self.error: BaseException | None = None


class GroupCommit(Generic[T]):
    """`commit(parts)` is called in one of the writers' threads, one call at a time. Any thread.

    What it raises, all writers of that group raise; errors of single parts are in the parts.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[T]], None],
        *,
        wait_s: float = WAIT_S,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        self.wait_s = wait_s
        self.bytes_max = bytes_max
        self._commit = commit
        self._condition = threading.Condition()
        self._writing = 0
        self._committing = False
        self._gathering: _Group[T] | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of a payload: a group that gathers may wait for it."""
        with self._condition:
            self._writing += 1
        try:
            yield
        finally:
            with self._condition:
                self._writing -= 1
                self._condition.notify_all()

    def join(self, part: T, size_bytes: int) -> None:
        """Returns when the group that this part is in was committed, after at most `wait_s` and
        the commit before it. Raises what `commit` raised.
        """
        with self._condition:
            group = self._gathering
            if group is None or group.size_bytes >= self.bytes_max:
                group = self._gathering = _Group()
                leads = True
            else:
                leads = False
            group.parts.append(part)
            group.size_bytes += size_bytes
            self._condition.notify_all()
            if leads:
                self._gather(group)
            else:
                while not group.done:
                    self._condition.wait()
        if leads:
            self._lead(group)
        if group.error is not None:
            raise group.error

    def _gather(self, group: _Group[T]) -> None:
        """Returns when it is this group's turn, and nobody is worth waiting for. Hold the lock."""
        until_s = time.monotonic() + self.wait_s
        while True:
            left_s = until_s - time.monotonic()
            if self._committing:
                self._condition.wait()
            elif self._writing and group.size_bytes < self.bytes_max and left_s > 0:
                self._condition.wait(left_s)
            else:
                break
        self._committing = True
        if self._gathering is group:
            self._gathering = None

    def _lead(self, group: _Group[T]) -> None:
        try:
            self._commit(group.parts)
        except BaseException as error:
            group.error = error  # a bug, too, is everybody's: nobody may take these for done
            raise
        finally:
            with self._condition:
                self._committing = False
                group.done = True
                self._condition.notify_all()

    def __repr__(self) -> str:
        gathering = len(self._gathering.parts) if self._gathering else 0
        return f"<GroupCommit {self._writing} writing, {gathering} gathered>"
