from kvtier.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_STORED: _ClassVar[EventKind]
    EVENT_KIND_REMOVED: _ClassVar[EventKind]
    EVENT_KIND_CLEARED: _ClassVar[EventKind]
    EVENT_KIND_COMPACTED: _ClassVar[EventKind]
    EVENT_KIND_PROGRESS: _ClassVar[EventKind]
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_STORED: EventKind
EVENT_KIND_REMOVED: EventKind
EVENT_KIND_CLEARED: EventKind
EVENT_KIND_COMPACTED: EventKind
EVENT_KIND_PROGRESS: EventKind

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("session_token", "spec", "prefill_tokens_per_s")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    spec: _types_pb2.NamespaceSpec
    prefill_tokens_per_s: float
    def __init__(self, session_token: _Optional[bytes] = ..., spec: _Optional[_Union[_types_pb2.NamespaceSpec, _Mapping]] = ..., prefill_tokens_per_s: _Optional[float] = ...) -> None: ...

class OpenNamespaceResponse(_message.Message):
    __slots__ = ("namespace_id", "epoch", "shard_bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    epoch: int
    shard_bytes: int
    def __init__(self, namespace_id: _Optional[int] = ..., epoch: _Optional[int] = ..., shard_bytes: _Optional[int] = ...) -> None: ...

class GroupQuery(_message.Message):
    __slots__ = ("namespace_id", "keys", "key_bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    keys: bytes
    key_bytes: int
    def __init__(self, namespace_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., key_bytes: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("session_token", "groups", "lease", "prefetch", "touch", "skip_read", "shard", "request_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    TOUCH_FIELD_NUMBER: _ClassVar[int]
    SKIP_READ_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    groups: _containers.RepeatedCompositeFieldContainer[GroupQuery]
    lease: bool
    prefetch: bool
    touch: bool
    skip_read: bool
    shard: int
    request_id: str
    def __init__(self, session_token: _Optional[bytes] = ..., groups: _Optional[_Iterable[_Union[GroupQuery, _Mapping]]] = ..., lease: bool = ..., prefetch: bool = ..., touch: bool = ..., skip_read: bool = ..., shard: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class GroupFound(_message.Message):
    __slots__ = ("block_count", "first_needed", "runs", "load_ms", "reason")
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_NEEDED_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    block_count: int
    first_needed: int
    runs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TierRun]
    load_ms: float
    reason: _types_pb2.Reason
    def __init__(self, block_count: _Optional[int] = ..., first_needed: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[_types_pb2.TierRun, _Mapping]]] = ..., load_ms: _Optional[float] = ..., reason: _Optional[_Union[_types_pb2.Reason, str]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("groups", "token_count", "leases")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupFound]
    token_count: int
    leases: _containers.RepeatedCompositeFieldContainer[LeaseGrant]
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupFound, _Mapping]]] = ..., token_count: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[LeaseGrant, _Mapping]]] = ...) -> None: ...

