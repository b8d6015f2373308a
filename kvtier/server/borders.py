"""Border: where exceptions of a handler become gRPC statuses, and calls are counted.

Every handler of every service is wrapped here, so that no other file turns or swallows one:
operating errors go to the caller with their reason, bugs are logged and answered as INTERNAL, and a
violated invariant stops the daemon: wrong bytes are worse than none.

Does not: know any request.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, Protocol

import grpc

from kvtier.errors import KvTierError
from kvtier.wire import abort_status

log = logging.getLogger("kvtier.rpc")


class Context(Protocol):
    """What handlers use of grpc.aio.ServicerContext, typed as it really is."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None when it set none."""
        ...

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, bytes], ...]
    ) -> NoReturn:
        """Ends the call with this status, by raising."""
        ...


Plain = Callable[[Any, Context], bytes]
Waiting = Callable[[Any, Context], Awaitable[bytes]]
Streaming = Callable[[Any, Context], AsyncIterator[bytes]]


class Border:
    """One for all services of a daemon. Event loop only.

    `fatal(error)` is called with an AssertionError (InvariantViolated is one) and is expected to
    end the process. `calls` and `failures` count since the start, by method and reason.
    """

    def __init__(self, fatal: Callable[[BaseException], object]) -> None:
        self.calls: Counter[str] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.fatal = fatal

    def plain(self, method: str, verb: Plain) -> Waiting:
        """A handler around a verb that does not wait."""
        calls = self.calls

        async def call(request: Any, context: Context) -> bytes:
            calls[method] += 1
            try:
                return verb(request, context)
            except Exception as error:  # noqa: BLE001 - the RPC border; all of it is in _fail
                await self._fail(method, error, context)

        return call

    def waiting(self, method: str, verb: Waiting) -> Waiting:
        """A handler around a coroutine function. Cancellation passes through."""

        async def call(request: Any, context: Context) -> bytes:
            self.calls[method] += 1
            try:
                return await verb(request, context)
            except Exception as error:  # noqa: BLE001 - the RPC border; all of it is in _fail
                await self._fail(method, error, context)

        return call

    def streaming(self, method: str, verb: Streaming) -> Streaming:
        """A handler around an async generator function. Cancellation passes through."""

        async def call(request: Any, context: Context) -> AsyncIterator[bytes]:
            self.calls[method] += 1
            try:
                async for message in verb(request, context):
                    yield message
            except Exception as error:  # noqa: BLE001 - the RPC border; all of it is in _fail
                await self._fail(method, error, context)

        return call

    async def _fail(self, method: str, error: Exception, context: Context) -> NoReturn:
        """Ends the call with the error's status, or the daemon with the error."""
        if isinstance(error, AssertionError):
            self.fatal(error)
        if isinstance(error, KvTierError):
            failure = error
        else:
            log.error("rpc.bug method=%s", method, exc_info=error)
            failure = KvTierError("a bug in the daemon; its log has the traceback")
        self.failures[method, failure.reason] += 1
        status = abort_status(failure)
        await context.abort(status.code, status.details, status.trailing_metadata)

    def __repr__(self) -> str:
        return f"<Border {self.calls.total()} calls, {self.failures.total()} failed>"


def unary(handler: Waiting, request: Any) -> Any:
    """The method handler of a call that takes `request` messages and answers bytes."""
    return grpc.unary_unary_rpc_method_handler(handler, request_deserializer=request.FromString)


def stream(handler: Streaming, request: Any) -> Any:
    """The method handler of a call that takes one `request` and answers bytes again and again."""
    return grpc.unary_stream_rpc_method_handler(handler, request_deserializer=request.FromString)
