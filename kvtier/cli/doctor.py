"""`kvtier doctor`: what this machine offers, and what the daemon says of its own invariants.

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
    findings = machine_findings(config_file) + daemon_findings(admin_path(socket, admin_socket))
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


def daemon_findings(path: Path) -> list[Found]:
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
        if tier.error_count or tier.state != "serving":
            detail = f"state {tier.state or 'unknown'}, {tier.error_count} errors"
            detail += f": {tier.detail}" if tier.detail else ""
            remedy = "look at its device and the log"
            remedy += "; kvtier heal tries it at once" if tier.state == "degraded" else ""
            found.append(_found(_tier(tier), "warn", detail, remedy))
    if not stat.native_kernels:
        remedy = "install a wheel, or reinstall with a C++ compiler"
        found.append(_found("daemon's kernels", "warn", "absent: copies are slower", remedy))
    return found


def _tier(tier: Any) -> str:
    from kvtier.cli.plain import plain

    return f"tier {plain(tier)['tier']}"


def _found(name: str, status: str, detail: str, remedy: str = "") -> Found:
    return {"name": name, "status": status, "detail": detail, "remedy": remedy}
