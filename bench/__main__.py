"""`python -m bench`: lists the benches, runs one, or runs all and writes the results down.

    python -m bench                         what there is
    python -m bench lookup [--json] [--quick]
    python -m bench all --write             bench/results/<date>-<machine>.json and .md

Exit status 1 when a figure misses its bar. Does not: measure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.machine import describe
from bench.row import Row, table

BENCHES: Final = (
    "lookup", "lease", "load", "copy", "store", "ssd", "durable", "ledger", "rpc",
    "idle", "restart",
)  # fmt: skip
RESULTS: Final = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="The figures of kvtier.")
    parser.add_argument("bench", nargs="*", choices=[[], *BENCHES, "all"], help="which to run")
    parser.add_argument("--json", action="store_true", help="a JSON list of rows, nothing else")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes; no verdicts")
    parser.add_argument("--write", action="store_true", help=f"also into {RESULTS}")
    given = parser.parse_args(arguments)
    names = BENCHES if "all" in given.bench else tuple(given.bench)
    if not names:
        for name in BENCHES:
            print(f"{name:8} {_first_line(name)}")
        return 0
    machine = describe()
    rows: list[Row] = []
    for name in names:
        started_s = time.monotonic()
        found = run(name, quick=given.quick)
        print(
            f"{name}, {time.monotonic() - started_s:.0f} s",
            table(found),
            "",
            sep="\n",
            file=sys.stderr,
        )
        rows += found
    print(json.dumps([row.plain() for row in rows], indent=1) if given.json else table(rows))
    if given.write:
        write(rows, machine | {"load_1m_after": os.getloadavg()[0]})
    return 1 if any(row.ok is False for row in rows) else 0


def run(name: str, *, quick: bool) -> list[Row]:
    """The rows of one bench."""
    rows: list[Row] = importlib.import_module(f"bench.{name}").run(quick=quick)
    return rows


def write(rows: Sequence[Row], machine: dict[str, Any], folder: Path = RESULTS) -> Path:
    """The results as JSON and, for people, as Markdown beside it; returns the former's path."""
    folder.mkdir(exist_ok=True)
    host = re.sub(r"[^a-z0-9]+", "-", f"{platform.node()}-{machine['cores']}c".lower()).strip("-")
    path = folder / f"{time.strftime('%Y-%m-%d')}-{host}.json"
    content = {"machine": machine, "rows": [row.plain() for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# {path.stem}", "", "Made by `python -m bench all --write`.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    path.with_suffix(".md").write_text("\n".join([*lines, "", table(rows), ""]))
    return path


def _first_line(name: str) -> str:
    documentation = importlib.import_module(f"bench.{name}").__doc__ or ""
    return documentation.split("\n", 1)[0]


if __name__ == "__main__":
    # Daemons and directories go with us, also when somebody stops us.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
