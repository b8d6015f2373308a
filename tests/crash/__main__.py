"""The crash-state harness by hand: `python -m tests.crash --seed 1 --states 1000000`.

Exit status 1 and the violations when there are any. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import crash_plants
from crash_check import check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first life's")
    parser.add_argument("--states", type=int, default=20_000, help="how many to recover")
    parser.add_argument("--steps", type=int, default=120, help="acts of a life")
    plants = (*crash_plants.WRITING, *crash_plants.READING)
    parser.add_argument("--plant", default="", choices=("", *plants), help="a bug to be caught")
    parser.add_argument("--folder", default="/dev/shm", help="where images are laid down")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        verdict = check(
            options.seed, options.states, steps=options.steps, folder=Path(folder),
            plant=options.plant,
        )  # fmt: skip
    elapsed = time.monotonic() - began
    sys.stdout.write(
        f"seed {options.seed}: {verdict.states:,} states in {elapsed:.0f} s, "
        f"{len(verdict.problems)} violations\n"
    )
    sys.stdout.writelines(f"{problem}\n" for problem in verdict.problems[:100])
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
