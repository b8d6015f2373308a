"""The verbs, as flows: requests built and answers read in one place for both clients.

A call that grants something and whose answer is lost (deadline, cancelled) is repeated in the
background with the same request id, and what it had granted is given back: nothing leaks in a
session that lives on.

Does not: wait, or know which client it runs in.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvtier import wire
from kvtier.block import CommitResult, Found, GroupQuery, Keys, LeaseGrant, Reason, ReserveGrant
from kvtier.client.keys import KeysLike, packed_keys
from kvtier.client.link import Link, Linker, SpaceState
from kvtier.client.reservation import ReservationState, ReservedBlock, abort_again
from kvtier.client.steps import Flow
from kvtier.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    KvTierError,
    TierFull,
)
from kvtier.v1 import cache_pb2

SETTLE_TIMEOUT_S = 10.0
L = TypeVar("L")
R = TypeVar("R", bound=ReservationState)
MakeLease = Callable[[Link, LeaseGrant, Reason, int], L]  # ..., shard
MakeReservation = Callable[[Link, ReserveGrant, Sequence[bytes], int], R]


@dataclass(frozen=True, slots=True)
class LeasedFound(Found, Generic[L]):
    """A `Found` and, when one was asked for and something was found, its lease."""

    lease: L | None = None


@dataclass(frozen=True, slots=True)
class GroupsFound(Generic[L]):
    """What a lookup over several groups found; `token_count` tokens are restorable in all."""

    groups: tuple[LeasedFound[L], ...]
    token_count: int


# --- lookup


def lookup(
    linker: Linker,
    groups: Sequence[tuple[SpaceState, KeysLike]],
    make_lease: MakeLease[L],
    *,
    lease: bool,
    prefetch: bool,
    touch: bool,
    skip_read: bool,
    shard: int,
    deadline_s: float | None,
) -> Flow[GroupsFound[L]]:
    """Raises InvalidRequest for bad keys and KvTierError in a forked child, else nothing."""
    deadline_s = linker.options.deadline_s if deadline_s is None else deadline_s
    until_s = time.monotonic() + deadline_s
    if not groups:
        raise InvalidRequest("a lookup needs at least one group")
    chains = [packed_keys(keys) for _, keys in groups]
    request: cache_pb2.LookupRequest | None = None

    def build(token: bytes, ids: Sequence[int]) -> cache_pb2.LookupRequest:
        nonlocal request
        request = cache_pb2.LookupRequest(
            session_token=token,
            lease=lease,
            prefetch=prefetch,
            touch=touch,
            skip_read=skip_read,
            shard=shard,
            request_id=_request_id() if lease else "",
        )
        for namespace_id, chain in zip(ids, chains, strict=True):
            request.groups.add(namespace_id=namespace_id, keys=chain.packed, key_bytes=chain.size)
        return request

    try:
        spaces = [space for space, _ in groups]
        link, answer = yield from linker.call(
            "Lookup", build, spaces, until_s, patience_s=deadline_s
        )
        return _found(link, answer, make_lease, shard)
    except InvalidRequest:
        raise
    except (KvTierError, GeneratorExit) as error:
        if lease and request is not None:
            _settle_later(linker, "Lookup", request, error)
        if isinstance(error, GeneratorExit) or type(error) is KvTierError:
            raise
        linker.log_miss(error)
        reason = Reason.DEADLINE if isinstance(error, DeadlineExceeded) else Reason.DAEMON_DOWN
        return GroupsFound(tuple(LeasedFound(0, reason=reason) for _ in groups), 0)


def _found(
    link: Link, answer: cache_pb2.LookupResponse, make_lease: MakeLease[L], shard: int
) -> GroupsFound[L]:
    leases: list[L | None] = [None] * len(answer.groups)
    for index, message in enumerate(answer.leases):
        if message.lease_id:
            reason = wire.decode_reason(answer.groups[index].reason)
            leases[index] = make_lease(link, wire.decode_lease(message), reason, shard)
    groups = []
    for group, lease in zip(answer.groups, leases, strict=True):
        found = wire.decode_found(group)
        groups.append(
            LeasedFound(
                found.block_count,
                found.runs,
                found.load_ms,
                found.reason,
                found.first_needed,
                lease,
            )
        )
    return GroupsFound(tuple(groups), answer.token_count)


# --- lease and reserve


def lease(
    linker: Linker,
    space: SpaceState,
    keys: KeysLike | None,
    lease_id: int,
    make_lease: MakeLease[L],
    *,
    shard: int,
    timeout_s: float | None,
) -> Flow[L]:
    """A new lease of `keys`, or, with `keys` None, lease `lease_id` joined."""
    chain = None if keys is None else packed_keys(keys)
    request: cache_pb2.LeaseRequest | None = None

    def build(token: bytes, ids: Sequence[int]) -> cache_pb2.LeaseRequest:
        nonlocal request
        request = cache_pb2.LeaseRequest(session_token=token, lease_id=lease_id, shard=shard)
        if chain is not None:
            request.group.CopyFrom(wire.encode_query(GroupQuery(ids[0], chain)))
            request.request_id = _request_id()
        return request

    try:
        spaces = () if chain is None else (space,)
        link, answer = yield from linker.call("Lease", build, spaces, until_of(linker, timeout_s))
    except (DeadlineExceeded, DaemonUnavailable, GeneratorExit) as error:
        if chain is not None and request is not None:
            _settle_later(linker, "Lease", request, error)
        raise
    reason = wire.decode_reason(answer.reason)
    return make_lease(link, wire.decode_lease(answer.grant), reason, shard)


def reserve(
    linker: Linker,
    space: SpaceState,
    keys: KeysLike,
    make_reservation: MakeReservation[R],
    *,
    parent: bytes | None,
    position: int,
    shard: int,
    skip_save: bool,
    timeout_s: float | None,
) -> Flow[R]:
    """Room for the keys that are not present."""
    chain = packed_keys(keys)
    chain.check_distinct()
    if parent and len(parent) != chain.size:
        raise InvalidRequest(f"the parent has {len(parent)} bytes, the keys have {chain.size}")
    request: cache_pb2.ReserveRequest | None = None

    def build(token: bytes, ids: Sequence[int]) -> cache_pb2.ReserveRequest:
        nonlocal request
        request = cache_pb2.ReserveRequest(
            session_token=token,
            namespace_id=ids[0],
            keys=chain.packed,
            key_bytes=chain.size,
            parent=parent or b"",
            position=position,
            shard=shard,
            request_id=_request_id(),
            skip_save=skip_save,
        )
        return request

    try:
        link, answer = yield from linker.call(
            "Reserve", build, (space,), until_of(linker, timeout_s)
        )
    except (DeadlineExceeded, DaemonUnavailable, GeneratorExit) as error:
        if request is not None:
            _settle_later(linker, "Reserve", request, error)
        raise
    names = chain if isinstance(keys, Keys) else keys
    return make_reservation(link, wire.decode_reserve(answer), names, shard)  # type: ignore[arg-type]


def store(
    linker: Linker,
    space: SpaceState,
    keys: KeysLike,
    fill: Callable[[ReservedBlock], object],
    make_reservation: MakeReservation[R],
    *,
    parent: bytes | None,
    position: int,
    shard: int,
    durable: bool,
    timeout_s: float | None,
) -> Flow[CommitResult]:
    """Reserves, fills and commits, part by part, until all keys are stored or present."""
    chain = packed_keys(keys)
    until_s = until_of(linker, timeout_s)
    start, total = 0, [0, 0, 0]
    present: list[bytes] = []
    while start < len(chain):
        rest = Keys(chain.packed[start * chain.size :], chain.size)
        reservation = yield from reserve(
            linker, space, rest, make_reservation,
            parent=chain[start - 1] if start else parent,
            position=position + start, shard=shard, skip_save=False,
            timeout_s=until_s - time.monotonic(),
        )  # fmt: skip
        if not reservation.covered_count:
            raise TierFull(f"no room for {len(rest)} of {len(chain)} blocks; those before are kept")
        try:
            for block in reservation.blocks:
                fill(block)
            commit = reservation.commit_flow(None, durable, until_s - time.monotonic())
            result = yield from commit
        except BaseException:
            reservation.abort_later()
            raise
        granted = {block.index for block in reservation.blocks}
        covered = range(reservation.covered_count)
        present += [chain[start + index] for index in covered if index not in granted]
        start += reservation.covered_count
        done = (result.stored_count, result.duplicate_count, result.partial_count)
        total = [before + now for before, now in zip(total, done, strict=True)]
    if durable and present:
        yield from make_durable(linker, space, Keys.of(present), until_s)
    return CommitResult(*total)


def make_durable(linker: Linker, space: SpaceState, keys: Keys, until_s: float) -> Flow[None]:
    """Blocks that somebody stored before are on stable storage when this returns."""

    def build(token: bytes, ids: Sequence[int]) -> Any:
        return cache_pb2.CommitRequest(
            session_token=token, durable=True, request_id=_request_id(),
            present=wire.encode_query(GroupQuery(ids[0], keys)),
        )  # fmt: skip

    yield from linker.call("Commit", build, (space,), until_s)


# --- the verbs that only tell


def chain_call(
    linker: Linker, method: str, space: SpaceState, keys: KeysLike, timeout_s: float | None
) -> Flow[Any]:
    """Prefetch, Evict, Pin or Unpin of a chain."""
    chain = packed_keys(keys)
    kind = getattr(cache_pb2, f"{method}Request")

    def build(token: bytes, ids: Sequence[int]) -> Any:
        named = {} if method == "Prefetch" else {"request_id": _request_id()}
        query = wire.encode_query(GroupQuery(ids[0], chain))
        return kind(session_token=token, group=query, **named)

    _, answer = yield from linker.call(method, build, (space,), until_of(linker, timeout_s))
    return answer


def clear(linker: Linker, space: SpaceState, timeout_s: float | None) -> Flow[int]:
    """Starts a new epoch; returns the blocks forgotten."""

    def build(token: bytes, ids: Sequence[int]) -> Any:
        return cache_pb2.ClearNamespaceRequest(
            session_token=token, namespace_id=ids[0], request_id=_request_id()
        )

    _, answer = yield from linker.call(
        "ClearNamespace", build, (space,), until_of(linker, timeout_s)
    )
    space.epoch = answer.epoch
    return int(answer.evicted_count)


def watch(
    linker: Linker, space: SpaceState, from_revision: int
) -> Flow[tuple[Any, cache_pb2.WatchRequest, int]]:
    """The stream's method, its request and the namespace id."""
    until_s = until_of(linker, None)
    namespace_id = yield from linker.open(space, until_s)
    link = yield from linker.link(until_s)
    request = cache_pb2.WatchRequest(
        session_token=link.session.token, namespace_id=namespace_id, from_revision=from_revision
    )
    return link.stub.Watch, request, namespace_id


