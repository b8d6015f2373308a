"""Shared: one run of something slow serves all who asked before it began.

Does not: retry, or share with those who come while it runs (they need the next one).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvtier.errors import KvTierError, TierFailed


class Shared:
    """`run()` returns after a whole run of `work` that began after the call. Any thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._condition = threading.Condition()
        self._begun = 0
        self._done = 0
        self._error: tuple[int, KvTierError] | None = None  # of which run

    def run(self) -> None:
        """Raises what `work` raised in the run that this caller waited for, or in a later one."""
        with self._condition:
            wanted = self._begun + 1
            while self._done < wanted:
                if self._begun > self._done:
                    self._condition.wait()
                    continue
                self._begun += 1
                self._alone()
            if self._error is not None and self._error[0] >= wanted:
                raise self._error[1]

    def _alone(self) -> None:
        """Runs the work with the condition let go. One thread at a time gets here."""
        # Whoever waits is told of a failure, also of one that is a bug and ends this thread.
        error: KvTierError | None = TierFailed("the run that was waited for broke")
        self._condition.release()
        try:
            self._work()
            error = None
        except KvTierError as failure:
            error = failure
        finally:
            self._condition.acquire()
            self._done = self._begun
            if error is not None:
                self._error = (self._begun, error)
            self._condition.notify_all()
