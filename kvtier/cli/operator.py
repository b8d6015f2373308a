"""The commands that ask or tell a running daemon; each is one call on its admin socket.

Does not: start a daemon or read its configuration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtier.cli.app import USAGE, AdminSocket, Json, Socket, Yes, fail, open_admin, print_json
from kvtier.errors import DaemonUnavailable, NotFound
from kvtier.units import format_bytes

if TYPE_CHECKING:
    from kvtier.client.admin import AdminClient

_PAGE_BLOCKS = 1000
_DIGEST_PREFIX_MIN = 4
Space = Annotated[str, typer.Argument(metavar="NAMESPACE", help="Its id, or start of its digest.")]
KeyList = Annotated[list[str], typer.Argument(metavar="KEYHEX...", help="Keys, in hex.")]
Timeout = Annotated[float, typer.Option("--timeout-s", min=0.0, help="Seconds to wait at most.")]


def stat(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh in place.")] = False,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Refreshes until it ends; 0: never.")] = 0,
    namespaces_max: Annotated[int, typer.Option(min=1, help="Namespaces listed.")] = 10,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Where every byte is: tiers, hits and misses, leases, sessions, moves, namespaces."""
    from kvtier.cli import render
    from kvtier.cli.plain import plain_stat

    with open_admin(socket, admin_socket) as admin:
        if not watch:
            answer = plain_stat(admin.stat(namespaces_max=namespaces_max))
            print_json(answer) if as_json else render.console().print(render.stat(answer))
        elif as_json:
            for number in _refreshes(count, interval_s):
                del number
                print_json(plain_stat(admin.stat(namespaces_max=namespaces_max)))
        else:
            _watch(admin, count, interval_s, namespaces_max)


def namespaces(
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Name the fields in which two namespaces differ."),
    ] = None,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """All namespaces; --diff A B answers the first question at a hit rate of 0 %."""
    from kvtier.cli import render

    with open_admin(socket, admin_socket) as admin:
        entries = _namespaces(admin)
    if diff is None:
        print_json({"namespaces": entries}) if as_json else _print(render.namespaces(entries))
        return
    one, other = (_named(entries, name) for name in diff)
    names = {*one["fields"], *other["fields"]}
    fields = sorted(n for n in names if one["fields"].get(n) != other["fields"].get(n))
    if as_json:
        values = {n: [one["fields"].get(n), other["fields"].get(n)] for n in fields}
        print_json({"a": one["id"], "b": other["id"], "differ": fields, "values": values})
    elif fields:
        typer.echo(f"They differ in: {', '.join(fields)}. Their keys never meet.")
        _print(render.difference(one, other, fields))
    else:
        typer.echo("They do not differ.")


