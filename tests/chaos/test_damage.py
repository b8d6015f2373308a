"""Bits flip, slots move, files end early or come from the past: misses, and never a wrong byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos_damage import CHAINS, KINDS, damage
from chaos_nursery import Nursery
from chaos_oracle import BLOCKS
from chaos_plan import TIMEOUT_S, count_of, dice

pytestmark = pytest.mark.timeout(TIMEOUT_S)
LANES = 2
FLIPS = 10_000
SINGLE = 80  # lives with one flipped bit each; the others have hundreds
BATCH = 200
WHOLE = 3 * CHAINS * BLOCKS


@dataclass(frozen=True)
class Case:
    """One life after one kind of damage, so many times."""

    number: int
    kind: str
    count: int
    clean: bool


def flips(total: int) -> Iterator[Case]:
    """As many flipped bits, of which some in lives with one only."""
    number = 0
    while total > 0:
        kind = ("flip-slab", "flip-slab", "flip-catalogue", "flip-small")[number % 4]
        count = 1 if number < SINGLE else BATCH * 2 if kind == "flip-slab" else 3
        yield Case(number, kind, min(count, total), number // 4 % 2 == 0)
        total -= count
        number += 1


def others(count: int) -> Iterator[Case]:
    """Each other kind, as often."""
    kinds = [kind for kind in KINDS if not kind.startswith("flip")]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        yield Case(number, kind, 1 + number // len(kinds) % 3, number // len(kinds) % 2 == 0)


def survive_all(place: Path, cases: list[Case], plant: str = "") -> tuple[list[str], int]:
    """Problems of all, and how many blocks came back."""
    problems: list[str] = []
    blocks = 0
    with Nursery(place / "log") as nursery:
        for name in ("clean", "unclean"):
            (place / name).mkdir()
            nursery.live("chaos_survivor:prepare", str(place / name), name == "clean")
        for case in cases:
            image = place / ("clean" if case.clean else "unclean")
            work = image / "now"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(image / "new", work)
            damage(work / "state", case.kind, case.count, dice("damage", case.kind, case.number))
            gone_stays = case.count == 1 and not case.kind.startswith(("replay", "copy"))
            nursery.begin("chaos_survivor:survive", str(work), gone_stays, CHAOS_PLANT=plant)
            status = nursery.end()
            said = nursery.said().splitlines()
            problems += [f"{case}: {line}" for line in said if line.startswith("PROBLEM")]
            if status != 0:
                problems.append(f"{case}: status {status}: " + "\n".join(said[-2:]))
            blocks += sum(int(line.split()[1]) for line in said if line.startswith("blocks "))
    return problems, blocks


def in_lanes(tmp_path: Path, cases: list[Case], plant: str = "") -> tuple[list[str], int]:
    places = [tmp_path / str(lane) for lane in range(LANES)]
    for place in places:
        place.mkdir()
    with ThreadPoolExecutor(LANES) as pool:
        parts = [(places[lane], cases[lane::LANES], plant) for lane in range(LANES)]
        done = list(pool.map(lambda part: survive_all(*part), parts))
    return [problem for problems, _ in done for problem in problems], sum(b for _, b in done)


def told(problems: list[str]) -> str:
    """The first ones, with the end of what their lives said."""
    return f"{len(problems)} problems\n" + "\n".join(problem for problem in problems[:30])


def test_flipped_bits(tmp_path: Path) -> None:
    cases = list(flips(count_of(FLIPS)))
    problems, blocks = in_lanes(tmp_path, cases)
    assert not problems, told(problems)
    print(json.dumps({"flips": sum(c.count for c in cases), "lives": len(cases), "blocks": blocks}))  # noqa: T201
    # A harness in which everything is a miss would find nothing.
    assert blocks > 0.3 * WHOLE * min(len(cases), SINGLE) / 2


def test_other_damage(tmp_path: Path) -> None:
    cases = list(others(count_of(80)))
    problems, blocks = in_lanes(tmp_path, cases)
    assert not problems, told(problems)
    assert blocks
