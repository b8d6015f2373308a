"""Frozen records of what the daemon holds and did: read by metrics, the command and tests.

Does not: count anything. The store fills these in when asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtier.block import NamespaceSpec, Reason, TierId


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier. Bytes; rates over the last few seconds. Fields as in proto TierStat."""

    tier: TierId
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


@dataclass(frozen=True, slots=True)
class NamespaceUse:
    """One namespace. `digest` is that of its spec."""

    namespace_id: int
    spec: NamespaceSpec
    digest: bytes
    epoch: int
    block_count: int
    size_bytes: int
    hit_blocks: int
    miss_blocks: int
    bypassed: bool
    encrypted: bool  # on SSD
    locked: str  # why its blocks cannot be decrypted: all of them miss
    max_age_s: float  # 0 = none


@dataclass(frozen=True, slots=True)
class SessionUse:
    """One attached client."""

    client_name: str
    tenant: str
    group: str
    pid: int
    lease_count: int
    reservation_count: int
    age_s: float


@dataclass(frozen=True, slots=True)
class RouteUse:
    """Moves of one route since the start."""

    route: str
    move_count: int
    size_bytes: int
    failed_count: int
    in_flight: int
    queued: int


@dataclass(frozen=True, slots=True)
class BlockUse:
    """One block of a listing."""

    key: bytes
    parent: bytes
    position: int
    tiers: tuple[TierId, ...]
    size_bytes: int
    lease_count: int
    pin_count: int


@dataclass(frozen=True, slots=True)
class ScrubUse:
    """The scrub of the SSD tier: the one under way, else (`state` "idle") the last one. `detail`
    says why it waits, or ended early. Times in seconds, `ended_s` since 1970; 0 = never, none.
    """

    state: str = "idle"  # idle, running or waiting
    detail: str = ""
    scheduled: bool = False
    progress: float = 0.0  # 0..1
    bytes_per_s: int = 0
    elapsed_s: float = 0.0
    block_count: int = 0
    read_bytes: int = 0
    damaged: dict[str, int] = field(default_factory=dict)  # by what was wrong
    stray_count: int = 0
    ended_s: float = 0.0
    next_in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Everything `kvtier stat` shows but the daemon's own name, pid and version."""

    uptime_s: float
    state: str  # serving, draining or bypassed
    tiers: tuple[TierUse, ...]
    lookup_count: int
    lookup_blocks: int
    hit_blocks: int
    miss_blocks: int
    reasons: dict[Reason, int]
    lease_count: int
    lease_oldest_s: float
    reservation_count: int
    reservation_oldest_s: float
    sessions: tuple[SessionUse, ...]
    routes: tuple[RouteUse, ...]
    namespaces: tuple[NamespaceUse, ...]
    corrupt_count: int
    corrupt: dict[str, int]  # copies, by what was wrong
    scrub: ScrubUse
    stored_blocks: int
    evicted_blocks: int
    events_revision: int
    native_kernels: bool
    recovered_blocks: int
    recovery_s: float
    leases_revoked: int
    predecessor_bytes: int

    @property
    def hit_ratio(self) -> float:
        """Blocks found of blocks asked for; 0 when nothing was asked."""
        asked = self.hit_blocks + self.miss_blocks
        return self.hit_blocks / asked if asked else 0.0
