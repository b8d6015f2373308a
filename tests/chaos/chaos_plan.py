"""What a run of the chaos tests was asked for: a seed, a size, and how to ask for it again.

    CHAOS_SEED    chooses every random thing (1 unless set: CI repeats itself)
    CHAOS_SIZE    multiplies every count (1 unless set: the size of CI)
    CHAOS_COUNT   the count of the one part that runs, instead of its own times the size

`python -m tests.chaos PART --seed N --size X --count N` sets them.
"""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SIZE = float(os.environ.get("CHAOS_SIZE", "1"))
COUNT = int(os.environ.get("CHAOS_COUNT", "0"))
# Of a test; 0 (none) for what is as long as it was asked to be.
TIMEOUT_S = 900 if SIZE <= 1 and not COUNT else 0


def count_of(count: int) -> int:
    """How many of what CI does `count` times."""
    return COUNT or max(1, round(count * SIZE))


def dice(*names: object) -> random.Random:
    """Random numbers of the seed and of these names, the same in every process."""
    return random.Random("/".join(map(str, (SEED, *names))))


def command_of(part: str) -> str:
    """What repeats this part of the run."""
    count = f" --count {COUNT}" if COUNT else ""
    return f"python -m tests.chaos {part} --seed {SEED} --size {SIZE:g}{count}"
