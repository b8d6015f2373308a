"""AsyncClient: kvtier for asyncio (and uvloop). The same verbs as `blocking.py`, awaited.

Does not: say what a verb sends or means; that is in `calls.py`, `lease.py` and `reservation.py`.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

from kvtier import wire
from kvtier.block import CommitResult, Event, NamespaceSpec
from kvtier.client import calls
from kvtier.client.calls import GroupsFound, LeasedFound
from kvtier.client.held import AsyncLease, AsyncReservation
from kvtier.client.keys import KeysLike
from kvtier.client.lease import background
from kvtier.client.link import SpaceState
from kvtier.client.reservation import ReservedBlock
from kvtier.client.session import Session
from kvtier.client.space import ClientBase, Identity, SpaceBase, asyncio_channel
from kvtier.client.steps import Flow, call_error, call_failures, drive_async

T = TypeVar("T", bound="AsyncLease | AsyncReservation")


class Opening(Generic[T]):
    """A lease or reservation to be: `await` it, or enter it with `async with`."""

    __slots__ = ("_flow", "_made")

    def __init__(self, flow: Flow[T]) -> None:
        self._flow = flow
        self._made: T | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return drive_async(self._flow).__await__()

    async def __aenter__(self) -> T:
        self._made = await self
        await self._made.__aenter__()
        return self._made

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._made is not None
        await self._made.__aexit__(kind, error, trace)


class AsyncClient(ClientBase):
    """The asyncio client: as `blocking.Client`, for one event loop.

    Cancelling a verb is safe: what the daemon may have granted by then is given back in the
    background. Making one does not connect, and needs no running loop.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        deadline_s: float = 0.05,
        timeout_s: float = 10.0,
        group: str = "",
        client_name: str = "",
        writes: bool = True,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        super().__init__(
            address,
            partial(_open_channel, weakref.ref(self)),
            partial(_run_background, weakref.ref(self)),
            deadline_s=deadline_s,
            timeout_s=timeout_s,
            group=group,
            client_name=client_name,
            writes=writes,
        )

    def space(
        self, *, prefill_tokens_per_s: float = 0.0, **identity: Unpack[Identity]
    ) -> AsyncSpace:
        """As `Client.space`: opened by its first use."""
        return AsyncSpace(self, SpaceState(NamespaceSpec(**identity), prefill_tokens_per_s))

    async def open_namespace(
        self, *, prefill_tokens_per_s: float = 0.0, **identity: Unpack[Identity]
    ) -> AsyncSpace:
        """As `Client.open_namespace`."""
        space = self.space(prefill_tokens_per_s=prefill_tokens_per_s, **identity)
        await drive_async(self.linker.open(space.state, calls.until_of(self.linker, None)))
        return space

    async def lookup_groups(
        self,
        groups: Sequence[tuple[AsyncSpace, KeysLike]],
        *,
        lease: bool = False,
        prefetch: bool = False,
        touch: bool = False,
        skip_read: bool = False,
        shard: int = 0,
        deadline_s: float | None = None,
    ) -> GroupsFound[AsyncLease]:
        """As `Client.lookup_groups`."""
        return await drive_async(
            calls.lookup(
                self.linker, [(space.state, keys) for space, keys in groups],
                partial(AsyncLease, self), lease=lease, prefetch=prefetch, touch=touch,
                skip_read=skip_read, shard=shard, deadline_s=deadline_s,
            )
        )  # fmt: skip

    async def close(self) -> None:
        """As `Client.close`."""
        link = self.linker.close()
        for task in list(self._tasks):
            task.cancel()
        if link is not None:
            await link.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if "linker" in self.__dict__:
            self.linker.close()

    def _work(self, session: Session) -> None:
        """In the loop: starts what finalizers and lost answers left to do."""
        link = self.linker.current()
        if link is not None and link.session is session:
            for flow in background(link, session):
                task = asyncio.ensure_future(drive_async(flow))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)