def _request_id() -> str:
    return uuid.uuid4().hex


def until_of(linker: Linker, timeout_s: float | None) -> float:
    """Monotonic seconds when a call of this timeout (None: the client's) is late."""
    return time.monotonic() + (linker.options.timeout_s if timeout_s is None else timeout_s)


# --- answers that were lost


def _settle_later(linker: Linker, method: str, request: Any, error: BaseException) -> None:
    """Notes that the daemon may have granted what nobody heard of."""
    link = linker.current()
    lost = isinstance(error, DeadlineExceeded | DaemonUnavailable | GeneratorExit)
    if not lost or link is None or not link.session.alive:
        return
    if request.session_token == link.session.token:
        link.session.later(lambda: _settle(link, method, request))


def _settle(link: Link, method: str, request: Any) -> Flow[None]:
    """Asks again with the same request id and gives back what was granted. Never raises."""
    try:
        until_s = time.monotonic() + SETTLE_TIMEOUT_S
        answer = yield from link.call(method, request, until_s)
    except (DeadlineExceeded, DaemonUnavailable):
        if link.session.alive:
            link.session.jobs.append(lambda: _settle(link, method, request))
        return
    except KvTierError:
        return
    if method == "Reserve":
        if answer.reservation_id:
            yield from abort_again(link, answer.reservation_id)
        return
    grants = [answer.grant] if method == "Lease" else answer.leases
    link.session.dropped.extend(grant.lease_id for grant in grants if grant.lease_id)
    link.session.wake()
