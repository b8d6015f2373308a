"""Client: kvtier for code that blocks. The same verbs as `client.py`, driven in the calling thread.

Does not: say what a verb sends or means; that is in `calls.py`, `lease.py` and `reservation.py`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self, Unpack

from kvtier import wire
from kvtier.block import CommitResult, Event, NamespaceSpec
from kvtier.client import calls
from kvtier.client.calls import GroupsFound, LeasedFound
from kvtier.client.held import Lease, Reservation
from kvtier.client.keys import KeysLike
from kvtier.client.lease import background
from kvtier.client.link import SpaceState
from kvtier.client.reservation import ReservedBlock
from kvtier.client.session import Session
from kvtier.client.space import ClientBase, Identity, SpaceBase, blocking_channel
from kvtier.client.steps import Flow, call_error, call_failures, drive


class Client(ClientBase):
    """The blocking client. Any number of threads may share one; make a new one after a fork.

    Args:
        address: `unix:/path`, a path, or None for the default socket (KVTIER_SOCKET decides).
        deadline_s: seconds in which a lookup answers, with a miss if need be.
        timeout_s: seconds any other verb may take, waiting for room or promotion included.
        group: sessions of one tenant that name the same group may join each other's leases.
        client_name: for people, in `kvtier stat`; the program's name if not given.
        writes: False saves the daemon a write arena when this client only reads.

    Making one does not connect: the first call does, and after the daemon went away the next one
    does again (namespaces are opened again, too). Until then lookups miss and other verbs raise
    DaemonUnavailable. What was held is gone: `lease.check()` raises LeaseLost and
    `reservation.commit()` ReservationExpired.
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
        super().__init__(
            address,
            blocking_channel,
            partial(_run_background, weakref.ref(self)),
            deadline_s=deadline_s,
            timeout_s=timeout_s,
            group=group,
            client_name=client_name,
            writes=writes,
        )

    def space(self, *, prefill_tokens_per_s: float = 0.0, **identity: Unpack[Identity]) -> Space:
        """A namespace that is opened by its first use: does not need the daemon now.

        `prefill_tokens_per_s`: this engine's speed; loads slower than computing are not offered.
        """
        return Space(self, SpaceState(NamespaceSpec(**identity), prefill_tokens_per_s))

    def open_namespace(
        self, *, prefill_tokens_per_s: float = 0.0, **identity: Unpack[Identity]
    ) -> Space:
        """A namespace, opened now. Arguments: the fields of `NamespaceSpec` but the tenant.

        Raises:
            DaemonUnavailable, DeadlineExceeded, VersionMismatch, PermissionDenied, LimitReached.
        """
        space = self.space(prefill_tokens_per_s=prefill_tokens_per_s, **identity)
        drive(self.linker.open(space.state, calls.until_of(self.linker, None)))
        return space

    def lookup_groups(
        self,
        groups: Sequence[tuple[Space, KeysLike]],
        *,
        lease: bool = False,
        prefetch: bool = False,
        touch: bool = False,
        skip_read: bool = False,
        shard: int = 0,
        deadline_s: float | None = None,
    ) -> GroupsFound[Lease]:
        """As `Space.lookup`, for chains over the same tokens in several KV groups."""
        return drive(
            calls.lookup(
                self.linker, [(space.state, keys) for space, keys in groups],
                partial(Lease, self), lease=lease, prefetch=prefetch, touch=touch,
                skip_read=skip_read, shard=shard, deadline_s=deadline_s,
            )
        )  # fmt: skip

    def close(self) -> None:
        """Ends the session; the daemon takes back all that was held. Idempotent.

        While arrays made from views live, the session, and with it their leases, lives on.
        """
        link = self.linker.close()
        if link is not None:
            link.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "linker" in self.__dict__:
            self.close()


