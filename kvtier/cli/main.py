"""The `kvtier` command.

Does not: work. Each command is a function in a file of its own kind, imported when it is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli import operator, upkeep
from kvtier.cli.app import EPILOG, AdminSocket, ConfigFile, Json, Socket, new_app, print_json

app = new_app(
    no_args_is_help=True,
    epilog=EPILOG,
    help="kvtier keeps the KV cache of this node's LLM engines in DRAM and on SSD.",
)
config_app = new_app(no_args_is_help=True, help="Show or check the configuration.")
app.add_typer(config_app, name="config")


@app.callback(invoke_without_command=True)
def kvtier(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """One daemon per node; see `kvtier demo` for what it does."""
    if version:
        from kvtier import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def serve(config: ConfigFile = None) -> None:
    """Runs the daemon until SIGTERM."""
    from kvtier.config import load

    loaded = load(config, os.environ)
    from kvtier.server.daemon import run

    raise typer.Exit(run(loaded, config))


for command in (
    operator.stat,
    operator.blocks,
    operator.namespaces,
    operator.evict,
    operator.pin,
    operator.unpin,
    operator.drain,
    operator.flush,
    operator.heal,
    upkeep.scrub,
    upkeep.resize,
    operator.purge,
    operator.bypass,
    operator.check,
    operator.health,
):
    app.command()(command)


@app.command()
def doctor(
    config: ConfigFile = None,
    as_json: Json = False,
    socket: Socket = "",
    admin_socket: AdminSocket = "",
) -> None:
    """This machine, what lies on disk, the daemon itself, and what to do; status 1: one fails."""
    from kvtier.cli.doctor import examine

    raise typer.Exit(examine(config, socket, admin_socket, as_json=as_json))


@app.command()
def demo(
    as_json: Json = False,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A local Hugging Face model instead of a random one."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the directory behind.")] = False,
) -> None:
    """Two engines, one cache, a restart in between: what kvtier saves, and that output is equal."""
    from kvtier.cli.demo import run_demo

    raise typer.Exit(run_demo(model, keep=keep, as_json=as_json))


@config_app.command("show")
def config_show(config: ConfigFile = None, as_json: Json = False) -> None:
    """The effective configuration: file, environment and this machine's defaults."""
    from kvtier.config import load, to_toml

    loaded = load(config, os.environ)
    if as_json:
        from kvtier.cli.plain import plain

        print_json(plain(loaded))
    else:
        typer.echo(to_toml(loaded))


@config_app.command("check")
def config_check(config: ConfigFile = None, as_json: Json = False) -> None:
    """Whether a daemon would start with it; status 2 and the reason when not."""
    from kvtier.config import load

    load(config, os.environ)
    print_json({"ok": True}) if as_json else typer.echo("The configuration is good.")


@config_app.command("example")
def config_example() -> None:
    """A file with every key, its default and what it means."""
    from kvtier.config import example_toml

    typer.echo(example_toml())


def main() -> None:
    """The entry point of `kvtier` and `python -m kvtier`."""
    app(prog_name="kvtier")