class AsyncSpace(SpaceBase):
    """A namespace of an asyncio client; verbs, arguments and errors as in `blocking.Space`."""

    _client: AsyncClient

    async def lookup(
        self,
        keys: KeysLike,
        *,
        lease: bool = False,
        prefetch: bool = False,
        touch: bool = False,
        skip_read: bool = False,
        shard: int = 0,
        deadline_s: float | None = None,
    ) -> LeasedFound[AsyncLease]:
        """As `Space.lookup`."""
        found = await self._client.lookup_groups(
            [(self, keys)], lease=lease, prefetch=prefetch, touch=touch,
            skip_read=skip_read, shard=shard, deadline_s=deadline_s,
        )  # fmt: skip
        return found.groups[0]

    def lease(
        self, keys: KeysLike, *, shard: int = 0, timeout_s: float | None = None
    ) -> Opening[AsyncLease]:
        """As `Space.lease`: `async with space.lease(keys) as lease` or `await` it."""
        return Opening(self._lease_flow(keys, 0, shard, timeout_s))

    def join_lease(
        self, lease_id: int, *, shard: int = 0, timeout_s: float | None = None
    ) -> Opening[AsyncLease]:
        """As `Space.join_lease`."""
        return Opening(self._lease_flow(None, lease_id, shard, timeout_s))

    def _lease_flow(
        self, keys: KeysLike | None, lease_id: int, shard: int, timeout_s: float | None
    ) -> Flow[AsyncLease]:
        linker, make = self._client.linker, partial(AsyncLease, self._client)
        return calls.lease(
            linker, self.state, keys, lease_id, make, shard=shard, timeout_s=timeout_s
        )

    def reserve(
        self,
        keys: KeysLike,
        parent: bytes | None = None,
        *,
        position: int = 0,
        shard: int = 0,
        skip_save: bool = False,
        timeout_s: float | None = None,
    ) -> Opening[AsyncReservation]:
        """As `Space.reserve`: `async with space.reserve(keys) as reservation` or `await` it."""
        return Opening(
            calls.reserve(
                self._client.linker, self.state, keys, partial(AsyncReservation, self._client),
                parent=parent, position=position, shard=shard, skip_save=skip_save,
                timeout_s=timeout_s,
            )
        )  # fmt: skip

    async def store(
        self,
        keys: KeysLike,
        fill: Callable[[ReservedBlock], object],
        parent: bytes | None = None,
        *,
        position: int = 0,
        shard: int = 0,
        durable: bool = False,
        timeout_s: float | None = None,
    ) -> CommitResult:
        """As `Space.store`; `fill` runs on the loop."""
        return await drive_async(
            calls.store(
                self._client.linker, self.state, keys, fill,
                partial(AsyncReservation, self._client), parent=parent, position=position,
                shard=shard, durable=durable, timeout_s=timeout_s,
            )
        )  # fmt: skip

    async def prefetch(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """As `Space.prefetch`."""
        return int((await self._tell("Prefetch", keys, timeout_s)).moving_count)

    async def evict(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """As `Space.evict`."""
        return int((await self._tell("Evict", keys, timeout_s)).evicted_count)

    async def pin(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """As `Space.pin`."""
        return int((await self._tell("Pin", keys, timeout_s)).pinned_count)

    async def unpin(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """As `Space.unpin`."""
        return int((await self._tell("Unpin", keys, timeout_s)).unpinned_count)

    async def clear(self, *, timeout_s: float | None = None) -> int:
        """As `Space.clear`."""
        return await drive_async(calls.clear(self._client.linker, self.state, timeout_s))

    async def watch(self, from_revision: int = 0) -> AsyncIterator[Event]:
        """As `Space.watch`; the call begins with the first event asked for."""
        method, request, namespace_id = await drive_async(
            calls.watch(self._client.linker, self.state, from_revision)
        )
        stream = method(request)
        try:
            async for message in stream:
                yield wire.decode_event(message, namespace_id)
        except call_failures() as error:
            raise call_error(error) from error
        finally:
            stream.cancel()

    async def _tell(self, method: str, keys: KeysLike, timeout_s: float | None) -> Any:
        flow = calls.chain_call(self._client.linker, method, self.state, keys, timeout_s)
        return await drive_async(flow)


def _open_channel(reference: weakref.ref[AsyncClient], target: str) -> tuple[Any, Any]:
    client = reference()
    if client is not None:
        client._loop = asyncio.get_running_loop()  # noqa: SLF001 - half of the class
    return asyncio_channel(target)


def _run_background(reference: weakref.ref[AsyncClient], session: Session) -> None:
    """In the session's thread: hands what is left to do to the loop."""
    client = reference()
    loop = None if client is None else client._loop  # noqa: SLF001 - half of the class
    if client is None or loop is None:
        return
    try:
        loop.call_soon_threadsafe(client._work, session)  # noqa: SLF001
    except RuntimeError:  # the loop is closed: nobody else can release; the session's end does
        session.close()
