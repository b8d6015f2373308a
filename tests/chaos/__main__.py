"""Runs one part of the chaos tests, or all, in another size: `python -m tests.chaos kill --help`.

What comes after `--` goes to pytest.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PARTS = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.py"))


def main(arguments: list[str]) -> int:
    more: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, more = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=float, default=1.0, help="times the counts of CI")
    parser.add_argument("--count", type=int, default=0, help="so many kills, flips, clients")
    parser.add_argument("--seconds", type=float, default=None, help="of the soak")
    wanted = parser.parse_args(arguments)
    os.environ |= {
        "CHAOS_SEED": str(wanted.seed),
        "CHAOS_SIZE": f"{wanted.size:g}",
        "CHAOS_COUNT": str(wanted.count),
    }
    if wanted.seconds is not None:
        os.environ["CHAOS_SOAK_S"] = f"{wanted.seconds:g}"
    where = HERE if wanted.part == "all" else HERE / f"test_{wanted.part}.py"
    # Only -s shows the summaries of long runs as they come.
    return int(pytest.main([str(where), "-s", *more]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
