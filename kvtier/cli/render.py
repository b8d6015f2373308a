"""Plain dictionaries (see plain.py) as rich tables and lines for people.

Does not: ask the daemon anything, or decide what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvtier.units import format_bytes

Plain = Mapping[str, Any]
_WIDTH_MIN = 132  # of output that is not a terminal: a table cut to 80 columns helps nobody
_STATE_STYLE = {"ok": "green", "serving": "green", "warn": "yellow", "fail": "bold red"}


def console(*, stderr: bool = False) -> Console:
    """Where people read; wide enough when it is a file or a pipe."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH_MIN)


def stat(stat: Plain) -> RenderableType:
    """Everything `kvtier stat` shows."""
    parts: list[RenderableType] = [_headline(stat), _tiers(stat["tiers"]), _hits(stat), _held(stat)]
    if stat["routes"]:
        parts.append(_routes(stat["routes"]))
    if stat["sessions"]:
        parts.append(_sessions(stat["sessions"]))
    if stat["namespaces"]:
        parts.append(namespaces(stat["namespaces"], title="Top namespaces"))
    return Group(*parts)


def namespaces(entries: Iterable[Plain], *, title: str = "Namespaces") -> Table:
    """Namespaces by id; `digest` is shown where the answer has it."""
    rows = [{**entry, **entry.get("stat", {})} for entry in entries]
    digests = any(row.get("digest") for row in rows)
    names = (
        ("id", "digest", "tenant", "model", "group")
        if digests
        else ("id", "tenant", "model", "group")
    )
    table = _table(title, *names, right=())
    for name in ("block tokens", "epoch", "blocks", "size", "hits", "hit ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            str(row["namespace_id"]),
            *([str(row["digest"])[:12]] if digests else []),
            row["tenant"],
            row["model"],
            row["group_name"] or "-",
            str(row["block_tokens"]),
            str(row["epoch"]),
            f"{row['block_count']:,}",
            format_bytes(row["size_bytes"]),
            f"{row['hit_blocks']:,}",
            percent(row["hit_blocks"], row["hit_blocks"] + row["miss_blocks"]),
            "bypassed" if row["bypassed"] else "",
        )
    return table


def difference(one: Plain, other: Plain, fields: Iterable[str]) -> RenderableType:
    """Two namespaces, the fields in which they differ side by side."""
    table = _table("", "field", f"namespace {one['id']}", f"namespace {other['id']}", right=())
    for name in fields:
        table.add_row(name, one["fields"].get(name, "-"), other["fields"].get(name, "-"))
    return table


def blocks(entries: Iterable[Plain]) -> Table:
    """Blocks of a namespace."""
    table = _table("", "key", "parent", right=())
    for name in ("position", "size", "leases", "pins"):
        table.add_column(name, justify="right")
    table.add_column("tiers")
    for entry in entries:
        table.add_row(
            entry["key"],
            entry["parent"][:12] or "-",
            str(entry["position"]),
            format_bytes(entry["size_bytes"]),
            str(entry["lease_count"]),
            str(entry["pin_count"]),
            " ".join(entry["tiers"]),
        )
    return table


def findings(entries: Sequence[Plain]) -> Table:
    """The doctor's findings, each with what to do."""
    table = _table("", "", "what", "found", "what to do", right=())
    for entry in entries:
        style = _STATE_STYLE.get(entry["status"], "")
        table.add_row(Text(entry["status"], style), entry["name"], entry["detail"], entry["remedy"])
    return table


def demo_requests(rows: Sequence[Plain]) -> Table:
    """The demo's requests, in order."""
    table = _table("Requests", "#", "conversation", "engine", right=())
    for name in ("prompt tokens", "found", "from"):
        table.add_column(name, justify="right")
    for name in ("TTFT", "without kvtier", "saved"):
        table.add_column(name, justify="right")
    table.add_column("identical ids, logits agree")
    table.add_column("what happened before")
    for number, row in enumerate(rows, 1):
        hit = row["found_tokens"] > 0
        saved = 1 - row["ttft_ms"] / row["ttft_baseline_ms"] if row["ttft_baseline_ms"] else 0.0
        table.add_row(
            str(number),
            f"{row['conversation']}, turn {row['turn']}",
            row["engine"],
            f"{row['prompt_tokens']:,}",
            f"{row['found_tokens']:,}" if hit else "-",
            row["tier"],
            f"{row['ttft_ms']:,.0f} ms",
            f"{row['ttft_baseline_ms']:,.0f} ms",
            Text(f"{saved:.0%}", "bold green") if hit and saved > 0 else "-",
            Text("yes", "green") if row["identical"] else Text("NO", "bold red"),
            Text(row["note"], "cyan" if row["after_restart"] else ""),
        )
    return table


