"""The configuration: one TOML file, environment overrides, and what a running daemon may change.

The sections are declared in `sections.py` and offered here too. Does not: create directories, bind
sockets or hold anything that changes.
"""

from __future__ import annotations

import os
import re
from dataclasses import Field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier import machine
from kvtier.errors import ConfigError
from kvtier.sections import (
    SECTIONS,
    SESSION_SUFFIX,
    SOCKET_PATH_BYTES_MAX,
    Config,
    DramConfig,
    EncryptionConfig,
    LimitsConfig,
    MetricsConfig,
    NamespaceConfig,
    PolicyConfig,
    ServerConfig,
    SsdConfig,
    StateConfig,
    TenantConfig,
    TiersConfig,
    session_socket,
)
from kvtier.settings import example_lines, flatten, from_text, parse, part, toml_lines, unknown
from kvtier.units import GIB, HUGE_PAGE_BYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ENVIRONMENT_ALLOWED", "SECTIONS", "SESSION_SUFFIX", "SOCKET_PATH_BYTES_MAX", "Config",
    "DramConfig", "EncryptionConfig", "LimitsConfig", "MetricsConfig", "NamespaceConfig",
    "PolicyConfig", "ServerConfig", "SsdConfig", "StateConfig", "TenantConfig", "TiersConfig",
    "default_socket", "describe_changes",
    "example_toml", "load", "session_socket", "to_toml", "with_live_changes",
]  # fmt: skip

# Names in the environment that are ours but no key of the file.
ENVIRONMENT_ALLOWED = ("KVTIER_NATIVE", "KVTIER_SOCKET", "KVTIER_CONFIG", "KVTIER_FAILPOINT")
# What Kubernetes puts into every pod beside a service called kvtier or kvtier-metrics.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP)|=(tcp|udp)://")
_SSD_BYTES_DEFAULT_MAX = 64 * GIB
_TIER_BYTES_DEFAULT_MIN = 64 * MIB
_KEYS = {f"{s}.{f.name}": f for s, section in SECTIONS.items() for f in fields(section)}
# What is written as tables of its own, [[tenants]]: its class, and what each must have.
_ARRAYS: dict[str, tuple[Any, str]] = {
    "tenants": (TenantConfig, "name"), "namespaces": (NamespaceConfig, "")
}  # fmt: skip
_Arrays = dict[str, tuple[Any, ...]]


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    running: Config | None = None,
    root: Path = machine.ROOT,
) -> Config:
    """The configuration of `path` (else of $KVTIER_CONFIG, else of defaults), then of `environ`.

    With `running` (SIGHUP), tier sizes that nobody set stay as they are instead of following the
    free memory and space of this moment.

    Raises:
        ConfigError: names key, value and what is accepted. Nothing was changed.
        DeviceUnavailable: this machine's memory or disk cannot be measured.
    """
    file = path or (Path(environ["KVTIER_CONFIG"]) if environ.get("KVTIER_CONFIG") else None)
    given, arrays = _read_file(file) if file else ({}, {})
    names = {"KVTIER_" + name.upper().replace(".", "_"): name for name in _KEYS}
    for name, text in environ.items():
        if not name.startswith("KVTIER_") or _KUBERNETES.search(f"{name}={text}"):
            continue
        if name in names:
            declared = _KEYS[names[name]]
            given[names[name]] = parse(declared, from_text(declared, text), name)
        elif name not in ENVIRONMENT_ALLOWED:
            raise unknown(name, [*names, *ENVIRONMENT_ALLOWED])
    _complete(given, environ, running, root)
    return _assemble({name: SECTIONS[name](**part(given, name)) for name in SECTIONS}, arrays)


def default_socket(environ: Mapping[str, str]) -> Path:
    """Where a client looks and a daemon listens when no file says: the same for both."""
    given = environ.get("KVTIER_SOCKET") or environ.get("KVTIER_SERVER_SOCKET")
    if given:
        return Path(re.sub(r"^unix:(//(?=/))?", "", given)).expanduser()
    runtime = environ.get("KVTIER_SERVER_RUNTIME_DIR")
    return (Path(runtime).expanduser() if runtime else _runtime_dir(environ)) / "kvtier.sock"


def to_toml(config: Config) -> str:
    """A file that `load` turns into an equal Config: every key, in bytes and seconds."""
    lines: list[str] = []
    for name in SECTIONS:
        lines += [f"[{name}]", *toml_lines(attrgetter(name)(config)), ""]
    for name in _ARRAYS:
        for table in getattr(config, name):
            lines += [f"[[{name}]]", *toml_lines(table), ""]
    return "\n".join(lines)


def example_toml() -> str:
    """The committed example: every key, commented out, with its default (or a typical value)."""
    lines = ['# Every key of kvtier with its default. Sizes: 4096 or "64MiB"; _s: seconds.']
    lines += ["# The environment overrides: KVTIER_SERVER_GRACE_S=5. (live): SIGHUP is enough.", ""]
    for name, section in SECTIONS.items():
        lines += [f"# {section.__doc__}", f"[{name}]", *example_lines(section), ""]
    for name, (kind, _) in _ARRAYS.items():
        lines += [f"# {kind.__doc__}", f"# [[{name}]]", *example_lines(kind), ""]
    return "\n".join(lines)


