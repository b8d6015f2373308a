r"""The nouns of kvtier and the legal life of a block; every other module speaks in these words.

A block's life (one shard's copy; `store.py` tells the same story in code):

    reserve          commit                 finish_move              evict
    ------> FILLING ------> READY in dram ------------> READY in ssd ------> forgotten
               |                 ^  \---- promote ----/      |
               +-- abort, end of session: as if it had never been reserved

Vocabulary (closed; DESIGN section 3): block, key, namespace, epoch, format, shard, tier, arena,
segment, slot, copy, lease, reservation, move, route, session, group, parent, position, label.

- **slot number**: `segment_index << SLOT_BITS | index_in_segment`, one `u32` per shard's copy.
- **label**: what a slot's bytes are said to be; written beside them where they must outlive us.
- **grant**: what a lease or a reservation gave: slot numbers and where their segments are mapped.

Does not: decide anything, move anything, or know about protobuf (`wire.py` does).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum, StrEnum

from kvtier.errors import InvalidRequest, KvTierError
from kvtier.units import MIB

KEY_BYTES_MIN = 16
KEY_BYTES_MAX = 64
KEYS_PER_CALL_MAX = 65_536
BLOCK_BYTES_MAX = 256 * MIB
SHARDS_MAX = 64
TEXT_BYTES_MAX = 1024  # of every string a client sends
SLOT_BITS = 20
SLOTS_PER_SEGMENT_MAX = 1 << SLOT_BITS
SEGMENTS_MAX = 1 << 12

PROTOCOL_VERSION = 1
MEMORY_LAYOUT_VERSION = 1
ARENA_MAGIC = b"KVTARENA"
ARENA_HEADER_BYTES = 4096  # magic, layout version, arena id, revocations; then generation words


class TierId(IntEnum):
    """The four tiers, fast to slow. `1 << tier` is its bit in a block's state."""

    HBM = 0
    DRAM = 1
    CXL = 2
    SSD = 3

    @property
    def label(self) -> str:
        return self.name.lower()


class Codec(IntEnum):
    """How a copy's bytes are encoded. The numbers are on disk: never reuse one."""

    RAW = 0


class Fidelity(IntEnum):
    """Whether a copy decodes to exactly what was committed."""

    EXACT = 0


class GroupKind(StrEnum):
    """Which blocks of a chain a hit needs: all, the last window's, or the last one's."""

    FULL = "full"
    SLIDING = "sliding"
    STATE = "state"


