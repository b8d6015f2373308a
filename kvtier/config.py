"""The configuration: frozen sections, one TOML file, environment overrides, and what may change live.

A `Config` that exists is consistent: contradictions raise when it is built, wrong values when they
are read. Every key carries its documentation; `deploy/kvtier.example.toml` is written from it.

Does not: create directories, bind sockets or hold anything that changes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kvtier import machine
from kvtier.errors import ConfigError
from kvtier.units import GIB, HUGE_PAGE_BYTES, MIB, PAGE_BYTES, align_up, format_bytes, parse_bytes

# sockaddr_un.sun_path is 108 bytes with its closing zero.
SOCKET_PATH_BYTES_MAX = 107
SESSION_SUFFIX = ".session"
# Names in the environment that are ours but no key of this file.
ENVIRONMENT_ALLOWED = ("KVTIER_NATIVE", "KVTIER_SOCKET", "KVTIER_CONFIG", "KVTIER_FAILPOINT")
_DISK_BYTES_DEFAULT_MAX = 64 * GIB
_TIER_BYTES_DEFAULT_MIN = 64 * MIB
_UID_MAX = 2**32 - 2
_MODES = ("auto", "off", "require")
# A Kubernetes service called kvtier puts these into every pod beside it; they are not for us.
_KUBERNETES_NAME = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)")
_T = TypeVar("_T")


def _about(
    doc: str,
    *,
    live: bool = False,
    low: float = 0,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    shown: str = "",
) -> dict[str, Any]:
    """A key's documentation and rules. `shown`: its line in the example when it has no fixed default."""
    bounds = (low, high)
    return {"doc": doc, "live": live, "bounds": bounds, "choices": choices, "shown": shown}


def _key(default: Any, doc: str, **about: Any) -> Any:
    """A field with a default, or with a function that makes one, and what `_about` takes."""
    if callable(default):
        return field(default_factory=default, metadata=_about(doc, **about))
    return field(default=default, metadata=_about(doc, **about))