def blocks(
    space: Space,
    limit: Annotated[int, typer.Option(min=1, help="Blocks listed at most.")] = 100,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Blocks of a namespace: key, parent, tiers, leases, pins."""
    from kvtier.cli import render
    from kvtier.cli.plain import plain

    listed: list[dict[str, Any]] = []
    with open_admin(socket, admin_socket) as admin:
        namespace_id = _id(admin, space)
        token, more = "", True
        while more and len(listed) < limit:
            size = min(_PAGE_BLOCKS, limit - len(listed))
            page = admin.blocks(namespace_id, page_size=size, page_token=token)
            listed += [plain(block) for block in page.blocks]
            token = page.next_page_token
            more = bool(token)
    if as_json:
        print_json({"namespace_id": namespace_id, "blocks": listed, "more": more})
        return
    _print(render.blocks(listed))
    if more:
        typer.echo(f"The first {len(listed):,}; --limit lists more.")


def evict(
    space: Space,
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEYHEX...]")] = None,
    yes: Yes = False,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Forgets blocks and all that follow them; without keys, the whole namespace."""
    wanted = _keys(keys or [])
    with open_admin(socket, admin_socket) as admin:
        namespace_id = _id(admin, space)
        if not wanted and not yes:
            _confirm(f"Forget every block of namespace {namespace_id}?")
        evicted = admin.evict(namespace_id, wanted or None).evicted_count
    _say(as_json, {"evicted_blocks": evicted}, f"{evicted:,} blocks forgotten.")


def pin(
    space: Space,
    keys: KeyList,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Keeps blocks from being forgotten until they are unpinned."""
    with open_admin(socket, admin_socket) as admin:
        pinned = admin.pin(_id(admin, space), _keys(keys)).block_count
    _say(as_json, {"pinned_blocks": pinned}, f"{pinned:,} blocks pinned.")


def unpin(
    space: Space,
    keys: KeyList,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Undoes one pin of the same blocks."""
    with open_admin(socket, admin_socket) as admin:
        unpinned = admin.unpin(_id(admin, space), _keys(keys)).block_count
    _say(as_json, {"unpinned_blocks": unpinned}, f"{unpinned:,} blocks unpinned.")


def drain(
    undo: Annotated[bool, typer.Option("--undo", help="Take stores again.")] = False,
    timeout_s: Timeout = 0.0,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Stops taking stores and writes everything to the SSD tier; lookups go on."""
    with open_admin(socket, admin_socket) as admin:
        answer = admin.undrain() if undo else admin.drain(timeout_s)
    _flushed(as_json, "Stores are taken again." if undo else "Drained", answer, undo)


def flush(
    timeout_s: Timeout = 60.0,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Writes what is only in memory to the SSD tier, durably."""
    with open_admin(socket, admin_socket) as admin:
        answer = admin.flush(timeout_s)
    _flushed(as_json, "Flushed", answer, False)


def heal(as_json: Json = False, socket: Socket = "", admin_socket: AdminSocket = "") -> None:
    """Tries a degraded SSD tier at once; it heals by itself, but after a pause."""
    with open_admin(socket, admin_socket) as admin:
        before = admin.heal().state
    _say(as_json, {"before": before, "state": "serving"}, f"The SSD tier serves (was {before}).")


def purge(
    space: Space,
    yes: Yes = False,
    timeout_s: Timeout = 10.0,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Destroys a namespace: its blocks, and its key or its bytes on disk."""
    with open_admin(socket, admin_socket) as admin:
        entry = _named(_namespaces(admin), space)
        name = f"namespace {entry['id']} (tenant {entry['stat']['tenant']}, "
        name += f"model {entry['stat']['model']}, {entry['stat']['block_count']:,} blocks)"
        if not yes:
            _confirm(f"Destroy {name} for good?")
        done = admin.purge(int(entry["id"]), timeout_s)
    record = {
        "namespace_id": entry["id"],
        "digest": entry["digest"],
        "purged_blocks": done.block_count,
        "key_destroyed": done.key_destroyed,
        "wiped_bytes": done.wiped_bytes,
    }
    how = ["its key destroyed"] if done.key_destroyed else []
    how += [f"{format_bytes(done.wiped_bytes)} overwritten"] if done.wiped_bytes else []
    text = f"{done.block_count:,} blocks of namespace {entry['id']} are gone"
    _say(as_json, record, f"{text}, {' and '.join(how)}." if how else f"{text}.")


def bypass(
    state: Annotated[str, typer.Argument(metavar="on|off")],
    namespace: Annotated[str, typer.Option(help="Only this one: id or digest.")] = "",
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """Every lookup misses and nothing is stored, without touching an engine; and back."""
    if state not in ("on", "off"):
        fail(f"bypass is on or off, not {state!r}", status=USAGE)
    with open_admin(socket, admin_socket) as admin:
        namespace_id = _id(admin, namespace) if namespace else 0
        is_on = admin.bypass(on=state == "on", namespace_id=namespace_id).on
    where = f"namespace {namespace_id}" if namespace else "the whole daemon"
    _say(as_json, {"on": is_on, "namespace_id": namespace_id}, f"Bypass is {state} for {where}.")


def check(as_json: Json = False, socket: Socket = "", admin_socket: AdminSocket = "") -> None:
    """Runs every invariant check of the daemon's books; status 1 when one does not hold."""
    with open_admin(socket, admin_socket) as admin:
        answer = admin.check()
    problems = list(answer.problems)
    text = "\n".join(["The daemon's books disagree:", *problems]) if problems else "All hold."
    _say(as_json, {"ok": answer.ok, "problems": problems}, text)
    if not answer.ok:
        raise typer.Exit(1)


def health(as_json: Json = False, socket: Socket = "", admin_socket: AdminSocket = "") -> None:
    """Whether the daemon serves; status 0 when it does, 4 when not: for probes."""
    with open_admin(socket, admin_socket) as admin:
        serving = admin.stat().state != "draining"
    text = "serving" if serving else "not serving"
    _say(as_json, {"serving": serving}, text)
    if not serving:
        raise typer.Exit(DaemonUnavailable.exit_status)


def _namespaces(admin: AdminClient) -> list[dict[str, Any]]:
    from kvtier.cli.plain import plain

    entries = [plain(entry) for entry in admin.namespaces().namespaces]
    return [{"id": entry["stat"]["namespace_id"], **entry} for entry in entries]


def _named(entries: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The namespace of this id, or the only one whose digest starts so."""
    for entry in entries:
        if name == str(entry["id"]):
            return entry
    short = len(name) < _DIGEST_PREFIX_MIN
    found = [] if short else [e for e in entries if e["digest"].startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise NotFound(f"{len(found)} namespaces have a digest that starts with {name}")
    raise NotFound(f"no namespace {name}; `kvtier namespaces` lists ids and digests")


def _id(admin: AdminClient, name: str) -> int:
    return int(_named(_namespaces(admin), name)["id"])


def _keys(texts: Sequence[str]) -> list[bytes]:
    try:
        return [bytes.fromhex(text) for text in texts]
    except ValueError:
        fail("a key is not hexadecimal; `kvtier blocks NAMESPACE` lists keys", status=USAGE)
        return []


def _confirm(question: str) -> None:
    import sys

    if not sys.stdin.isatty():
        fail(f"{question} There is no terminal to answer; say --yes", status=USAGE)
    typer.confirm(question, abort=True)


def _print(renderable: Any) -> None:
    from kvtier.cli import render

    render.console().print(renderable)


def _say(as_json: bool, record: dict[str, Any], text: str) -> None:
    print_json(record) if as_json else typer.echo(text)


def _flushed(as_json: bool, act: str, answer: Any, undo: bool) -> None:
    flushed, remaining = answer.flushed_blocks, answer.remaining_blocks
    text = act if undo else f"{act}: {flushed:,} blocks written."
    if remaining and not undo:
        text += f" {remaining:,} are still only in memory: wait longer (--timeout-s)."
    _say(as_json, {"flushed_blocks": flushed, "remaining_blocks": remaining}, text)
    if remaining and not undo:
        raise typer.Exit(1)


def _refreshes(count: int, interval_s: float) -> Any:
    """0, 1, ... with pauses between; `count` of them, or for ever."""
    number = 0
    while not count or number < count:
        if number:
            time.sleep(interval_s)
        yield number
        number += 1


def _watch(admin: AdminClient, count: int, interval_s: float, namespaces_max: int) -> None:
    """Refreshes in place; a daemon that goes away is waited for."""
    from rich.live import Live

    from kvtier.cli import render
    from kvtier.cli.plain import plain_stat

    with Live(console=render.console(), auto_refresh=False) as live:
        for number in _refreshes(count, interval_s):
            try:
                answer = plain_stat(admin.stat(namespaces_max=namespaces_max))
            except DaemonUnavailable as error:
                if not number:
                    raise
                live.update(f"waiting for the daemon: {error}", refresh=True)
                continue
            live.update(render.stat(answer), refresh=True)
