"""SIGKILL anywhere: what was promised is there, what was forgotten is not, no byte is wrong.

A child runs the store; this process, which is not killed, keeps the oracle. `KVTIER_CHAOS_KILLS`
and `KVTIER_CHAOS_SEED` choose how many kills and which.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos_child import BLOCKS

KILLS = int(os.environ.get("KVTIER_CHAOS_KILLS", "10"))
SEED = int(os.environ.get("KVTIER_CHAOS_SEED", "0")) or random.randrange(1, 1 << 31)
CHILD = Path(__file__).with_name("chaos_child.py")
ROOT = CHILD.parent.parent.parent


class Oracle:
    """What the answers of all lives so far allow: space -> chain -> [least, most] blocks."""

    def __init__(self) -> None:
        self.allowed: dict[str, dict[str, list[int]]] = {}
        self.kept = self.gone = 0

    def learn(self, lines: list[str]) -> None:
        for line in lines:
            verb, *words = line.split()
            if verb in ("ready", "PROBLEM"):
                continue
            chains = self.allowed.setdefault(words[0], {})
            if verb == "begin":
                chains[words[1]] = [0, BLOCKS]
            elif verb == "done" and words[2] == "durable":
                chains[words[1]][0] = BLOCKS
                self.kept += 1
            elif verb == "evict":
                chains[words[1]][0] = min(chains[words[1]][0], int(words[2]))
            elif verb == "evicted":
                chains[words[1]][1] = min(chains[words[1]][1], int(words[2]))
                self.gone += 1
            elif verb == "clear":
                for bounds in chains.values():
                    bounds[0] = 0
            elif verb == "cleared":
                for bounds in chains.values():
                    bounds[1] = 0
                self.gone += 1


class Lives:
    """Lives of a store on one directory, each ended by a kill."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        self.place, self.seed = tmp_path, seed
        self.oracle = Oracle()
        self.count = 0

    def live(
        self,
        *,
        run_s: float = 0.0,
        until_line: bytes = b"ready\n",
        times: int = 1,
        failpoint: str = "",
        plant: str = "",
        only_check: bool = False,
    ) -> list[str]:
        """One life, until so many such lines and then for `run_s`; returns its problems."""
        self.count += 1
        told, said = self.place / "oracle.json", self.place / f"life-{self.count}.log"
        told.write_text(json.dumps(self.oracle.allowed))
        command = [sys.executable, str(CHILD), str(self.place / "node"), str(self.seed)]
        command += [str(self.count), str(told), *(["only-check"] if only_check else [])]
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "KVTIER_CHAOS_PLANT": plant,
            "KVTIER_FAILPOINT": failpoint,
        }  # fmt: skip
        errors = self.place / f"life-{self.count}.err"
        with said.open("wb") as out, errors.open("wb") as err:
            child = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        try:
            if failpoint or only_check:
                child.wait(30)
            else:
                until = time.monotonic() + 30
                while said.read_bytes().count(until_line) < times and child.poll() is None:
                    assert time.monotonic() < until, errors.read_text()
                    time.sleep(0.005)
                time.sleep(run_s)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == (0 if only_check else -9), errors.read_text()
        lines = said.read_text().splitlines()
        self.oracle.learn(lines)
        return [line for line in lines if line.startswith("PROBLEM")]


def test_kill_anywhere(tmp_path: Path) -> None:
    print(f"KVTIER_CHAOS_SEED={SEED}")  # noqa: T201 - a failure can be repeated
    lives, rng = Lives(tmp_path, SEED), random.Random(SEED)
    for _ in range(KILLS):
        assert lives.live(run_s=rng.uniform(0.0, 0.5)) == []
    assert lives.live(only_check=True) == []
    assert lives.oracle.kept
    assert lives.oracle.gone


POINTS = ("move.begin", "move.written", "erase.begin", "erase.done", "epoch.begin", "epoch.done")


def test_kill_at_every_failpoint(tmp_path: Path) -> None:
    lives = Lives(tmp_path, SEED)
    for number, point in enumerate(POINTS):
        assert lives.live(failpoint=f"{point}:{1 + (SEED + number) % 3}") == [], point
    assert lives.live(only_check=True) == []


@pytest.mark.parametrize("bug", ["flip", "evict"])
def test_the_harness_finds_planted_bugs(tmp_path: Path, bug: str) -> None:
    lives = Lives(tmp_path, 7)
    lives.live(until_line=b"evicted ", times=30, plant="" if bug == "flip" else bug)
    found = lives.live(only_check=True, plant=bug if bug == "flip" else "")
    assert found, "the harness is broken"
    if bug == "flip":
        assert any("wrong bytes" in line for line in found)
