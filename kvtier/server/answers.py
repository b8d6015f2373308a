r"""Answers: what a session was answered, by request id, so that a repeated call changes nothing.

    first call --running--> answered --(many later calls)--> forgotten
        \--- failed, or given up by its last caller ---> as if it had never been asked

A call that repeats one that still runs waits for the same answer.

Does not: look into requests or answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from kvtier.errors import InvalidRequest, KvTierError
from kvtier.units import MIB
from kvtier.wire import REQUEST_ID_BYTES_MAX

log = logging.getLogger("kvtier.rpc")

ANSWERS_BYTES_MAX = 8 * MIB  # of one session; slot tables of large leases are the large ones
Work = Callable[[], Coroutine[Any, Any, bytes]]


class _Flight:
    """A call that runs, and how many wait for it."""

    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[bytes]) -> None:
        self.task = task
        self.waiters = 0


class Answers:
    """Of one session. Event loop only. `fatal` as in Border: a flight may have no caller left."""

    def __init__(
        self, count_max: Callable[[], int], fatal: Callable[[BaseException], object]
    ) -> None:
        self._count_max = count_max
        self._fatal = fatal
        self._answered: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes = 0
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._nameless = 0

    def find(self, method: str, request_id: str) -> bytes | None:
        """The answer given before. Raises InvalidRequest when the id is too long."""
        if not request_id:
            return None
        if len(request_id) > REQUEST_ID_BYTES_MAX:
            raise InvalidRequest(f"request_id is longer than {REQUEST_ID_BYTES_MAX} bytes")
        answer = self._answered.get((method, request_id))
        if answer is not None:
            self._answered.move_to_end((method, request_id))
        return answer

    def keep(self, method: str, request_id: str, answer: bytes) -> bytes:
        """Remembers an answer under a (new) id, if there is one; returns it."""
        if request_id:
            self._answered[method, request_id] = answer
            self._bytes += len(answer)
            while len(self._answered) > self._count_max() or self._bytes > ANSWERS_BYTES_MAX:
                self._bytes -= len(self._answered.popitem(last=False)[1])
        return answer

    async def once(self, method: str, request_id: str, work: Work, *, abandon: bool) -> bytes:
        """The answer of `work`, run once per id.

        When every caller has gone before the end, the work is cancelled with `abandon` (it gave
        somebody something that nobody would know of), else finished and its answer kept.
        """
        answer = self.find(method, request_id)
        if answer is not None:
            return answer
        if not request_id:
            if abandon:
                return await work()
            self._nameless += 1
        key = (method, request_id or f"#{self._nameless}")
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.create_task(work(), name=f"kvtier-{method}"))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda task: self._landed(key, flight, task))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if abandon and not flight.waiters and not flight.task.done():
                del self._flights[key]
                flight.task.cancel()

    def _landed(self, key: tuple[str, str], flight: _Flight, task: asyncio.Task[bytes]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.keep(key[0], "" if key[1].startswith("#") else key[1], task.result())
        elif isinstance(error, AssertionError):
            self._fatal(error)
        elif not flight.waiters and not isinstance(error, KvTierError):
            log.error("rpc.bug method=%s", key[0], exc_info=error)

    def clear(self) -> None:
        """The session ended: nothing is remembered; what runs ends by itself."""
        self._answered.clear()
        self._bytes = 0
