"""What all commands share: how errors end them, their options, and JSON output.

Exit statuses: 0 done; 1 an error, or findings; 2 wrong usage or configuration; 3 versions do not
meet; 4 no daemon; 5 a device is not usable; 6 another daemon is running (`errors.py` has each).

Does not: import grpc, rich tables or the server: only the command that needs one does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from kvtier.errors import DaemonUnavailable, KvTierError

if TYPE_CHECKING:
    from kvtier.client.admin import AdminClient

USAGE = 2
EPILOG = (
    "Exit status: 0 done, 1 error or findings, 2 wrong usage or configuration, 3 versions do not "
    "meet, 4 no daemon, 5 a device is not usable, 6 another daemon is running."
)


class Commands(TyperGroup):
    """A group whose commands end with one line on stderr and a status, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvTierError as error:
            fail(str(error) or error.reason.lower(), status=error.exit_status)
        except BrokenPipeError:
            # Whoever read our output went away; nothing is wrong, and nobody hears us.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(0) from None


def new_app(**settings: Any) -> typer.Typer:
    """A command group as all of ours are."""
    return typer.Typer(
        cls=Commands, add_completion=False, pretty_exceptions_enable=False, **settings
    )


def fail(message: str, *, status: int) -> None:
    """Ends the command: one line on stderr, and its status."""
    typer.echo(f"kvtier: {' '.join(message.split())}", err=True)
    raise typer.Exit(status)


def print_json(value: Any) -> None:
    """One object on one line, so that `--watch --json` is a line per refresh."""
    typer.echo(json.dumps(value))


Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Socket = Annotated[
    str,
    typer.Option(
        "--socket",
        envvar="KVTIER_SOCKET",
        metavar="PATH",
        help="The daemon's socket; the admin socket lies beside it.",
        show_default=False,
    ),
]
AdminSocket = Annotated[
    str,
    typer.Option(
        "--admin-socket",
        envvar="KVTIER_SERVER_ADMIN_SOCKET",
        metavar="PATH",
        help="The daemon's admin socket, when it lies elsewhere.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="KVTIER_CONFIG",
        metavar="FILE",
        help="Configuration; without one, defaults for this machine.",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def admin_path(socket: str, admin_socket: str) -> Path:
    """The admin socket: the one given, else beside the daemon's socket."""
    if admin_socket:
        return Path(admin_socket.removeprefix("unix:")).expanduser()
    from kvtier.config import default_socket

    environ = {**os.environ, "KVTIER_SOCKET": socket} if socket else os.environ
    return default_socket(environ).parent / "admin.sock"


def open_admin(socket: str, admin_socket: str) -> AdminClient:
    """A connection to the admin socket. Raises DaemonUnavailable when there is no such socket."""
    path = admin_path(socket, admin_socket)
    if not path.exists():
        raise DaemonUnavailable(
            f"no daemon: there is no {path}; start one (kvtier serve), or name its --socket"
        )
    from kvtier.client.admin import AdminClient

    return AdminClient(path)
