from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_NONE: _ClassVar[Reason]
    REASON_NEVER_STORED: _ClassVar[Reason]
    REASON_EVICTED: _ClassVar[Reason]
    REASON_DEADLINE: _ClassVar[Reason]
    REASON_SLOWER_THAN_PREFILL: _ClassVar[Reason]
    REASON_LEASE_LOST: _ClassVar[Reason]
    REASON_CORRUPT: _ClassVar[Reason]
    REASON_NOT_ACCEPTABLE: _ClassVar[Reason]
    REASON_BYPASSED: _ClassVar[Reason]
    REASON_DAEMON_DOWN: _ClassVar[Reason]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HBM: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_CXL: _ClassVar[Tier]
    TIER_SSD: _ClassVar[Tier]
REASON_UNSPECIFIED: Reason
REASON_NONE: Reason
REASON_NEVER_STORED: Reason
REASON_EVICTED: Reason
REASON_DEADLINE: Reason
REASON_SLOWER_THAN_PREFILL: Reason
REASON_LEASE_LOST: Reason
REASON_CORRUPT: Reason
REASON_NOT_ACCEPTABLE: Reason
REASON_BYPASSED: Reason
REASON_DAEMON_DOWN: Reason
TIER_UNSPECIFIED: Tier
TIER_HBM: Tier
TIER_DRAM: Tier
TIER_CXL: Tier
TIER_SSD: Tier

class BlockFormat(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "dtype", "block_tokens", "kind", "group", "window_tokens", "layout", "shards", "opaque_bytes")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    OPAQUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    kind: str
    group: str
    window_tokens: int
    layout: str
    shards: int
    opaque_bytes: int
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., block_tokens: _Optional[int] = ..., kind: _Optional[str] = ..., group: _Optional[str] = ..., window_tokens: _Optional[int] = ..., layout: _Optional[str] = ..., shards: _Optional[int] = ..., opaque_bytes: _Optional[int] = ...) -> None: ...

class NamespaceSpec(_message.Message):
    __slots__ = ("model", "format", "weights", "adapter", "quantisation", "engine_config", "layout_fingerprint", "hash_algorithm", "hash_seed", "group_name")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_CONFIG_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HASH_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    HASH_SEED_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    model: str
    format: BlockFormat
    weights: str
    adapter: str
    quantisation: str
    engine_config: str
    layout_fingerprint: str
    hash_algorithm: str
    hash_seed: str
    group_name: str
    def __init__(self, model: _Optional[str] = ..., format: _Optional[_Union[BlockFormat, _Mapping]] = ..., weights: _Optional[str] = ..., adapter: _Optional[str] = ..., quantisation: _Optional[str] = ..., engine_config: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., hash_algorithm: _Optional[str] = ..., hash_seed: _Optional[str] = ..., group_name: _Optional[str] = ...) -> None: ...

class TierRun(_message.Message):
    __slots__ = ("tier", "block_count")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    block_count: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., block_count: _Optional[int] = ...) -> None: ...

class SegmentView(_message.Message):
    __slots__ = ("segment", "arena_id", "base_offset")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    segment: int
    arena_id: int
    base_offset: int
    def __init__(self, segment: _Optional[int] = ..., arena_id: _Optional[int] = ..., base_offset: _Optional[int] = ...) -> None: ...

class SlotGeneration(_message.Message):
    __slots__ = ("slot", "generation")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    slot: int
    generation: int
    def __init__(self, slot: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class ArenaRevocations(_message.Message):
    __slots__ = ("arena_id", "revocations")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    arena_id: int
    revocations: int
    def __init__(self, arena_id: _Optional[int] = ..., revocations: _Optional[int] = ...) -> None: ...

class SlotTable(_message.Message):
    __slots__ = ("slots", "slot_bytes", "size_bytes", "views", "generations", "revocations")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    slots: bytes
    slot_bytes: int
    size_bytes: int
    views: _containers.RepeatedCompositeFieldContainer[SegmentView]
    generations: _containers.RepeatedCompositeFieldContainer[SlotGeneration]
    revocations: _containers.RepeatedCompositeFieldContainer[ArenaRevocations]
    def __init__(self, slots: _Optional[bytes] = ..., slot_bytes: _Optional[int] = ..., size_bytes: _Optional[int] = ..., views: _Optional[_Iterable[_Union[SegmentView, _Mapping]]] = ..., generations: _Optional[_Iterable[_Union[SlotGeneration, _Mapping]]] = ..., revocations: _Optional[_Iterable[_Union[ArenaRevocations, _Mapping]]] = ...) -> None: ...