def percent(part: float, whole: float) -> str:
    """`"12.5%"`, or `"-"` of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def duration(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    if hours < 24:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"


def _headline(stat: Plain) -> Text:
    line = Text.assemble(
        ("kvtier ", "bold"),
        stat["version"],
        "  ",
        (stat["state"], _STATE_STYLE.get(stat["state"], "yellow")),
    )
    line.append(f"  pid {stat['pid']}, up {duration(stat['uptime_s'])}, {stat['trust']} trust, ")
    line.append("native kernels" if stat["native_kernels"] else "no native kernels (slower)")
    if stat["recovered_blocks"]:
        line.append(
            f", {stat['recovered_blocks']:,} blocks recovered in {stat['recovery_s']:.2f} s"
        )
    return line


def _tiers(tiers: Iterable[Plain]) -> Table:
    table = _table("Tiers", "tier", right=())
    for name in ("capacity", "used", "", "blocks", "fragmentation", "in", "out", "in/s", "out/s"):
        table.add_column(name, justify="right")
    for name in ("written in 24 h", "block hits", "errors"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for tier in tiers:
        table.add_row(
            tier["tier"],
            format_bytes(tier["capacity_bytes"]),
            format_bytes(tier["used_bytes"]),
            percent(tier["used_bytes"], tier["capacity_bytes"]),
            f"{tier['block_count']:,}",
            f"{tier['fragmentation']:.1%}",
            format_bytes(tier["in_bytes"]),
            format_bytes(tier["out_bytes"]),
            f"{tier['in_bytes_per_s'] / 1e9:.2f} GB/s",
            f"{tier['out_bytes_per_s'] / 1e9:.2f} GB/s",
            format_bytes(tier["written_day_bytes"]) if tier["written_day_bytes"] else "-",
            f"{tier['hit_blocks']:,}",
            f"{tier['error_count']:,}",
            Text(tier["state"], _STATE_STYLE.get(tier["state"], "")),
        )
    return table


def _hits(stat: Plain) -> Text:
    asked = stat["hit_blocks"] + stat["miss_blocks"]
    by_tier = ", ".join(
        f"{t['tier']} {t['hit_blocks']:,}" for t in stat["tiers"] if t["hit_blocks"]
    )
    line = Text.assemble(
        ("Hits      ", "bold"),
        f"{stat['hit_blocks']:,} of {asked:,} blocks ({percent(stat['hit_blocks'], asked)})",
        f" in {stat['lookup_count']:,} lookups",
        f"; by tier: {by_tier}" if by_tier else "",
    )
    reasons = {name: count for name, count in stat["reasons"].items() if name != "none" and count}
    shown = ", ".join(f"{name} {count:,}" for name, count in reasons.items())
    line.append("\nMisses    ", "bold")
    line.append(f"{stat['miss_blocks']:,} blocks; lookups by what ended them: {shown or '-'}")
    return line


def _held(stat: Plain) -> Text:
    moves = sum(route["in_flight"] for route in stat["routes"])
    queued = sum(route["queued"] for route in stat["routes"])
    line = Text.assemble(
        ("Held      ", "bold"),
        f"{stat['lease_count']:,} leases (oldest {duration(stat['lease_oldest_s'])}), ",
        f"{stat['reservation_count']:,} reservations ",
        f"(oldest {duration(stat['reservation_oldest_s'])}), ",
        f"{len(stat['sessions']):,} sessions, {moves:,} moves in flight, {queued:,} queued",
    )
    line.append("\nBlocks    ", "bold")
    line.append(f"{stat['stored_blocks']:,} stored, {stat['evicted_blocks']:,} evicted, ")
    line.append(f"{stat['corrupt_count']:,} corrupt, {stat['leases_revoked']:,} leases revoked")
    if stat["predecessor_bytes"]:
        held = format_bytes(stat["predecessor_bytes"])
        line.append(f"\n          {held} are still held by clients of a dead predecessor", "yellow")
    return line


def _routes(routes: Iterable[Plain]) -> Table:
    columns = ("in flight", "queued", "moved", "bytes", "failed")
    table = _table("Moves", "route", right=columns)
    for route in routes:
        table.add_row(
            route["route"],
            f"{route['in_flight']:,}",
            f"{route['queued']:,}",
            f"{route['move_count']:,}",
            format_bytes(route["size_bytes"]),
            f"{route['failed_count']:,}",
        )
    return table


def _sessions(sessions: Iterable[Plain]) -> Table:
    table = _table(
        "Sessions", "client", "tenant", "group", right=("pid", "leases", "reservations", "age")
    )
    for session in sessions:
        table.add_row(
            session["client_name"] or "-",
            session["tenant"],
            session["group"] or "-",
            str(session["pid"]),
            f"{session['lease_count']:,}",
            f"{session['reservation_count']:,}",
            duration(session["age_s"]),
        )
    return table


def _table(title: str, *left: str, right: Sequence[str]) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table
