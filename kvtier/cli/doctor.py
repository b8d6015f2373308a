"""`kvtier doctor`: this machine, what lies on disk, and what the daemon says of its own invariants.

Does not: repair anything. Every finding that is not ok says what to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvtier.cli.app import admin_path, print_json
from kvtier.errors import DaemonUnavailable, KvTierError

Found = dict[str, Any]


def examine(config_file: Path | None, socket: str, admin_socket: str, *, as_json: bool) -> int:
    """Prints all findings; returns 1 when one of them is a failure, else 0.

    Raises:
        ConfigError: the configuration, against which the machine is held, is wrong.
    """
    findings = machine_findings(config_file) + disk_findings(config_file)
    findings += daemon_findings(admin_path(socket, admin_socket), config_file)
    failed = [finding for finding in findings if finding["status"] == "fail"]
    if as_json:
        print_json({"ok": not failed, "findings": findings})
    else:
        from kvtier.cli import render

        render.console().print(render.findings(findings))
    return 1 if failed else 0


def machine_findings(config_file: Path | None) -> list[Found]:
    """What this machine offers a daemon with this configuration."""
    from kvtier import native
    from kvtier.cli.plain import plain
    from kvtier.config import load
    from kvtier.findings import findings

    config = load(config_file, os.environ)
    return [plain(f) for f in findings(config, native_kernel=native.capabilities().native)]


def disk_findings(config_file: Path | None) -> list[Found]:
    """What lies in the state directory of this configuration."""
    from kvtier.cli.plain import plain
    from kvtier.config import load
    from kvtier.state_findings import state_findings

    return [plain(f) for f in state_findings(load(config_file, os.environ))]


def daemon_findings(path: Path, config_file: Path | None = None) -> list[Found]:
    """What the daemon says of itself: whether it serves, its invariants, its losses."""
    from kvtier.client.admin import AdminClient

    with AdminClient(path) as admin:
        try:
            stat, check = admin.stat(), admin.check()
        except DaemonUnavailable as error:
            return [_found("daemon", "warn", str(error), "start it: kvtier serve")]
        except KvTierError as error:
            return [_found("daemon", "fail", str(error), "look at its log")]
    found = [_found("daemon", "ok", f"pid {stat.pid}, version {stat.version}, {stat.state}")]
    if stat.state != "serving":
        remedy = "kvtier drain --undo" if stat.state == "draining" else "kvtier bypass off"
        found[0] = {**found[0], "status": "warn", "remedy": remedy}
    if check.ok:
        found.append(_found("invariants", "ok", "all hold"))
    else:
        remedy = "stop the daemon (kvtier drain first), keep its log and report it"
        found += [_found("invariants", "fail", problem, remedy) for problem in check.problems]
    if stat.corrupt_count:
        remedy = "dropped, not served: check the disk (smartctl) and memory (ECC counters)"
        kinds = ", ".join(f"{each.damage} {each.count}" for each in stat.corrupt)
        detail = f"{stat.corrupt_count} copies since its start ({kinds or 'unknown'})"
        found.append(_found("damage", "warn", detail, remedy))
    for tier in stat.tiers:
        found += _tier_findings(tier) + _size_findings(tier, config_file)
    if not stat.native_kernels:
        remedy = "install a wheel, or reinstall with a C++ compiler"
        found.append(_found("daemon's kernels", "warn", "absent: copies are slower", remedy))
    return found


# Of a tier that does not simply serve: what it is like, and what to do.
_STATES = {
    "degraded": (
        "takes no new copies, what it has is read, DRAM serves",
        "look at its device and the log; it is tried again by itself, kvtier heal does at once",
    ),
    "failed": (
        "could not be read at the start, DRAM serves alone",
        "look at its device and the log; it is tried again by itself, kvtier heal does at once",
    ),
    "recovering": ("still reads what it has; lookups answer with what is known", "wait"),
}


def _tier_findings(tier: Any) -> list[Found]:
    from kvtier.cli.plain import plain

    if not tier.error_count and tier.state == "serving":
        return []
    what, remedy = _STATES.get(tier.state, ("", "look at its device and the log"))
    detail = f"state {tier.state or 'unknown'}, {tier.error_count} errors"
    detail += f": {what}" if what else ""
    detail += f" ({tier.detail})" if tier.detail else ""
    return [_found(f"tier {plain(tier)['tier']}", "warn", detail, remedy)]


def _size_findings(tier: Any, config_file: Path | None) -> list[Found]:
    """Of an SSD tier that was resized live: the configuration says another size."""
    from kvtier.cli.plain import plain
    from kvtier.config import load

    ssd = load(config_file, os.environ).tiers.ssd
    configured = ssd.size_bytes // ssd.segment_bytes
    # A size that nobody set follows the free space of this moment: it says nothing.
    if plain(tier)["tier"] != "ssd" or tier.segment_count == configured or config_file is None:
        return []
    detail = f"{tier.segment_count} segments now, the configuration says {configured}"
    remedy = "the configuration decides at the next start: set tiers.ssd.size_bytes there, too"
    return [_found("tier ssd", "warn", detail, remedy)]


def _found(name: str, status: str, detail: str, remedy: str = "") -> Found:
    return {"name": name, "status": status, "detail": detail, "remedy": remedy}
