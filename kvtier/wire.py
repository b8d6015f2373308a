"""Protobuf messages <-> the nouns of block.py, exceptions <-> gRPC; nobody else knows both.

`encode_x` makes a message, `decode_x` reads one. Chains of keys and lists of slots stay packed, so
that a call costs the same here for one key and for thousands.

Does not: open sockets, call anything, or import grpc before an error has to be turned.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtier import block, errors
from kvtier.block import BlockFormat, EventKind, GroupKind, Keys, NamespaceSpec, Reason, TierId
from kvtier.errors import InvalidRequest, KvTierError
from kvtier.v1 import cache_pb2, types_pb2

if TYPE_CHECKING:
    import grpc

ERROR_DOMAIN = "kvtier"
ERROR_DETAILS_KEY = "grpc-status-details-bin"
SESSION_TOKEN_BYTES = 16
REQUEST_ID_BYTES_MAX = 64
PACKET_BYTES_MAX = 8192  # of the session socket, either way
GROUPS_PER_CALL_MAX = 16
LEASES_PER_CALL_MAX = 65_536

REASON_NUMBERS: dict[Reason, types_pb2.Reason] = {
    reason: getattr(types_pb2, f"REASON_{reason.name}") for reason in Reason
}
TIER_NUMBERS: dict[TierId, types_pb2.Tier] = {
    tier: getattr(types_pb2, f"TIER_{tier.name}") for tier in TierId
}
_REASONS: dict[int, Reason] = {int(number): reason for reason, number in REASON_NUMBERS.items()}
_TIERS: dict[int, TierId] = {int(number): tier for tier, number in TIER_NUMBERS.items()}
_EVENT_KINDS: dict[int, EventKind] = {kind.value: kind for kind in EventKind}
# Fields that have one name and one type on both sides.
_FORMAT_FIELDS = tuple(f.name for f in fields(BlockFormat) if f.name != "group")
_SPEC_TEXTS = tuple(f.name for f in fields(NamespaceSpec) if f.name not in ("format", "tenant"))
_COMMIT_COUNTS = tuple(f.name for f in fields(block.CommitResult))
_FORMAT_DEFAULTS = {"kind": "kv", "layout": "LKHTD", "shards": 1}

# --- packed lists of u32


def pack_u32(numbers: Sequence[int]) -> bytes:
    """Little-endian, four bytes each. Raises struct.error beyond 32 bits."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def unpack_u32(packed: bytes) -> tuple[int, ...]:
    """The numbers of `pack_u32`. Raises InvalidRequest when bytes are left over."""
    if len(packed) % 4:
        raise InvalidRequest(f"{len(packed)} bytes are no list of 4-byte numbers")
    return struct.unpack(f"<{len(packed) // 4}I", packed)


# --- namespaces


def encode_format(shape: BlockFormat) -> types_pb2.BlockFormat:
    """Every field, defaults written out."""
    values: dict[str, Any] = {name: getattr(shape, name) for name in _FORMAT_FIELDS}
    return types_pb2.BlockFormat(group=shape.group.value, **values)


def decode_format(message: types_pb2.BlockFormat) -> BlockFormat:
    """Empty kind, group, layout and 0 shards mean kv, full, LKHTD and 1. Raises InvalidRequest."""
    try:
        group = GroupKind(message.group or "full")
    except ValueError:
        raise InvalidRequest(f"group {message.group!r} is not full, sliding or state") from None
    values: dict[str, Any] = {name: getattr(message, name) for name in _FORMAT_FIELDS}
    for name, default in _FORMAT_DEFAULTS.items():
        values[name] = values[name] or default
    return BlockFormat(group=group, **values)


def encode_spec(spec: NamespaceSpec) -> types_pb2.NamespaceSpec:
    """All but the tenant, which the session decides."""
    texts: dict[str, Any] = {name: getattr(spec, name) for name in _SPEC_TEXTS}
    return types_pb2.NamespaceSpec(format=encode_format(spec.format), **texts)


def decode_spec(message: types_pb2.NamespaceSpec, tenant: str = "default") -> NamespaceSpec:
    """Raises InvalidRequest: a text is too long, or the format is impossible."""
    texts: dict[str, Any] = {name: getattr(message, name) for name in _SPEC_TEXTS}
    return NamespaceSpec(format=decode_format(message.format), tenant=tenant, **texts)


# --- lookup and lease


def encode_query(query: block.GroupQuery) -> cache_pb2.GroupQuery:
    """A chain asked about; its keys stay packed."""
    return cache_pb2.GroupQuery(
        namespace_id=query.namespace_id, keys=query.keys.packed, key_bytes=query.keys.size
    )


