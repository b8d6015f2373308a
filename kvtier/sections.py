"""What can be configured: the frozen sections, their keys with defaults, and what contradicts.

A `Config` that exists is consistent: its construction raises when two keys disagree. Does not:
read files or environments (config).
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvtier import machine
from kvtier.errors import ConfigError
from kvtier.settings import about, key
from kvtier.units import GIB, HUGE_PAGE_BYTES, MIB, PAGE_BYTES, align_up

SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path holds 108, with its closing zero
SESSION_SUFFIX = ".session"
_UID_MAX = 2**32 - 2
_MODES = ("auto", "off", "require")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Sockets, who may connect, threads, and limits of a call. Omitted sockets: in runtime_dir."""

    runtime_dir: Path = field(metadata=about("Where sockets live.", shown="/run/kvtier"))
    socket: Path = field(
        default_factory=Path,
        metadata=about("gRPC; sessions: + .session.", shown="/run/kvtier/kvtier.sock"),
    )
    admin_socket: Path = field(
        default_factory=Path, metadata=about("For operators.", shown="/run/kvtier/admin.sock")
    )
    trust: str = key(
        "isolated", "single-tenant: no copy on commit.", choices=("isolated", "single-tenant")
    )
    allowed_uids: tuple[int, ...] = key(
        lambda: (os.getuid(),), "Users, where no [[tenants]] are given.", high=_UID_MAX, shown=[0]
    )
    grace_s: float = key(20.0, "How long calls may take to end after SIGTERM.", live=True)
    rpc_message_bytes_max: int = key(4 * MIB, "Largest message.", low=65536, high=2**31 - 1)
    rpc_concurrency_max: int = key(1024, "Most calls at once; more are refused.")
    sessions_max: int = key(256, "Most attached client processes.")
    watch_events_max: int = key(65536, "Events that a Watch can resume from.")
    copy_threads: int = key(
        lambda: min(2, machine.cpu_count()), "Copy and checksum.", low=1, high=256, shown=2
    )
    io_threads: int = key(4, "Read and write the SSD tier.", low=1, high=256)
    bypass: bool = key(False, "Every lookup misses and nothing is stored.", live=True)
    log_level: str = key(
        "info",
        "Least severe line logged.",
        live=True,
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        for name, file_name in (("socket", "kvtier.sock"), ("admin_socket", "admin.sock")):
            if getattr(self, name) == Path():
                object.__setattr__(self, name, self.runtime_dir / file_name)


@dataclass(frozen=True, slots=True)
class StateConfig:
    """What survives a restart."""

    dir: Path = field(metadata=about("Lock, slabs and catalogue.", shown="/var/lib/kvtier"))

    @property
    def memory_name(self) -> str:
        """What memory of this directory's daemons is called in /proc, to tell it from others'."""
        return hashlib.blake2b(os.fsencode(self.dir.resolve()), digest_size=4).hexdigest()


@dataclass(frozen=True, slots=True)
class DramConfig:
    """Host memory. `segment_bytes` is never 0 once constructed."""

    size_bytes: int = field(metadata=about("0: a quarter of the memory limit.", shown=0))
    segment_bytes: int = key(0, "One arena. 0: 1/64 of the tier, 2 MiB to 1 GiB.")
    high_water: float = key(0.90, "Used share that starts demotion.", live=True, high=1)
    low_water: float = key(0.80, "Used share that ends it.", live=True, high=1)
    huge_pages: str = key("auto", "Huge pages for arenas.", choices=_MODES)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_bytes", _segment_bytes(self, HUGE_PAGE_BYTES))


@dataclass(frozen=True, slots=True)
class SsdConfig:
    """Slab files and catalogue in the state directory. `segment_bytes` as in DramConfig."""

    size_bytes: int = field(
        metadata=about("0: half of the free space - min_free_bytes, at most 64 GiB.", shown=0)
    )
    enabled: bool = key(True, "Whether there is an SSD tier.")
    segment_bytes: int = key(0, "One segment. 0: 1/64 of the tier, 16 MiB to 1 GiB.")
    min_free_bytes: int = key(GIB, "Space of the file system that stays unused.")
    high_water: float = key(0.95, "Used share that starts eviction.", live=True, high=1)
    low_water: float = key(0.90, "Used share that ends it.", live=True, high=1)
    direct_io: str = key("auto", "O_DIRECT for slabs.", choices=_MODES)
    queue_depth_max: int = key(8, "Reads and writes in flight, each way.", low=1, high=128)
    group_commit_s: float = key(0.005, "A commit waits for writers under way.", live=True, high=1)
    group_commit_bytes_max: int = key(128 * MIB, "No longer than for so much.", live=True, low=1)
    sync_every_s: float = key(5.0, "A power cut may undo so much. 0: never synced.", live=True)
    write_bytes_per_day_max: int = key(0, "Then demotion drops. 0: no limit.", live=True, low=0)
    errors_max: int = key(3, "Failures in a row that ask for a probe.", live=True, low=1)
    scrub_bytes_per_s: int = key(64 * MIB, "A scrub reads so much.", live=True, low=MIB)
    scrub_every_s: float = key(604800.0, "From scrub to scrub. 0: only when asked.", live=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_bytes", _segment_bytes(self, 16 * MIB))


@dataclass(frozen=True, slots=True)
class TiersConfig:
    """The tiers, fast to slow."""

    dram: DramConfig
    ssd: SsdConfig


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What may be held, per session or in all. A new value binds what comes after it."""

    write_arena_bytes: int = key(256 * MIB, "Each session's.", live=True, low=PAGE_BYTES)
    leases_per_session_max: int = key(4096, "Leases of a session.", live=True)
    reservations_per_session_max: int = key(1024, "Reservations of a session.", live=True)
    lease_ttl_s: float = key(300.0, "A lease not renewed ends.", live=True, low=0.001)
    reservation_ttl_s: float = key(60.0, "A reservation ends.", live=True, low=0.001)
    request_ids_max: int = key(4096, "Answers kept for repeated requests.", live=True)
    namespaces_max: int = key(4096, "Namespaces of all tenants.", live=True)
    moves_in_flight_max: int = key(1024, "Planned moves between tiers.", live=True)
    placeholders_max: int = key(100_000, "Places kept for lost ancestors.", live=True)
    block_bytes_max: int = key(256 * MIB, "Largest shard of a block.", live=True)


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """Who shares nothing with others. Known by its uids, its own socket, or both."""

    name: str = field(metadata=about("Up to 64 of a-z A-Z 0-9 . _ -", shown="team-a"))
    uids: tuple[int, ...] = key((), "Users; none: all of its own socket.", high=_UID_MAX)
    socket: Path | None = field(
        default=None, metadata=about("Its own.", shown="/run/kvtier-a/kvtier.sock")
    )
    admin: bool = key(False, "Whether it may see and change other tenants.")
    dram_guaranteed_bytes: int = key(0, "DRAM that others cannot evict it from.")
    ssd_guaranteed_bytes: int = key(0, "SSD space that others cannot evict it from.")


@dataclass(frozen=True, slots=True)
class NamespaceConfig:
    """How namespaces are kept; of those that match, the first rule counts. Patterns: * ? [a-z]"""

    tenant: str = key("*", "Tenants it is for.", live=True)
    model: str = key("*", "Models it is for.", live=True)
    encrypt: bool = key(False, "Encrypt new ones on SSD: AES-256-GCM.", live=True)
    max_age_s: float = key(0.0, "Blocks older than that go, wiped. 0: never.", live=True)

    def matches(self, tenant: str, model: str) -> bool:
        """Whether the rule is for namespaces of this tenant and model."""
        return fnmatchcase(tenant, self.tenant) and fnmatchcase(model, self.model)


@dataclass(frozen=True, slots=True)
class EncryptionConfig:
    """The master key: 32 bytes or 64 hex digits in a file (mode 0600), or a systemd credential."""

    key_file: Path | None = field(
        default=None, metadata=about("The key.", shown="/etc/kvtier/master.key")
    )
    key_file_previous: Path | None = field(
        default=None, metadata=about("The key before it.", shown="/etc/kvtier/former.key")
    )
    credential: str | None = field(
        default=None, metadata=about("Name in $CREDENTIALS_DIRECTORY.", shown="kvtier-master")
    )


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What is evicted first."""

    name: str = key("lru", "The eviction policy.", choices=("lru",))


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """The Prometheus endpoint."""

    port: int | None = key(None, "TCP port; none: off.", high=65535, shown=9470)
    host: str = key("127.0.0.1", "Address it listens on.")


@dataclass(frozen=True, slots=True)
class Config:
    """All of it. Without tenants: one, `default`, of allowed_uids. ConfigError: keys disagree."""

    server: ServerConfig
    state: StateConfig
    tiers: TiersConfig
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    encryption: EncryptionConfig = field(default_factory=EncryptionConfig)
    tenants: tuple[TenantConfig, ...] = ()
    namespaces: tuple[NamespaceConfig, ...] = ()

    def rule(self, tenant: str, model: str) -> NamespaceConfig:
        """The first of `namespaces` that matches; else what holds for all others."""
        found = (rule for rule in self.namespaces if rule.matches(tenant, model))
        return next(found, NamespaceConfig())

    def __post_init__(self) -> None:
        if not self.tenants:
            tenants = (TenantConfig("default", uids=self.server.allowed_uids),)
            object.__setattr__(self, "tenants", tenants)
        _check(self)

    @property
    def batches_max(self) -> int:
        """Batches of moves at once on each route: the other I/O threads are for what is urgent."""
        return max(1, self.server.io_threads // 2)


SECTIONS: dict[str, Any] = {
    "server": ServerConfig, "state": StateConfig, "tiers.dram": DramConfig, "tiers.ssd": SsdConfig,
    "limits": LimitsConfig, "policy": PolicyConfig, "metrics": MetricsConfig,
    "encryption": EncryptionConfig,
}  # fmt: skip


def session_socket(socket: Path) -> Path:
    """Where sessions attach (handshake, descriptors), beside the gRPC socket `socket`."""
    return Path(f"{socket}{SESSION_SUFFIX}")


def _segment_bytes(tier: DramConfig | SsdConfig, least: int) -> int:
    automatic = min(max(align_up(tier.size_bytes // 64, HUGE_PAGE_BYTES), least), GIB)
    return tier.segment_bytes or min(automatic, tier.size_bytes)


def _check(config: Config) -> None:
    """Raises ConfigError for the first two keys that disagree."""
    _check_sockets(config)
    _check_tenants(config)
    _check_encryption(config)
    for name, tier in (("tiers.dram", config.tiers.dram), ("tiers.ssd", config.tiers.ssd)):
        enabled = tier is config.tiers.dram or config.tiers.ssd.enabled
        size_bytes = tier.size_bytes if enabled else 0
        if tier.high_water <= tier.low_water:
            raise ConfigError(
                f"{name}.high_water = {tier.high_water}: must be above low_water = {tier.low_water}"
            )
        if enabled and size_bytes < PAGE_BYTES:
            raise ConfigError(f"{name}.size_bytes = {size_bytes}: must be at least {PAGE_BYTES}")
        if enabled and tier.segment_bytes > size_bytes:
            raise ConfigError(
                f"{name}.segment_bytes = {tier.segment_bytes}: must be at most "
                f"{name}.size_bytes = {size_bytes}"
            )
        huge = isinstance(tier, DramConfig) and tier.huge_pages == "require"
        page_bytes = HUGE_PAGE_BYTES if huge else PAGE_BYTES
        if enabled and tier.segment_bytes % page_bytes:
            raise ConfigError(
                f"{name}.segment_bytes = {tier.segment_bytes}: must be a multiple of {page_bytes}"
            )
        guarantee = f"{name.removeprefix('tiers.')}_guaranteed_bytes"
        promised = sum(getattr(tenant, guarantee) for tenant in config.tenants)
        if promised > size_bytes:
            raise ConfigError(
                f"tenants.{guarantee}: all together {promised}, but {name} has {size_bytes}"
            )
    limits = config.limits
    if limits.write_arena_bytes < limits.block_bytes_max:
        raise ConfigError(
            f"limits.write_arena_bytes = {limits.write_arena_bytes}: must hold one block of "
            f"limits.block_bytes_max = {limits.block_bytes_max}"
        )


def _check_encryption(config: Config) -> None:
    given = config.encryption
    if given.key_file is not None and given.credential is not None:
        raise ConfigError("encryption.key_file and encryption.credential: set one of them")
    if given.credential is not None and not re.fullmatch(r"[A-Za-z0-9._@-]+", given.credential):
        raise ConfigError(f"encryption.credential = {given.credential!r}: must be a name, no path")
    has_key = given.key_file is not None or given.credential is not None
    if given.key_file_previous is not None and not has_key:
        raise ConfigError("encryption.key_file_previous: needs the key of now, encryption.key_file")
    for rule in config.namespaces:
        if rule.encrypt and not has_key:
            raise ConfigError(
                f"namespaces.encrypt = True (tenant {rule.tenant!r}, model {rule.model!r}): set "
                "encryption.key_file or encryption.credential"
            )


def _check_sockets(config: Config) -> None:
    sockets = [("server.socket", config.server.socket)]
    sockets += [("server.admin_socket", config.server.admin_socket)]
    sockets += [(f"socket of tenant {t.name}", t.socket) for t in config.tenants if t.socket]
    taken: dict[Path, str] = {}
    for name, socket in sockets:
        length = len(os.fsencode(session_socket(socket)))
        if not socket.is_absolute() or not socket.name:
            raise ConfigError(f"{name} = {str(socket)!r}: must be an absolute path")
        if length > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"{name} = {str(socket)!r}: {length} bytes long with {SESSION_SUFFIX}, at most "
                f"{SOCKET_PATH_BYTES_MAX} are possible; set a shorter path or server.runtime_dir"
            )
        for path in (socket, session_socket(socket)):
            if path in taken:
                raise ConfigError(f"{name} = {str(socket)!r}: {taken[path]} uses {path} already")
            taken[path] = name


def _check_tenants(config: Config) -> None:
    tenants = config.tenants
    if config.server.trust == "single-tenant" and len(tenants) > 1:
        raise ConfigError(f"server.trust = 'single-tenant': there are {len(tenants)} tenants")
    names: set[str] = set()
    owner: dict[int, str] = {}
    for tenant in tenants:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", tenant.name):
            raise ConfigError(
                f"tenants.name = {tenant.name!r}: must be 1 to 64 of A-Z a-z 0-9 . _ -"
            )
        if tenant.name in names:
            raise ConfigError(f"tenants.name = {tenant.name!r}: used twice")
        names.add(tenant.name)
        if tenant.socket is None and not tenant.uids:
            raise ConfigError(f"tenant {tenant.name}: has neither uids nor a socket of its own")
        for uid in tenant.uids if tenant.socket is None else ():
            if owner.setdefault(uid, tenant.name) != tenant.name:
                raise ConfigError(
                    f"tenants.uids: {uid} is in {owner[uid]} and in {tenant.name}; "
                    "give one of them a socket of its own"
                )
