"""SIGKILL anywhere: what was promised is there, what was forgotten is not, no byte is wrong.

A child runs the store; this process, which is not killed, keeps the oracle.
"""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chaos_nursery import ROOT, Nursery
from chaos_oracle import Oracle
from chaos_plan import TIMEOUT_S, count_of, dice

from kvtier.testing.failpoints import POINTS

pytestmark = pytest.mark.timeout(TIMEOUT_S)
LANES = 2
LIVES_PER_DIRECTORY = 20  # so that the roomy tier never fills and checks stay short


class Lives:
    """Lives of a store on one directory, most of them ended by a kill."""

    def __init__(self, place: Path, nursery: Nursery, seed: object, *, tight: bool) -> None:
        place.mkdir()
        self.place, self.nursery, self.seed, self.tight = place, nursery, str(seed), tight
        self.oracle = Oracle(tight=tight)
        self.count = 0

    def begin(self, task: str, *arguments: Any, **environment: str) -> None:
        self.count += 1
        told = self.place / "oracle.json"
        told.write_text(json.dumps(self.oracle.allowed()))
        self.nursery.begin(
            task, str(self.place / "node"), *arguments, str(told), self.tight, **environment
        )

    def end(self, status: int, *expected: int) -> None:
        """The life is over: what it said must be no problem, and is learned."""
        said = self.nursery.said()
        assert status in expected, f"life {self.count}: status {status}: {said}"
        lines = said.splitlines()
        problems = [line for line in lines if line.startswith("PROBLEM")]
        assert problems == [], f"life {self.count} of {self.place.name}: {problems}"
        self.oracle.learn(lines)

    def random_life(self, rng: random.Random, **environment: str) -> None:
        """Killed while it recovers, or somewhere in its work."""
        life = f"{self.place.name}.{self.count}"
        self.begin("chaos_life:live", self.seed, life, **environment)
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0.0, 0.1))  # on purpose: anywhere
        else:
            alive = self.nursery.until(lambda said: "ready\n" in said)
            assert alive, self.nursery.said()
            time.sleep(rng.uniform(0.0, 0.25))
        self.end(self.nursery.kill(), -signal.SIGKILL)

    def script(self, point: str, nth: int = 1) -> bool:
        """A life that dies there, or, where nothing gets there so often, ends in order: False."""
        prepared(self, point)
        life = f"{self.place.name}.{self.count}"
        self.begin("chaos_life:script", life, KVTIER_FAILPOINT=f"{point}:{nth}")
        status = self.nursery.end()
        self.end(status, 0, -signal.SIGKILL)
        return status != 0

    def only_check(self) -> None:
        self.begin("chaos_life:only_check")
        self.end(self.nursery.end(), 0)


def lane(place: Path, number: int, kills: int) -> Oracle:
    """Kills, one after the other, on directories that are changed now and then."""
    rng = dice("kill", number)
    total = Oracle()
    with Nursery(place / f"lane-{number}.log") as nursery:
        for first in range(0, kills, LIVES_PER_DIRECTORY):
            tight = (first // LIVES_PER_DIRECTORY + number) % 3 == 2
            where = place / f"lane-{number}-{first}"
            lives = Lives(where, nursery, f"{number}/{first}", tight=tight)
            for _ in range(min(LIVES_PER_DIRECTORY, kills - first)):
                lives.random_life(rng)
            lives.only_check()
            total.kept += lives.oracle.kept
            total.gone += lives.oracle.gone
    return total


def test_kill_anywhere(tmp_path: Path) -> None:
    kills = count_of(200)
    with ThreadPoolExecutor(LANES) as pool:
        lanes = range(LANES)
        done = list(pool.map(lambda n: lane(tmp_path, n, -(-kills // LANES)), lanes))
    # A loaded machine gets less done between two kills; nothing done would prove nothing.
    assert sum(oracle.kept for oracle in done) > kills // 10
    assert sum(oracle.gone for oracle in done) > kills // 10


# --- failpoints


def prepared(lives: Lives, point: str) -> None:
    """The directory as it must be for this failpoint to be met in the next life."""
    catalogue = lives.place / "node" / "state" / "catalogue"
    if point.startswith("rebuild"):
        for file in catalogue.iterdir():
            file.unlink()
    if point == "slab.shrink":
        for slab in catalogue.parent.glob("slabs/*.slab"):
            os.truncate(slab, slab.stat().st_size + 4096)
    if point.startswith("aside"):
        with (catalogue / "data.mdb").open("r+b") as file:
            file.write(bytes(16384))


NEEDS_FULL = ("slab.emptied", "slab.unnamed", "slab.cut")
RECOVERY = [point for point in POINTS if point.startswith(("recover", "file", "catalogue.begin"))]


def kill_at_points(place: Path, part: int) -> list[str]:
    """One life dies at each failpoint, the next while it recovers. Returns those never reached."""
    rng = dice("failpoints", part)
    never = []
    with Nursery(place / f"points-{part}.log") as nursery:
        roomy = Lives(place / f"roomy-{part}", nursery, part, tight=False)
        tight = Lives(place / f"tight-{part}", nursery, part, tight=True)
        for lives in (roomy, tight):
            assert lives.script("move.written")
        for number, point in enumerate(POINTS):
            if number % LANES != part:
                continue
            lives = tight if point.startswith(NEEDS_FULL) else roomy
            if not (lives.script(point, rng.choice((1, 2, 5))) or lives.script(point)):
                never.append(point)
            lives.script(RECOVERY[(number + rng.randrange(2)) % len(RECOVERY)])
        for lives in (roomy, tight):
            lives.only_check()
    return never


def test_kill_at_every_failpoint_and_again_while_recovering(tmp_path: Path) -> None:
    for turn in range(count_of(1)):
        place = tmp_path / str(turn)
        place.mkdir()
        with ThreadPoolExecutor(LANES) as pool:
            never = list(pool.map(kill_at_points, [place] * LANES, range(LANES)))
        assert never == [[]] * LANES, "failpoints that nothing reaches"


def test_every_failpoint_is_in_the_list_and_in_the_code() -> None:
    reached = set()
    for path in (ROOT / "kvtier").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "reach"
            ):
                [name] = node.args
                assert isinstance(name, ast.Constant), f"{path}: a name that cannot be searched for"
                reached.add(name.value)
    assert reached == POINTS.keys()
    assert len(POINTS) >= 40