class Reason(StrEnum):
    """What stopped a prefix (DESIGN section 6). `NONE`: all that was asked was found."""

    NONE = "none"
    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    DEADLINE = "deadline"
    SLOWER_THAN_PREFILL = "slower_than_prefill"
    LEASE_LOST = "lease_lost"
    CORRUPT = "corrupt"
    NOT_ACCEPTABLE = "not_acceptable"
    BYPASSED = "bypassed"
    DAEMON_DOWN = "daemon_down"


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1}


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """The shape of one block. All shards have equal size.

    With `opaque_bytes` the inner order is unknown: the block is just that many bytes, and
    `layers`, `kv_heads`, `head_dim` are descriptive. `kind` "mla" stores one latent instead of
    K and V. `window_tokens` is for `GroupKind.SLIDING` only.

    Raises:
        InvalidRequest: a field is out of range, or the size overflows `BLOCK_BYTES_MAX`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    kind: str = "kv"
    group: GroupKind = GroupKind.FULL
    window_tokens: int = 0
    layout: str = "LKHTD"
    shards: int = 1
    opaque_bytes: int = 0

    def __post_init__(self) -> None:
        limits = {"layers": 1024, "kv_heads": 4096, "head_dim": 65_536, "block_tokens": 65_536}
        for name, limit in limits.items():
            _within(name, getattr(self, name), 1, limit)
        _within("shards", self.shards, 1, SHARDS_MAX)
        _within("opaque_bytes", self.opaque_bytes, 0, BLOCK_BYTES_MAX)
        if self.dtype not in DTYPE_BYTES:
            raise InvalidRequest(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.kind not in ("kv", "mla"):
            raise InvalidRequest(f"kind {self.kind!r} is neither kv nor mla")
        if len(self.layout.encode()) > TEXT_BYTES_MAX:
            raise InvalidRequest(f"layout is longer than {TEXT_BYTES_MAX} bytes")
        if (self.group is GroupKind.SLIDING) != (self.window_tokens > 0):
            raise InvalidRequest("window_tokens belongs to a sliding group, and only to it")
        _within("block size in bytes", self.size_bytes, 1, BLOCK_BYTES_MAX)
        if self.size_bytes % self.shards:
            raise InvalidRequest(f"{self.size_bytes} bytes do not divide into {self.shards} shards")

    @property
    def size_bytes(self) -> int:
        """Bytes of one whole block, all shards."""
        if self.opaque_bytes:
            return self.opaque_bytes
        halves = 2 if self.kind == "kv" else 1
        elements = self.layers * halves * self.kv_heads * self.head_dim * self.block_tokens
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard of one block: what one slot holds."""
        return self.size_bytes // self.shards

    @property
    def needed_blocks(self) -> int | None:
        """How many of the last blocks a hit needs: None = all (full), else window or last."""
        if self.group is GroupKind.STATE:
            return 1
        if self.group is GroupKind.SLIDING:
            # The window before the next token spans at most this many blocks.
            return -(-max(self.window_tokens - 1, 1) // self.block_tokens) or 1
        return None


@dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """All that must match for bytes to be interchangeable. Two specs that differ in any field
    are different namespaces and their keys never meet. Never holds the data-parallel rank.

    `tenant` is set by the daemon from the session, never believed from a client.
    """

    model: str
    format: BlockFormat
    tenant: str = "default"
    weights: str = ""
    adapter: str = ""
    quantisation: str = ""
    engine_config: str = ""
    layout_fingerprint: str = ""
    hash_algorithm: str = ""
    hash_seed: str = ""
    group_name: str = ""

    def __post_init__(self) -> None:
        for spec_field in fields(self):
            value = getattr(self, spec_field.name)
            if isinstance(value, str) and len(value.encode()) > TEXT_BYTES_MAX:
                raise InvalidRequest(f"{spec_field.name} is longer than {TEXT_BYTES_MAX} bytes")
        if not self.model:
            raise InvalidRequest("a namespace needs a model name")

    def flat(self) -> dict[str, str]:
        """Every identifying field by its name, format fields as `format.<name>`."""
        flat = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name != "format"}
        for format_field in fields(self.format):
            flat[f"format.{format_field.name}"] = str(getattr(self.format, format_field.name))
        return flat

    def to_json(self) -> bytes:
        """The whole spec, for a record on disk; `from_json` reads it back."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> NamespaceSpec:
        """Raises InvalidRequest (values), TypeError or ValueError (not such a record)."""
        parts = json.loads(text)
        shape = dict(parts.pop("format"))
        shape["group"] = GroupKind(shape["group"])
        return cls(format=BlockFormat(**shape), **parts)

    @property
    def digest(self) -> bytes:
        """16 bytes that name this namespace on disk: BLAKE2b over length-prefixed fields."""
        hasher = hashlib.blake2b(digest_size=16, person=b"kvtier-space-v1")
        for name, value in sorted(self.flat().items()):
            for part in (name.encode(), value.encode()):
                hasher.update(struct.pack("<I", len(part)))
                hasher.update(part)
        return hasher.digest()


@dataclass(frozen=True, slots=True)
class Keys:
    """A chain of keys, packed: `count` keys of `size` bytes each, first to last.

    Raises:
        InvalidRequest: no or too many keys, a key length outside 16..64, or bytes left over.
    """

    packed: bytes
    size: int

    def __post_init__(self) -> None:
        _within("key length in bytes", self.size, KEY_BYTES_MIN, KEY_BYTES_MAX)
        if len(self.packed) % self.size:
            raise InvalidRequest(f"{len(self.packed)} bytes are no multiple of {self.size}")
        _within("number of keys", len(self.packed) // self.size, 1, KEYS_PER_CALL_MAX)

    @classmethod
    def of(cls, keys: Sequence[bytes]) -> Keys:
        """Packs keys of equal length. Raises InvalidRequest when lengths differ or none given."""
        if not keys:
            raise InvalidRequest("number of keys is 0; it must be at least 1")
        size = len(keys[0])
        if any(len(key) != size for key in keys):
            raise InvalidRequest("keys of one call must have one length")
        return cls(b"".join(keys), size)

    def __len__(self) -> int:
        return len(self.packed) // self.size

    def __getitem__(self, index: int) -> bytes:
        start = index * self.size
        return self.packed[start : start + self.size]

    def split(self) -> list[bytes]:
        """The keys one by one."""
        size, packed = self.size, self.packed
        return [packed[start : start + size] for start in range(0, len(packed), size)]

    def parts(self, count: int) -> Iterator[Keys]:
        """The same keys in pieces of at most `count`, in order."""
        step = count * self.size
        for start in range(0, len(self.packed), step):
            yield Keys(self.packed[start : start + step], self.size)

    def check_distinct(self) -> None:
        """Raises InvalidRequest when a key is given twice: a chain cannot hold one twice."""
        if len(set(self.split())) != len(self):
            raise InvalidRequest("the same key is given twice in one call")


@dataclass(slots=True)
class SlotLabel:
    """What a slot's bytes are said to be, in its header and in the catalogue. `checksum`: XXH3-64
    of the bytes, or of an encrypted copy the first half of its tag. `generation` grows with every
    write of a tier: of two claims to one key the later can be told.
    """

    namespace: bytes  # digest, 16 bytes
    epoch: int
    key: bytes
    parent: bytes  # b"" = no parent, or not known
    position: int  # index of the block in its sequence
    shard: int
    size_bytes: int
    checksum: int = 0
    codec: Codec = Codec.RAW
    fidelity: Fidelity = Fidelity.EXACT
    generation: int = 0
    written_s: int = 0  # when the block was stored: wall clock, rounded down; 0 = not known


@dataclass(slots=True)
class SlotIO:
    """One slot's part of a batch read or write of a tier.

    `address` is where the bytes are (write) or go (read) in this process. After the batch
    `error` is None and `label.checksum` is what the bytes written or read really have, or
    `error` says why this item (and only it) failed.
    """

    slot: int
    slot_bytes: int
    address: int
    label: SlotLabel
    error: KvTierError | None = None


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How a tier is cut: `count` segments of `size_bytes` each, slots aligned to `align`,
    each slot with `header_bytes` in front of its payload.
    """

    tier: TierId
    count: int
    size_bytes: int
    header_bytes: int = 0
    align: int = 4096

    def slot_bytes(self, payload_bytes: int) -> int:
        """Size of a slot for a payload of this size."""
        return self.header_bytes + -(-payload_bytes // self.align) * self.align


@dataclass(frozen=True, slots=True)
class Route:
    """Where a move goes from and to."""

    source: TierId
    target: TierId

    def __str__(self) -> str:
        return f"{self.source.label}->{self.target.label}"


@dataclass(slots=True, eq=False)
class Move:
    """Planned work on one block: copy all its shards from source slots to target slots.

    `drop_source`: the source copy is freed once the target is readable (demotion). The mover
    fills `checksums`; the store tells the ledger `finish_move` or `abort_move`, exactly once.
    """

    id: int
    namespace_id: int
    route: Route
    source_slots: tuple[int, ...]
    target_slots: tuple[int, ...]
    source_slot_bytes: int
    target_slot_bytes: int
    labels: tuple[SlotLabel, ...]
    drop_source: bool = False


@dataclass(frozen=True, slots=True)
class TierRun:
    """`block_count` consecutive blocks of an answer that lie (fastest) in `tier`."""

    tier: TierId
    block_count: int


@dataclass(frozen=True, slots=True)
class Found:
    """The answer of a lookup in one namespace: the longest restorable prefix.

    `first_needed`: index of the first block a client must read (0 for a full group, the start
    of the window for a sliding one). `load_ms` is the predicted time to have all of it in DRAM
    and copied out. `reason` says what stopped the prefix.
    """

    block_count: int
    runs: tuple[TierRun, ...] = ()
    load_ms: float = 0.0
    reason: Reason = Reason.NONE
    first_needed: int = 0


@dataclass(frozen=True, slots=True)
class SegmentView:
    """Where slots of one segment lie: `arena_id`, and the offset of slot index 0 in it."""

    segment: int
    arena_id: int
    base_offset: int


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Places of `len(slots) / 4` slots: packed little-endian u32 slot numbers and their segments.

    Slot s lies at `views[s >> SLOT_BITS].base_offset + (s & mask) * slot_bytes` in that arena.
    `generations` names, sparsely, slots whose generation word is not 0, and `revocations` the
    counter of each arena at the time of the grant (see tiers/arena.py).
    """

    slots: bytes
    slot_bytes: int
    size_bytes: int
    views: tuple[SegmentView, ...]
    generations: dict[int, int] = field(default_factory=dict)
    revocations: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GroupQuery:
    """A chain asked about in one namespace."""

    namespace_id: int
    keys: Keys


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """A lease's state: `table` is there when all needed blocks are readable in mapped memory.

    Needed are blocks `first_needed`..`block_count`; `ready_count` of `block_count` are readable.
    """

    lease_id: int
    block_count: int
    first_needed: int
    ready_count: int
    table: SlotTable | None


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """One `Found` per group, the tokens restorable in all, one lease per group if asked for."""

    groups: tuple[Found, ...]
    token_count: int
    leases: tuple[LeaseGrant, ...] = ()


@dataclass(frozen=True, slots=True)
class ReserveGrant:
    """Room to write. `granted` are indexes into the keys asked for; keys before `covered_count`
    were granted or are present already, keys from it on found no room.
    """

    reservation_id: int
    granted: tuple[int, ...]
    covered_count: int
    present_count: int
    table: SlotTable | None


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What a commit did, in blocks."""

    stored_count: int
    duplicate_count: int
    partial_count: int


class EventKind(IntEnum):
    """What a watcher is told. The numbers are those of the protocol."""

    STORED = 1
    REMOVED = 2
    CLEARED = 3
    COMPACTED = 4
    PROGRESS = 5


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to consecutive blocks of a chain."""

    revision: int
    kind: EventKind
    namespace_id: int
    keys: bytes = b""
    key_size: int = 0
    tier: TierId | None = None
    parent: bytes = b""


def _within(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"{name} is {value}; it must be {least} to {most}")