def describe_changes(old: Config, new: Config) -> list[tuple[str, bool]]:
    """Each key whose value differs, and whether a running daemon can take the new one."""
    changes = [
        (name, "live" in declared.metadata)
        for name, declared in _KEYS.items()
        if attrgetter(name)(old) != attrgetter(name)(new)
    ]
    arrays = [(name, name == "namespaces") for name in _ARRAYS]
    return changes + [(n, live) for n, live in arrays if getattr(old, n) != getattr(new, n)]


def with_live_changes(old: Config, new: Config) -> Config:
    """`old`, with what may change live taken from `new`. ConfigError: the mixture contradicts."""
    live = [name for name, is_live in describe_changes(old, new) if is_live]
    changed = {name: attrgetter(name)(new) for name in live}
    sections = {s: replace(attrgetter(s)(old), **part(changed, s)) for s in SECTIONS}
    return _assemble(sections, {"tenants": old.tenants, "namespaces": new.namespaces})


def _assemble(sections: dict[str, Any], arrays: _Arrays) -> Config:
    tiers = TiersConfig(sections.pop("tiers.dram"), sections.pop("tiers.ssd"))
    return Config(**sections, **arrays, tiers=tiers)  # type: ignore[arg-type]


def _read_file(path: Path) -> tuple[dict[str, Any], _Arrays]:
    import tomllib  # not for clients, which only ask for default_socket

    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    arrays = {name: _tables(name, tree.pop(name, [])) for name in _ARRAYS}
    return _parsed(flatten(tree, {*SECTIONS, "tiers"}), _KEYS), arrays


def _tables(name: str, tables: Any) -> tuple[Any, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        one = name.removesuffix("s")
        raise ConfigError(f"{name}: write each {one} as a table of its own, [[{name}]]")
    kind, needed = _ARRAYS[name]
    known = {f"{name}.{declared.name}": declared for declared in fields(kind)}
    made = []
    for table in tables:
        values = _parsed(flatten(table, set(), f"{name}."), known)
        if needed and f"{name}.{needed}" not in values:
            raise ConfigError(f"{name}.{needed}: every one of [[{name}]] needs a {needed}")
        made.append(kind(**part(values, name)))
    return tuple(made)


def _parsed(flat: dict[str, Any], known: dict[str, Field[Any]]) -> dict[str, Any]:
    for name, value in flat.items():
        if name in (*SECTIONS, "tiers"):
            raise ConfigError(f"{name} = {value!r}: must be a table, [{name}]")
        if name not in known:
            raise unknown(name, list(known))
    return {name: parse(known[name], value, name) for name, value in flat.items()}


def _runtime_dir(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_RUNTIME_DIR", "")
    fallback = "/run/kvtier" if os.getuid() == 0 else f"/tmp/kvtier-{os.getuid()}"  # noqa: S108
    return Path(base, "kvtier") if base.startswith("/") else Path(fallback)


def _state_dir(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/") and os.getuid() == 0:
        return Path("/var/lib/kvtier")
    home = environ.get("HOME") or str(Path.home())
    return Path(base if base.startswith("/") else f"{home}/.local/state", "kvtier")


def _complete(
    given: dict[str, Any], environ: Mapping[str, str], running: Config | None, root: Path
) -> None:
    """Adds what depends on environment and machine to the keys that were given."""
    given.setdefault("server.runtime_dir", _runtime_dir(environ))
    if environ.get("KVTIER_SOCKET"):
        given.setdefault("server.socket", default_socket(environ))
    state_dir = given.setdefault("state.dir", _state_dir(environ))
    if not given.get("tiers.dram.size_bytes"):
        limit = machine.memory_limit_bytes(root)
        free = machine.memory_available_bytes(root) - limit // 8  # headroom for everything else
        measured = max(_TIER_BYTES_DEFAULT_MIN, min(limit // 4, free))
        size_bytes = running.tiers.dram.size_bytes if running else measured
        given["tiers.dram.size_bytes"] = size_bytes - size_bytes % HUGE_PAGE_BYTES
    size_bytes = given.setdefault("tiers.ssd.size_bytes", 0)
    if size_bytes or not given.get("tiers.ssd.enabled", True):
        return
    if running and running.tiers.ssd.enabled:
        size_bytes = running.tiers.ssd.size_bytes
    else:
        # What the tier itself holds counts as free, or it would shrink with every restart.
        free = machine.file_system(state_dir, root).free_bytes + machine.directory_bytes(state_dir)
        reserve = given.get("tiers.ssd.min_free_bytes", GIB)
        size_bytes = min(_SSD_BYTES_DEFAULT_MAX, free // 2 - reserve)
        size_bytes -= size_bytes % HUGE_PAGE_BYTES
    if size_bytes >= _TIER_BYTES_DEFAULT_MIN:
        given["tiers.ssd.size_bytes"] = size_bytes
    elif given.setdefault("tiers.ssd.enabled", False):
        raise ConfigError(
            f"tiers.ssd.enabled = True: no room below {state_dir} (half of the free space less "
            "tiers.ssd.min_free_bytes); set tiers.ssd.size_bytes, state.dir or enabled = false"
        )