class Space(SpaceBase):
    """A namespace of a blocking client.

    `keys` of every verb: bytes of one length (16 to 64), first block to last, or `block.Keys`
    (which costs less when the same chain is used again). InvalidRequest, before any call: no
    keys, unequal lengths, one twice.
    """

    _client: Client

    def lookup(
        self,
        keys: KeysLike,
        *,
        lease: bool = False,
        prefetch: bool = False,
        touch: bool = False,
        skip_read: bool = False,
        shard: int = 0,
        deadline_s: float | None = None,
    ) -> LeasedFound[Lease]:
        """The longest restorable prefix of the chain, answered within `deadline_s`.

        `lease`: lease what is found in the same call (`.lease`, None if nothing was found; it may
        have to be waited for). `prefetch`: start promoting it. `touch`: count as a use.
        `skip_read`: this request must not read the cache: a miss.

        Raises:
            InvalidRequest: bad keys. KvTierError: in a forked child. Nothing else: with the
                daemon away, hung, late or refusing us the answer is a miss with its reason.
        """
        groups = self._client.lookup_groups(
            [(self, keys)], lease=lease, prefetch=prefetch, touch=touch,
            skip_read=skip_read, shard=shard, deadline_s=deadline_s,
        ).groups  # fmt: skip
        return groups[0]

    def lease(self, keys: KeysLike, *, shard: int = 0, timeout_s: float | None = None) -> Lease:
        """The right to read the chain's longest restorable prefix, promoted to mapped memory.

        At the deadline the lease holds the prefix that is readable. Nothing found is a lease of 0
        blocks, not an error.

        Raises:
            LimitReached, TierFull, DaemonUnavailable, DeadlineExceeded: nothing is leased.
        """
        return drive(self._lease_flow(keys, 0, shard, timeout_s))

    def join_lease(self, lease_id: int, *, shard: int = 0, timeout_s: float | None = None) -> Lease:
        """Reads the lease of another session of this client's group. The taker releases it.

        Raises:
            NotFound, PermissionDenied, LeaseLost, DaemonUnavailable, DeadlineExceeded.
        """
        return drive(self._lease_flow(None, lease_id, shard, timeout_s))

    def _lease_flow(
        self, keys: KeysLike | None, lease_id: int, shard: int, timeout_s: float | None
    ) -> Flow[Lease]:
        linker, make = self._client.linker, partial(Lease, self._client)
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
    ) -> Reservation:
        """Room to write the blocks that are not present yet; waits for room until the deadline.

        `parent`: key of the block before the first; `position`: index of the first block in its
        sequence. Look at `covered_count`: there may be room for a part only. `skip_save`: this
        request must not save; grants nothing.

        Raises:
            TierFull: no room for even one block. LimitReached, DaemonUnavailable,
                DeadlineExceeded. Nothing was reserved.
        """
        return drive(
            calls.reserve(
                self._client.linker, self.state, keys, partial(Reservation, self._client),
                parent=parent, position=position, shard=shard, skip_save=skip_save,
                timeout_s=timeout_s,
            )
        )  # fmt: skip

    def store(
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
        """Reserves, calls `fill(block)` for each missing block (it writes `block.view`), commits.

        Goes on, part by part, until every key is stored or was present. `timeout_s` is for all.

        Raises:
            As `reserve` and `commit`, and what `fill` raises: parts committed before are kept,
                the part at hand is aborted.
        """
        return drive(
            calls.store(
                self._client.linker, self.state, keys, fill, partial(Reservation, self._client),
                parent=parent, position=position, shard=shard, durable=durable,
                timeout_s=timeout_s,
            )
        )  # fmt: skip

    def prefetch(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """Starts bringing blocks up, without waiting; returns how many are on their way."""
        return int(self._tell("Prefetch", keys, timeout_s).moving_count)

    def evict(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """Forgets blocks and all their descendants, durably; returns how many."""
        return int(self._tell("Evict", keys, timeout_s).evicted_count)

    def pin(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """Keeps blocks from being forgotten until unpinned; returns how many were there."""
        return int(self._tell("Pin", keys, timeout_s).pinned_count)

    def unpin(self, keys: KeysLike, *, timeout_s: float | None = None) -> int:
        """Undoes one `pin` of the same blocks; returns how many."""
        return int(self._tell("Unpin", keys, timeout_s).unpinned_count)

    def clear(self, *, timeout_s: float | None = None) -> int:
        """Starts a new epoch: all stored before is dead, durably; returns how many blocks."""
        return drive(calls.clear(self._client.linker, self.state, timeout_s))

    def watch(self, from_revision: int = 0) -> Iterator[Event]:
        """Events from a revision on (0: from now), until the iterator is closed.

        Raises:
            DaemonUnavailable: it went away; call again with the last revision + 1.
        """
        method, request, namespace_id = drive(
            calls.watch(self._client.linker, self.state, from_revision)
        )
        return _events(method(request), namespace_id)

    def _tell(self, method: str, keys: KeysLike, timeout_s: float | None) -> Any:
        return drive(calls.chain_call(self._client.linker, method, self.state, keys, timeout_s))


def _events(stream: Any, namespace_id: int) -> Iterator[Event]:
    try:
        for message in stream:
            yield wire.decode_event(message, namespace_id)
    except call_failures() as error:
        raise call_error(error) from error
    finally:
        stream.cancel()


def _run_background(reference: weakref.ref[Client], session: Session) -> None:
    """In the session's thread: what finalizers and lost answers left to do."""
    client = reference()
    link = None if client is None else client.linker.current()
    if link is not None and link.session is session:
        for flow in background(link, session):
            drive(flow)