def decode_query(message: cache_pb2.GroupQuery) -> block.GroupQuery:
    """Raises InvalidRequest: no or too many keys, or a wrong length."""
    return block.GroupQuery(message.namespace_id, Keys(message.keys, message.key_bytes))


def decode_found(message: cache_pb2.GroupFound) -> block.Found:
    """A tier that only a newer daemon knows counts as the slowest: its load time is stated."""
    runs = tuple(
        block.TierRun(_TIERS.get(run.tier, TierId.SSD), run.block_count) for run in message.runs
    )
    return block.Found(
        block_count=message.block_count,
        runs=tuple(runs),
        load_ms=message.load_ms,
        reason=decode_reason(message.reason),
        first_needed=message.first_needed,
    )


def decode_reason(number: int) -> Reason:
    """NONE for a reason that only a newer daemon knows: reasons are for people."""
    return _REASONS.get(number, Reason.NONE)


def encode_answer(answer: block.LookupAnswer) -> cache_pb2.LookupResponse:
    """What LookupResponse says. Filled in place: that is half the cost of nesting messages."""
    message = cache_pb2.LookupResponse(token_count=answer.token_count)
    for found in answer.groups:
        group = message.groups.add(
            block_count=found.block_count,
            first_needed=found.first_needed,
            load_ms=found.load_ms,
            reason=REASON_NUMBERS[found.reason],
        )
        for run in found.runs:
            group.runs.add(tier=TIER_NUMBERS[run.tier], block_count=run.block_count)
    for grant in answer.leases:
        _fill_lease(message.leases.add(), grant)
    return message


def decode_answer(message: cache_pb2.LookupResponse) -> block.LookupAnswer:
    """The answer as the store gave it."""
    return block.LookupAnswer(
        groups=tuple(decode_found(found) for found in message.groups),
        token_count=message.token_count,
        leases=tuple(decode_lease(grant) for grant in message.leases),
    )


def encode_lease(grant: block.LeaseGrant) -> cache_pb2.LeaseGrant:
    """A grant; its table only when there is one."""
    return _fill_lease(cache_pb2.LeaseGrant(), grant)


def _fill_lease(message: cache_pb2.LeaseGrant, grant: block.LeaseGrant) -> cache_pb2.LeaseGrant:
    message.lease_id = grant.lease_id
    message.block_count = grant.block_count
    message.first_needed = grant.first_needed
    message.ready_count = grant.ready_count
    if grant.table is not None:
        _fill_table(message.table, grant.table)
    return message


def decode_lease(message: cache_pb2.LeaseGrant) -> block.LeaseGrant:
    """The grant as the store gave it."""
    return block.LeaseGrant(
        lease_id=message.lease_id,
        block_count=message.block_count,
        first_needed=message.first_needed,
        ready_count=message.ready_count,
        table=decode_table(message.table) if message.HasField("table") else None,
    )


def _fill_table(message: types_pb2.SlotTable, table: block.SlotTable) -> None:
    message.slots = table.slots
    message.slot_bytes = table.slot_bytes
    message.size_bytes = table.size_bytes
    for view in table.views:
        message.views.add(
            segment=view.segment, arena_id=view.arena_id, base_offset=view.base_offset
        )
    for slot, generation in table.generations.items():
        message.generations.add(slot=slot, generation=generation)
    for arena_id, revocations in table.revocations.items():
        message.revocations.add(arena_id=arena_id, revocations=revocations)


def decode_table(message: types_pb2.SlotTable) -> block.SlotTable:
    """The table as the store gave it."""
    return block.SlotTable(
        slots=message.slots,
        slot_bytes=message.slot_bytes,
        size_bytes=message.size_bytes,
        views=tuple(
            [block.SegmentView(v.segment, v.arena_id, v.base_offset) for v in message.views]
        ),
        generations={item.slot: item.generation for item in message.generations},
        revocations={item.arena_id: item.revocations for item in message.revocations},
    )


# --- reserve, commit, events


def encode_reserve(grant: block.ReserveGrant) -> cache_pb2.ReserveResponse:
    """What ReserveResponse says."""
    message = cache_pb2.ReserveResponse(
        reservation_id=grant.reservation_id,
        granted=pack_u32(grant.granted),
        covered_count=grant.covered_count,
        present_count=grant.present_count,
    )
    if grant.table is not None:
        _fill_table(message.table, grant.table)
    return message