class LeaseGrant(_message.Message):
    __slots__ = ("lease_id", "block_count", "first_needed", "ready_count", "table")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_NEEDED_FIELD_NUMBER: _ClassVar[int]
    READY_COUNT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    block_count: int
    first_needed: int
    ready_count: int
    table: _types_pb2.SlotTable
    def __init__(self, lease_id: _Optional[int] = ..., block_count: _Optional[int] = ..., first_needed: _Optional[int] = ..., ready_count: _Optional[int] = ..., table: _Optional[_Union[_types_pb2.SlotTable, _Mapping]] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("session_token", "lease_id", "group", "shard", "request_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    lease_id: int
    group: GroupQuery
    shard: int
    request_id: str
    def __init__(self, session_token: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., group: _Optional[_Union[GroupQuery, _Mapping]] = ..., shard: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("grant", "reason")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    grant: LeaseGrant
    reason: _types_pb2.Reason
    def __init__(self, grant: _Optional[_Union[LeaseGrant, _Mapping]] = ..., reason: _Optional[_Union[_types_pb2.Reason, str]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_token", "lease_ids")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_token: _Optional[bytes] = ..., lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session_token", "namespace_id", "keys", "key_bytes", "parent", "position", "shard", "request_id", "skip_save")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SKIP_SAVE_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    namespace_id: int
    keys: bytes
    key_bytes: int
    parent: bytes
    position: int
    shard: int
    request_id: str
    skip_save: bool
    def __init__(self, session_token: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., key_bytes: _Optional[int] = ..., parent: _Optional[bytes] = ..., position: _Optional[int] = ..., shard: _Optional[int] = ..., request_id: _Optional[str] = ..., skip_save: bool = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("reservation_id", "granted", "table", "covered_count", "present_count")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    COVERED_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRESENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    granted: bytes
    table: _types_pb2.SlotTable
    covered_count: int
    present_count: int
    def __init__(self, reservation_id: _Optional[int] = ..., granted: _Optional[bytes] = ..., table: _Optional[_Union[_types_pb2.SlotTable, _Mapping]] = ..., covered_count: _Optional[int] = ..., present_count: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_token", "reservation_id", "indexes", "durable", "request_id", "present")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    reservation_id: int
    indexes: bytes
    durable: bool
    request_id: str
    present: GroupQuery
    def __init__(self, session_token: _Optional[bytes] = ..., reservation_id: _Optional[int] = ..., indexes: _Optional[bytes] = ..., durable: bool = ..., request_id: _Optional[str] = ..., present: _Optional[_Union[GroupQuery, _Mapping]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("stored_count", "duplicate_count", "partial_count")
    STORED_COUNT_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_COUNT_FIELD_NUMBER: _ClassVar[int]
    stored_count: int
    duplicate_count: int
    partial_count: int
    def __init__(self, stored_count: _Optional[int] = ..., duplicate_count: _Optional[int] = ..., partial_count: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("session_token", "reservation_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    reservation_id: int
    def __init__(self, session_token: _Optional[bytes] = ..., reservation_id: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("session_token", "group")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    group: GroupQuery
    def __init__(self, session_token: _Optional[bytes] = ..., group: _Optional[_Union[GroupQuery, _Mapping]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("moving_count",)
    MOVING_COUNT_FIELD_NUMBER: _ClassVar[int]
    moving_count: int
    def __init__(self, moving_count: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("session_token", "group", "request_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    group: GroupQuery
    request_id: str
    def __init__(self, session_token: _Optional[bytes] = ..., group: _Optional[_Union[GroupQuery, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("evicted_count",)
    EVICTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    evicted_count: int
    def __init__(self, evicted_count: _Optional[int] = ...) -> None: ...

class ClearNamespaceRequest(_message.Message):
    __slots__ = ("session_token", "namespace_id", "request_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    namespace_id: int
    request_id: str
    def __init__(self, session_token: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class ClearNamespaceResponse(_message.Message):
    __slots__ = ("epoch", "evicted_count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVICTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    evicted_count: int
    def __init__(self, epoch: _Optional[int] = ..., evicted_count: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("session_token", "group", "request_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    group: GroupQuery
    request_id: str
    def __init__(self, session_token: _Optional[bytes] = ..., group: _Optional[_Union[GroupQuery, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pinned_count",)
    PINNED_COUNT_FIELD_NUMBER: _ClassVar[int]
    pinned_count: int
    def __init__(self, pinned_count: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("session_token", "group", "request_id")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    group: GroupQuery
    request_id: str
    def __init__(self, session_token: _Optional[bytes] = ..., group: _Optional[_Union[GroupQuery, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("unpinned_count",)
    UNPINNED_COUNT_FIELD_NUMBER: _ClassVar[int]
    unpinned_count: int
    def __init__(self, unpinned_count: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("session_token", "namespace_id", "from_revision")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_REVISION_FIELD_NUMBER: _ClassVar[int]
    session_token: bytes
    namespace_id: int
    from_revision: int
    def __init__(self, session_token: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., from_revision: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("revision", "kind", "keys", "key_bytes", "tier", "parent")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    revision: int
    kind: EventKind
    keys: bytes
    key_bytes: int
    tier: _types_pb2.Tier
    parent: bytes
    def __init__(self, revision: _Optional[int] = ..., kind: _Optional[_Union[EventKind, str]] = ..., keys: _Optional[bytes] = ..., key_bytes: _Optional[int] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., parent: _Optional[bytes] = ...) -> None: ...
