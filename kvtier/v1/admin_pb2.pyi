from kvtier.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScrubAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCRUB_ACTION_UNSPECIFIED: _ClassVar[ScrubAction]
    SCRUB_ACTION_START: _ClassVar[ScrubAction]
    SCRUB_ACTION_STOP: _ClassVar[ScrubAction]
SCRUB_ACTION_UNSPECIFIED: ScrubAction
SCRUB_ACTION_START: ScrubAction
SCRUB_ACTION_STOP: ScrubAction

class StatRequest(_message.Message):
    __slots__ = ("namespaces_max",)
    NAMESPACES_MAX_FIELD_NUMBER: _ClassVar[int]
    namespaces_max: int
    def __init__(self, namespaces_max: _Optional[int] = ...) -> None: ...

class TierStat(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes", "payload_bytes", "block_count", "segment_count", "segments_used", "fragmentation", "in_bytes", "out_bytes", "in_bytes_per_s", "out_bytes_per_s", "hit_blocks", "error_count", "state", "detail", "written_day_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_USED_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTATION_FIELD_NUMBER: _ClassVar[int]
    IN_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    OUT_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ERROR_COUNT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_DAY_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    capacity_bytes: int
    used_bytes: int
    payload_bytes: int
    block_count: int
    segment_count: int
    segments_used: int
    fragmentation: float
    in_bytes: int
    out_bytes: int
    in_bytes_per_s: float
    out_bytes_per_s: float
    hit_blocks: int
    error_count: int
    state: str
    detail: str
    written_day_bytes: int
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., block_count: _Optional[int] = ..., segment_count: _Optional[int] = ..., segments_used: _Optional[int] = ..., fragmentation: _Optional[float] = ..., in_bytes: _Optional[int] = ..., out_bytes: _Optional[int] = ..., in_bytes_per_s: _Optional[float] = ..., out_bytes_per_s: _Optional[float] = ..., hit_blocks: _Optional[int] = ..., error_count: _Optional[int] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., written_day_bytes: _Optional[int] = ...) -> None: ...