def decode_reserve(message: cache_pb2.ReserveResponse) -> block.ReserveGrant:
    """The grant as the store gave it."""
    return block.ReserveGrant(
        reservation_id=message.reservation_id,
        granted=unpack_u32(message.granted),
        covered_count=message.covered_count,
        present_count=message.present_count,
        table=decode_table(message.table) if message.HasField("table") else None,
    )


def encode_commit(result: block.CommitResult) -> cache_pb2.CommitResponse:
    """What CommitResponse says."""
    counts: dict[str, Any] = {name: getattr(result, name) for name in _COMMIT_COUNTS}
    return cache_pb2.CommitResponse(**counts)


def decode_commit(message: cache_pb2.CommitResponse) -> block.CommitResult:
    """The result as the store gave it."""
    return block.CommitResult(*[getattr(message, name) for name in _COMMIT_COUNTS])


def encode_event(event: block.Event) -> cache_pb2.WatchResponse:
    """What one WatchResponse says."""
    return cache_pb2.WatchResponse(
        revision=event.revision,
        kind=cache_pb2.EventKind.Name(event.kind.value),
        keys=event.keys,
        key_bytes=event.key_size,
        tier=None if event.tier is None else TIER_NUMBERS[event.tier],
        parent=event.parent,
    )


def decode_event(message: cache_pb2.WatchResponse, namespace_id: int) -> block.Event:
    """A kind that only a newer daemon knows reads as PROGRESS: a revision to resume from."""
    return block.Event(
        revision=message.revision,
        kind=_EVENT_KINDS.get(message.kind, EventKind.PROGRESS),
        namespace_id=namespace_id,
        keys=message.keys,
        key_size=message.key_bytes,
        tier=_TIERS.get(message.tier),
        parent=message.parent,
    )


def decode_tier(number: int) -> TierId:
    """Raises InvalidRequest: there is no such tier."""
    if number not in _TIERS:
        raise InvalidRequest(f"tier {number} is none of {', '.join(t.label for t in TierId)}")
    return _TIERS[number]


# --- errors


class AbortStatus(NamedTuple):
    """What `context.abort` of a gRPC handler takes, in its order."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def abort_status(error: KvTierError) -> AbortStatus:
    """The error as a gRPC status with google.rpc.ErrorInfo (reason, domain, retryable)."""
    import grpc
    from google.rpc import error_details_pb2, status_pb2

    code = grpc.StatusCode[error.grpc_code]
    message = str(error) or error.reason
    retryable = {"retryable": "true" if error.retryable else "false"}
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=retryable)
    )
    return AbortStatus(code, message, ((ERROR_DETAILS_KEY, status.SerializeToString()),))


_BY_CODE: dict[str, type[KvTierError]] = {
    "CANCELLED": errors.DaemonUnavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "NOT_FOUND": errors.NotFound,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.LimitReached,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "UNAVAILABLE": errors.DaemonUnavailable,
    "UNIMPLEMENTED": errors.VersionMismatch,
}


def error_from(failure: BaseException) -> KvTierError:
    """The exception a caller sees for a failed gRPC call (blocking or aio) or connection.

    The ErrorInfo of a kvtier daemon decides; without one (the daemon is away, or gRPC itself
    refused) the status code does. Anything else is a plain KvTierError.
    """
    if isinstance(failure, KvTierError):
        return failure
    import grpc

    if isinstance(failure, grpc.RpcError) and isinstance(failure, grpc.Call | grpc.aio.AioRpcError):
        details = str(failure.details() or "")
        reason = _reason_in(failure.trailing_metadata() or ())
        if reason:
            return error_of(reason, details)
        return _BY_CODE.get(failure.code().name, KvTierError)(details or failure.code().name)
    if isinstance(failure, TimeoutError):
        return errors.DeadlineExceeded(str(failure) or "the daemon did not answer in time")
    if isinstance(failure, OSError | EOFError | grpc.aio.UsageError):
        return errors.DaemonUnavailable(str(failure) or type(failure).__name__)
    return KvTierError(f"{type(failure).__name__}: {failure}")


def error_of(reason: str, message: str) -> KvTierError:
    """The exception for a reason by name (ErrorInfo, or a Refusal of the session socket)."""
    return errors.by_reason(reason)(message or reason)


def _reason_in(metadata: Iterable[Any]) -> str:
    """The ErrorInfo reason among trailing metadata; "" when there is none of ours."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    entry = error_details_pb2.ErrorInfo()
    try:
        status = status_pb2.Status.FromString(dict(iter(metadata)).get(ERROR_DETAILS_KEY, b""))
        ours = any(d.Unpack(entry) and entry.domain == ERROR_DOMAIN for d in status.details)
    except (DecodeError, TypeError):
        return ""
    return str(entry.reason) if ours else ""