def session_socket(socket: Path) -> Path:
    """Where the session socket (handshake and file descriptors) beside a gRPC socket lies."""
    return socket.with_name(socket.name + SESSION_SUFFIX)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """[server]: sockets, who may connect, threads, and limits of a call."""

    runtime_dir: Path = field(
        metadata=_about("Where sockets live.", shown='"/run/kvtier"  # or $XDG_RUNTIME_DIR/kvtier')
    )
    # An empty path means: beside the others, in runtime_dir (set on construction).
    socket: Path = _key(
        Path, "The gRPC socket; sessions attach at this path + .session.",
        shown='"/run/kvtier/kvtier.sock"  # runtime_dir/kvtier.sock',
    )  # fmt: skip
    admin_socket: Path = _key(
        Path, "The socket of operators.", shown='"/run/kvtier/admin.sock"  # runtime_dir/admin.sock'
    )
    trust: str = _key(
        "isolated", "single-tenant skips the copy on commit and trusts every client's bytes.",
        choices=("isolated", "single-tenant"),
    )  # fmt: skip
    allowed_uids: tuple[int, ...] = _key(
        lambda: (os.getuid(),), "Users of the tenant `default`, when no [[tenants]] is given.",
        high=_UID_MAX, shown="[1000]  # the daemon's own user",
    )  # fmt: skip
    admin_uids: tuple[int, ...] = _key(
        lambda: tuple(sorted({0, os.getuid()})), "Users who may use the admin socket.",
        high=_UID_MAX, shown="[0, 1000]  # root and the daemon's own user",
    )  # fmt: skip
    grace_s: float = _key(20.0, "After SIGTERM, how long what is in flight may take.", live=True)
    lookup_deadline_s: float = _key(
        0.05, "A lookup without a deadline of its own answers by then.", live=True, low=0.0001
    )
    rpc_message_bytes_max: int = _key(
        4 * MIB, "Largest message.", low=64 * 1024, high=2**31 - 1
    )
    keys_per_call_max: int = _key(65536, "Most keys in one call.", low=1, high=65536)
    rpc_concurrency_max: int = _key(1024, "Most calls at once; more wait.", low=1)
    sessions_max: int = _key(256, "Most attached client processes.", low=1)
    watch_events_max: int = _key(65536, "Events a Watch can resume from.", low=1)
    copy_threads: int = _key(
        lambda: min(2, machine.cpu_count()), "Threads that copy and checksum.", low=1, high=256,
        shown="2  # at most the number of CPUs",
    )  # fmt: skip
    io_threads: int = _key(4, "Threads that read and write the SSD tier.", low=1, high=256)
    bypass: bool = _key(False, "Answer every lookup with a miss and store nothing.", live=True)
    log_level: str = _key(
        "info", "How much is logged.", live=True, choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for name, file_name in (("socket", "kvtier.sock"), ("admin_socket", "admin.sock")):
            if getattr(self, name) == Path():
                object.__setattr__(self, name, self.runtime_dir / file_name)


@dataclass(frozen=True, slots=True)
class StateConfig:
    """[state]: what survives a restart."""

    dir: Path = field(
        metadata=_about(
            "Lock, slabs and catalogue; on the SSD meant for the cache.",
            shown='"/var/lib/kvtier"  # or $XDG_STATE_HOME/kvtier, ~/.local/state/kvtier',
        )
    )


@dataclass(frozen=True, slots=True)
class DramConfig:
    """[tiers.dram]: host memory."""

    size_bytes: int = field(
        metadata=_about(
            "Size of the tier. 0: a quarter of the machine's or container's memory limit.",
            shown="0  # automatic",
        )
    )
    segment_bytes: int = _key(0, "Size of one arena. 0: 1/64 of the tier, 2 MiB to 1 GiB.")
    high_water: float = _key(0.90, "Used share that starts demotion.", live=True, high=1)
    low_water: float = _key(0.80, "Used share that ends demotion.", live=True, high=1)
    huge_pages: str = _key("auto", "Huge pages for the arenas.", choices=_MODES)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_bytes", _segment_bytes(self, HUGE_PAGE_BYTES))


@dataclass(frozen=True, slots=True)
class SsdConfig:
    """[tiers.ssd]: slab files and catalogue below state.dir."""

    size_bytes: int = field(
        metadata=_about(
            "Size of the tier. 0: half of the free space less min_free_bytes, at most 64 GiB.",
            shown="0  # automatic",
        )
    )
    enabled: bool = _key(True, "Whether there is an SSD tier.")
    segment_bytes: int = _key(0, "Size of one segment. 0: 1/64 of the tier, 16 MiB to 1 GiB.")
    min_free_bytes: int = _key(GIB, "Space on the file system that is never used.")
    high_water: float = _key(0.95, "Used share that starts eviction.", live=True, high=1)
    low_water: float = _key(0.90, "Used share that ends eviction.", live=True, high=1)
    direct_io: str = _key("auto", "O_DIRECT for the slabs.", choices=_MODES)
    sync_interval_ms: int = _key(50, "Written bytes are synced at least this often.", low=1)
    sync_bytes_max: int = _key(256 * MIB, "Written bytes that force a sync.", low=MIB)
    queue_depth_max: int = _key(64, "Reads and writes in flight.", low=1, high=4096)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_bytes", _segment_bytes(self, 16 * MIB))


@dataclass(frozen=True, slots=True)
class TiersConfig:
    """The tiers, fast to slow."""

    dram: DramConfig
    ssd: SsdConfig


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """[limits]: what one client, or all together, may hold. New values bind what comes after."""

    write_arena_bytes: int = _key(256 * MIB, "Each session's.", live=True, low=PAGE_BYTES)
    block_bytes_max: int = _key(256 * MIB, "Largest shard of a block.", live=True, low=1)
    leases_per_session_max: int = _key(4096, "Leases a session holds.", live=True, low=1)
    reservations_per_session_max: int = _key(1024, "Reservations it holds.", live=True, low=1)
    lease_ttl_s: float = _key(300.0, "A lease not renewed ends then.", live=True, low=0.001)
    reservation_ttl_s: float = _key(60.0, "A reservation ends then.", live=True, low=0.001)
    request_ids_max: int = _key(4096, "Answers kept per session for retries.", live=True, low=1)
    namespaces_max: int = _key(4096, "Namespaces of all tenants.", live=True, low=1)
    moves_in_flight_max: int = _key(1024, "Planned moves between tiers.", live=True, low=1)
    placeholders_max: int = _key(100_000, "Places kept for lost ancestors.", live=True)


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """[[tenants]]: who shares nothing with the others."""

    name: str = field(metadata=_about("Its name, in metrics too.", shown='"team-a"'))
    uids: tuple[int, ...] = _key(
        (), "Its users on the common socket; with a socket of its own: the only users there "
        "(none: whoever can open it).", high=_UID_MAX,
    )  # fmt: skip
    socket: Path | None = _key(
        None, "A socket of its own, to mount into its pods.", shown='"/run/kvtier-a/kvtier.sock"'
    )
    admin: bool = _key(False, "Whether its sessions may see and change other tenants.")
    dram_guaranteed_bytes: int = _key(0, "DRAM no other tenant evicts it from.")
    ssd_guaranteed_bytes: int = _key(0, "SSD space no other tenant evicts it from.")


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """[policy]: what is evicted first."""

    name: str = _key("lru", "The eviction policy.", choices=("lru",))


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """[metrics]: the Prometheus endpoint."""

    port: int | None = _key(None, "Its TCP port; without one: off.", high=65535, shown="9470")
    host: str = _key("127.0.0.1", "The address it listens on.")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration. Construction raises ConfigError when two keys disagree."""

    server: ServerConfig
    state: StateConfig
    tiers: TiersConfig
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tenants: tuple[TenantConfig, ...] = ()

    def __post_init__(self) -> None:
        if not self.tenants:
            default = TenantConfig("default", uids=self.server.allowed_uids)
            object.__setattr__(self, "tenants", (default,))
        _check(self)
