"""`kvtier scrub` and `kvtier resize`: what an operator does to the SSD tier of a running daemon.

Does not: touch files itself; the daemon does.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from kvtier.cli.app import USAGE, AdminSocket, Json, Socket, fail, open_admin, print_json
from kvtier.units import format_bytes, parse_bytes

_LOOK_S = 0.5


def scrub(
    rate: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Bytes read a second, like 100MiB; else tiers.ssd.scrub_bytes_per_s.",
            show_default=False,
        ),
    ] = "",
    status: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the one under way.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Reads all of the SSD tier and drops what is damaged; status 1 when something was.

    It goes on in the background (see --status, --wait). Also by itself: tiers.ssd.scrub_every_s.
    """
    if status + stop > 1 or (rate and (status or stop)):
        fail("--rate, --status and --stop exclude one another", status=USAGE)
    bytes_per_s = _size(rate) if rate else 0
    with open_admin(socket, admin_socket) as admin:
        if stop:
            answer = admin.stop_scrub()
        elif status:
            answer = admin.scrub()
        else:
            answer = admin.start_scrub(bytes_per_s)
        while wait and answer.state != "idle":
            time.sleep(_LOOK_S)
            answer = admin.scrub()
    from kvtier.cli.plain import plain

    said: dict[str, Any] = plain(answer)
    said["damaged"] = {entry["damage"]: entry["count"] for entry in said["damaged"]}
    print_json(said) if as_json else typer.echo(_scrub_text(said))
    if said["damaged"]:
        raise typer.Exit(1)


def _scrub_text(said: dict[str, Any]) -> str:
    from kvtier.cli.render import duration

    lines = []
    if said["state"] == "idle" and not said["elapsed_s"] and not said["ended_s"]:
        lines.append("The SSD tier was never scrubbed.")
    elif said["state"] == "idle":
        how = said["detail"] or "all of it was read"
        lines.append(f"The last scrub took {duration(said['elapsed_s'])}: {how}.")
    else:
        begun = "by itself" if said["scheduled"] else "as asked for"
        rate = format_bytes(said["bytes_per_s"])
        why = f" ({said['detail']})" if said["detail"] else ""
        lines.append(f"A scrub is {said['state']}{why}: {said['progress']:.0%}.")
        lines.append(f"It began {begun}, reads at most {rate} a second; see kvtier scrub --status.")
    if said["state"] != "idle" or said["elapsed_s"]:
        lines.append(f"{said['block_count']:,} blocks read, {format_bytes(said['read_bytes'])}.")
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in said["damaged"].items())
        lines.append(f"Damaged copies dropped: {kinds or 'none'}.")
        if said["stray_count"]:
            lines.append(f"Headers of forgotten blocks wiped: {said['stray_count']:,}.")
    if said["ended_s"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(said["ended_s"]))
        lines.append(f"Everything was last read by {when}.")
    if said["next_in_s"]:
        lines.append(f"The next one begins by itself in {duration(said['next_in_s'])}.")
    return "\n".join(lines)


def resize(
    tier: Annotated[str, typer.Argument(metavar="TIER", help="ssd.")],
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Like 100GiB, or bytes.")],
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Gives the SSD tier another size while it serves, until the next start of the daemon.

    Smaller: the least valuable blocks go, others move, then files are deleted. Pinned and leased
    blocks stay, or it is refused. At a restart the configuration decides: change it there, too.
    """
    from kvtier.block import TierId

    tiers = {one.label: one for one in TierId}
    if tier not in tiers:
        fail(f"no tier {tier!r}: {', '.join(tiers)}", status=USAGE)
    size_bytes = _size(size)
    with open_admin(socket, admin_socket) as admin:
        answer = admin.resize(tiers[tier], size_bytes)
    from kvtier.cli.plain import plain

    done = plain(answer)
    size_now, former = format_bytes(done["size_bytes"]), format_bytes(done["former_bytes"])
    counts = f"{done['moved_blocks']:,} blocks moved, {done['evicted_blocks']:,} evicted"
    lines = [f"The {tier} tier has {size_now} (had {former}): {counts}."]
    if done["size_bytes"] != done["configured_bytes"]:
        lines.append(
            f"Until the next start only: there the configuration decides, which says "
            f"{format_bytes(done['configured_bytes'])} (tiers.{tier}.size_bytes)."
        )
    print_json(done) if as_json else typer.echo("\n".join(lines))


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        fail(f"{text!r} is no size: {error}", status=USAGE)
        return 0