class ReasonCount(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: _types_pb2.Reason
    count: int
    def __init__(self, reason: _Optional[_Union[_types_pb2.Reason, str]] = ..., count: _Optional[int] = ...) -> None: ...

class NamespaceStat(_message.Message):
    __slots__ = ("namespace_id", "tenant", "model", "group_name", "epoch", "block_count", "size_bytes", "hit_blocks", "miss_blocks", "bypassed", "block_tokens", "encrypted", "locked", "max_age_s")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYPASSED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    LOCKED_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_S_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    tenant: str
    model: str
    group_name: str
    epoch: int
    block_count: int
    size_bytes: int
    hit_blocks: int
    miss_blocks: int
    bypassed: bool
    block_tokens: int
    encrypted: bool
    locked: str
    max_age_s: float
    def __init__(self, namespace_id: _Optional[int] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., group_name: _Optional[str] = ..., epoch: _Optional[int] = ..., block_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., miss_blocks: _Optional[int] = ..., bypassed: bool = ..., block_tokens: _Optional[int] = ..., encrypted: bool = ..., locked: _Optional[str] = ..., max_age_s: _Optional[float] = ...) -> None: ...

class SessionStat(_message.Message):
    __slots__ = ("client_name", "tenant", "group", "pid", "lease_count", "reservation_count", "age_s")
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_COUNT_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    tenant: str
    group: str
    pid: int
    lease_count: int
    reservation_count: int
    age_s: float
    def __init__(self, client_name: _Optional[str] = ..., tenant: _Optional[str] = ..., group: _Optional[str] = ..., pid: _Optional[int] = ..., lease_count: _Optional[int] = ..., reservation_count: _Optional[int] = ..., age_s: _Optional[float] = ...) -> None: ...

class RouteStat(_message.Message):
    __slots__ = ("route", "move_count", "size_bytes", "failed_count", "in_flight", "queued")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    MOVE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILED_COUNT_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    route: str
    move_count: int
    size_bytes: int
    failed_count: int
    in_flight: int
    queued: int
    def __init__(self, route: _Optional[str] = ..., move_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., failed_count: _Optional[int] = ..., in_flight: _Optional[int] = ..., queued: _Optional[int] = ...) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("version", "uptime_s", "state", "tiers", "lookup_count", "lookup_blocks", "hit_blocks", "miss_blocks", "hit_ratio", "reasons", "lease_count", "lease_oldest_s", "reservation_count", "reservation_oldest_s", "sessions", "routes", "namespaces", "corrupt_count", "stored_blocks", "evicted_blocks", "events_revision", "native_kernels", "recovered_blocks", "recovery_s", "leases_revoked", "pid", "trust", "predecessor_bytes", "corrupt")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIT_RATIO_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEASE_OLDEST_S_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_OLDEST_S_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_COUNT_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_REVISION_FIELD_NUMBER: _ClassVar[int]
    NATIVE_KERNELS_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_S_FIELD_NUMBER: _ClassVar[int]
    LEASES_REVOKED_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    PREDECESSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_s: float
    state: str
    tiers: _containers.RepeatedCompositeFieldContainer[TierStat]
    lookup_count: int
    lookup_blocks: int
    hit_blocks: int
    miss_blocks: int
    hit_ratio: float
    reasons: _containers.RepeatedCompositeFieldContainer[ReasonCount]
    lease_count: int
    lease_oldest_s: float
    reservation_count: int
    reservation_oldest_s: float
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStat]
    routes: _containers.RepeatedCompositeFieldContainer[RouteStat]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStat]
    corrupt_count: int
    stored_blocks: int
    evicted_blocks: int
    events_revision: int
    native_kernels: bool
    recovered_blocks: int
    recovery_s: float
    leases_revoked: int
    pid: int
    trust: str
    predecessor_bytes: int
    corrupt: _containers.RepeatedCompositeFieldContainer[DamageCount]
    def __init__(self, version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., state: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[TierStat, _Mapping]]] = ..., lookup_count: _Optional[int] = ..., lookup_blocks: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., miss_blocks: _Optional[int] = ..., hit_ratio: _Optional[float] = ..., reasons: _Optional[_Iterable[_Union[ReasonCount, _Mapping]]] = ..., lease_count: _Optional[int] = ..., lease_oldest_s: _Optional[float] = ..., reservation_count: _Optional[int] = ..., reservation_oldest_s: _Optional[float] = ..., sessions: _Optional[_Iterable[_Union[SessionStat, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[RouteStat, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStat, _Mapping]]] = ..., corrupt_count: _Optional[int] = ..., stored_blocks: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., events_revision: _Optional[int] = ..., native_kernels: bool = ..., recovered_blocks: _Optional[int] = ..., recovery_s: _Optional[float] = ..., leases_revoked: _Optional[int] = ..., pid: _Optional[int] = ..., trust: _Optional[str] = ..., predecessor_bytes: _Optional[int] = ..., corrupt: _Optional[_Iterable[_Union[DamageCount, _Mapping]]] = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NamespaceEntry(_message.Message):
    __slots__ = ("stat", "spec", "fields", "digest")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STAT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    stat: NamespaceStat
    spec: _types_pb2.NamespaceSpec
    fields: _containers.ScalarMap[str, str]
    digest: str
    def __init__(self, stat: _Optional[_Union[NamespaceStat, _Mapping]] = ..., spec: _Optional[_Union[_types_pb2.NamespaceSpec, _Mapping]] = ..., fields: _Optional[_Mapping[str, str]] = ..., digest: _Optional[str] = ...) -> None: ...

class ListNamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceEntry]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceEntry, _Mapping]]] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("namespace_id", "page_size", "page_token")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    page_size: int
    page_token: str
    def __init__(self, namespace_id: _Optional[int] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class BlockEntry(_message.Message):
    __slots__ = ("key", "parent", "position", "tiers", "size_bytes", "lease_count", "pin_count")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PIN_COUNT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    position: int
    tiers: _containers.RepeatedScalarFieldContainer[_types_pb2.Tier]
    size_bytes: int
    lease_count: int
    pin_count: int
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., position: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[_types_pb2.Tier, str]]] = ..., size_bytes: _Optional[int] = ..., lease_count: _Optional[int] = ..., pin_count: _Optional[int] = ...) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("blocks", "next_page_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockEntry]
    next_page_token: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockEntry, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s", "undo")
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    undo: bool
    def __init__(self, timeout_s: _Optional[float] = ..., undo: bool = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("flushed_blocks", "remaining_blocks")
    FLUSHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    flushed_blocks: int
    remaining_blocks: int
    def __init__(self, flushed_blocks: _Optional[int] = ..., remaining_blocks: _Optional[int] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("flushed_blocks", "remaining_blocks")
    FLUSHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    flushed_blocks: int
    remaining_blocks: int
    def __init__(self, flushed_blocks: _Optional[int] = ..., remaining_blocks: _Optional[int] = ...) -> None: ...

class BypassRequest(_message.Message):
    __slots__ = ("on", "namespace_id")
    ON_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    on: bool
    namespace_id: int
    def __init__(self, on: bool = ..., namespace_id: _Optional[int] = ...) -> None: ...

class BypassResponse(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: bool = ...) -> None: ...

class AdminEvictRequest(_message.Message):
    __slots__ = ("namespace_id", "keys", "key_bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    keys: bytes
    key_bytes: int
    def __init__(self, namespace_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., key_bytes: _Optional[int] = ...) -> None: ...

class AdminEvictResponse(_message.Message):
    __slots__ = ("evicted_count",)
    EVICTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    evicted_count: int
    def __init__(self, evicted_count: _Optional[int] = ...) -> None: ...

class AdminPinRequest(_message.Message):
    __slots__ = ("namespace_id", "keys", "key_bytes", "unpin")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    keys: bytes
    key_bytes: int
    unpin: bool
    def __init__(self, namespace_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., key_bytes: _Optional[int] = ..., unpin: bool = ...) -> None: ...

class AdminPinResponse(_message.Message):
    __slots__ = ("block_count",)
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    block_count: int
    def __init__(self, block_count: _Optional[int] = ...) -> None: ...

class HealRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("action", "bytes_per_s")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    action: ScrubAction
    bytes_per_s: int
    def __init__(self, action: _Optional[_Union[ScrubAction, str]] = ..., bytes_per_s: _Optional[int] = ...) -> None: ...

class DamageCount(_message.Message):
    __slots__ = ("damage", "count")
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    damage: str
    count: int
    def __init__(self, damage: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ScrubResponse(_message.Message):
    __slots__ = ("state", "detail", "scheduled", "progress", "bytes_per_s", "elapsed_s", "block_count", "read_bytes", "damaged", "stray_count", "ended_s", "next_in_s")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    STRAY_COUNT_FIELD_NUMBER: _ClassVar[int]
    ENDED_S_FIELD_NUMBER: _ClassVar[int]
    NEXT_IN_S_FIELD_NUMBER: _ClassVar[int]
    state: str
    detail: str
    scheduled: bool
    progress: float
    bytes_per_s: int
    elapsed_s: float
    block_count: int
    read_bytes: int
    damaged: _containers.RepeatedCompositeFieldContainer[DamageCount]
    stray_count: int
    ended_s: float
    next_in_s: float
    def __init__(self, state: _Optional[str] = ..., detail: _Optional[str] = ..., scheduled: bool = ..., progress: _Optional[float] = ..., bytes_per_s: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., block_count: _Optional[int] = ..., read_bytes: _Optional[int] = ..., damaged: _Optional[_Iterable[_Union[DamageCount, _Mapping]]] = ..., stray_count: _Optional[int] = ..., ended_s: _Optional[float] = ..., next_in_s: _Optional[float] = ...) -> None: ...

class ResizeTierRequest(_message.Message):
    __slots__ = ("tier", "size_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    size_bytes: int
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ResizeTierResponse(_message.Message):
    __slots__ = ("former_bytes", "size_bytes", "configured_bytes", "moved_blocks", "evicted_blocks")
    FORMER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONFIGURED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MOVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    former_bytes: int
    size_bytes: int
    configured_bytes: int
    moved_blocks: int
    evicted_blocks: int
    def __init__(self, former_bytes: _Optional[int] = ..., size_bytes: _Optional[int] = ..., configured_bytes: _Optional[int] = ..., moved_blocks: _Optional[int] = ..., evicted_blocks: _Optional[int] = ...) -> None: ...

class PurgeRequest(_message.Message):
    __slots__ = ("namespace_id", "timeout_s")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    timeout_s: float
    def __init__(self, namespace_id: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class PurgeResponse(_message.Message):
    __slots__ = ("block_count", "key_destroyed", "wiped_bytes")
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    KEY_DESTROYED_FIELD_NUMBER: _ClassVar[int]
    WIPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    block_count: int
    key_destroyed: bool
    wiped_bytes: int
    def __init__(self, block_count: _Optional[int] = ..., key_destroyed: bool = ..., wiped_bytes: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("ok", "problems")
    OK_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ok: bool = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...
