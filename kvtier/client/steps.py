"""Flow and Step: what a verb does, written once for the blocking and the asyncio client.

A verb is a generator (`Flow`) that yields what must be waited for (`Step`) and is sent the
answer, or thrown the `KvTierError`. `drive` waits by blocking the thread, `drive_async` by
awaiting. A flow that is cancelled is closed: it may note what is left to do, not wait for it.

Does not: know any verb.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Generator
from typing import Any, Protocol, TypeVar

from kvtier import wire
from kvtier.errors import DaemonUnavailable, DeadlineExceeded, KvTierError

T = TypeVar("T")


class Step(Protocol):
    """Something to wait for. Raises only KvTierError (and cancellation)."""

    def block(self) -> Any: ...

    async def wait(self) -> Any: ...


Flow = Generator[Step, Any, T]


class Rpc:
    """One unary call, at most until `until_s` (monotonic seconds)."""

    __slots__ = ("_method", "_request", "_until_s")

    def __init__(self, method: Any, request: Any, until_s: float) -> None:
        self._method = method
        self._request = request
        self._until_s = until_s

    def block(self) -> Any:
        try:
            return self._method(self._request, timeout=self._timeout_s())
        except call_failures() as error:
            raise call_error(error) from error

    async def wait(self) -> Any:
        try:
            return await self._method(self._request, timeout=self._timeout_s())
        except call_failures() as error:
            raise call_error(error) from error

    def _timeout_s(self) -> float:
        return max(self._until_s - time.monotonic(), 0.0)


class Arrival:
    """The result of a thread's future, at most until `until_s`; the future itself goes on."""

    __slots__ = ("_future", "_until_s")

    def __init__(self, future: concurrent.futures.Future[Any], until_s: float) -> None:
        self._future = future
        self._until_s = until_s

    def block(self) -> Any:
        try:
            return self._future.result(max(self._until_s - time.monotonic(), 0.0))
        except TimeoutError:
            raise self._late() from None

    async def wait(self) -> Any:
        wrapped = asyncio.wrap_future(self._future)
        # Whoever stops waiting leaves nobody to look at the exception; asyncio would log that.
        wrapped.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({wrapped}, timeout=max(self._until_s - time.monotonic(), 0.0))
        if not wrapped.done():
            raise self._late()
        return wrapped.result()

    @staticmethod
    def _late() -> DeadlineExceeded:
        return DeadlineExceeded("the daemon did not answer the handshake in time; is it hung?")


def call_failures() -> tuple[type[BaseException], ...]:
    """What gRPC raises. Evaluated only when something was raised: no import before a call."""
    import grpc

    return (grpc.RpcError, grpc.aio.UsageError, ValueError)


def call_error(error: BaseException) -> KvTierError:
    """The error as ours. A ValueError is how gRPC says that the channel was closed meanwhile."""
    if isinstance(error, ValueError):
        return DaemonUnavailable(f"the connection was closed: {error}")
    return wire.error_from(error)


def drive(flow: Flow[T]) -> T:
    """Runs a flow in this thread, blocking it at every step."""
    try:
        step = next(flow)
        while True:
            try:
                answer = step.block()
            except KvTierError as error:
                step = flow.throw(error)
            else:
                step = flow.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()


async def drive_async(flow: Flow[T]) -> T:
    """Runs a flow in this task. Cancelling the task closes the flow."""
    try:
        step = next(flow)
        while True:
            try:
                answer = await step.wait()
            except KvTierError as error:
                step = flow.throw(error)
            else:
                step = flow.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()
