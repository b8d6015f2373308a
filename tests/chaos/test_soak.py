"""Mixed load for as long as asked: nothing grows, no byte is wrong, the books agree at the end.

`CHAOS_SOAK_S` seconds (20 unless set; CI also soaks for 300; twelve hours:
`python -m tests.chaos soak --seconds 43200`). Clients are told to go, or killed, and others come.
The first third is warm-up; medians of the sixth after it and of the last sixth are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from chaos_plan import SEED, dice
from daemons import ENVIRONMENT, Daemon, eventually

from kvtier.units import MIB

SOAK_S = float(os.environ.get("CHAOS_SOAK_S", "20"))
pytestmark = pytest.mark.timeout(SOAK_S + 600)
SOAKER = Path(__file__).with_name("chaos_soaker.py")
CLIENTS = 3
# What may be more at the end than after the warm-up. Memory: the allocator's arenas; a leak of a
# hundred bytes a request is a hundred times that in twelve hours.
GROWTH_MAX = {"memory_bytes": 64 * MIB, "fds": 24, "threads": 16, "leases": 40, "reservations": 20}


class Crowd:
    """The clients: so many at any time."""

    def __init__(self, daemon: Daemon, place: Path, rng: random.Random) -> None:
        self.daemon, self.place, self.rng = daemon, place, rng
        self.done: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._number = 0
        self._members: list[tuple[subprocess.Popen[str], Path, float]] = []

    def keep_up(self) -> None:
        """Ends those whose time is over, starts others."""
        now_s = time.monotonic()
        for member in list(self._members):
            process, _, until_s = member
            if process.poll() is not None:
                raise AssertionError(f"a client failed: {self._said(member)}")
            if now_s >= until_s:
                self._end(member)
        while len(self._members) < CLIENTS:
            self._number += 1
            log = self.place / f"client-{self._number}.log"
            # Names repeat: the daemon's namespaces stay, so their number must not grow.
            name = f"n{self._number % 5}-{self._number}"
            with log.open("wb") as out:
                command = [sys.executable, str(SOAKER), str(self.daemon.folder)]
                process = subprocess.Popen(
                    [*command, f"{SEED}/{name}", name[:2]],
                    stdin=subprocess.PIPE, stdout=out, stderr=out, text=True, env=ENVIRONMENT,
                )  # fmt: skip
            life_s = self.rng.uniform(0.15, 0.5) * min(SOAK_S, 120.0)
            self._members.append((process, log, now_s + life_s))

    def _end(self, member: tuple[subprocess.Popen[str], Path, float]) -> None:
        process, log, _ = member
        self._members.remove(member)
        if self.rng.random() < 0.5:
            self.ends["killed"] += 1
            process.kill()
            process.communicate()
        else:
            self.ends["told to go"] += 1
            process.communicate(timeout=120)
            assert process.returncode == 0, self._said(member)
        for line in reversed(self._said(member).splitlines()):
            with contextlib.suppress(ValueError):
                self.done.update(json.loads(line))
                break
        log.unlink()

    @staticmethod
    def _said(member: tuple[subprocess.Popen[str], Path, float]) -> str:
        return member[1].read_text(errors="replace")

    def close(self) -> None:
        for member in list(self._members):
            self._end(member)


def sample(daemon: Daemon) -> dict[str, float]:
    """What must not grow."""
    place = Path(f"/proc/{daemon.process.pid}")
    status = (place / "status").read_text()
    stat = daemon.stat()
    return {
        "memory_bytes": int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) * 1024,
        "fds": len(list((place / "fd").iterdir())),
        "threads": len(list((place / "task").iterdir())),
        "leases": stat.lease_count,
        "reservations": stat.reservation_count,
        **{f"tier_{tier.tier}_bytes": tier.used_bytes for tier in stat.tiers},
    }


def growth(samples: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each: the median after the warm-up and that at the end."""
    sixth = max(len(samples) // 6, 1)
    early, late = samples[2 * sixth : 3 * sixth] or samples[-1:], samples[-sixth:]
    return {
        name: (median(s[name] for s in early), median(s[name] for s in late)) for name in samples[0]
    }


def load(daemon: Daemon, crowd: Crowd) -> list[dict[str, float]]:
    """Runs the crowd for the time; what was sampled."""
    samples = []
    started_s = time.monotonic()
    every_s = min(max(SOAK_S / 200, 0.25), 10.0)
    while (now_s := time.monotonic()) < started_s + SOAK_S:
        crowd.keep_up()
        assert daemon.running, daemon.log[-4000:]
        samples.append(sample(daemon))
        if len(samples) % 20 == 0:
            check = daemon.admin.check()
            assert check.ok, check.problems
        time.sleep(max(0.0, every_s - (time.monotonic() - now_s)))
    return samples


def test_nothing_grows_under_mixed_load(tmp_path: Path) -> None:
    daemon = Daemon(
        dram={"size_bytes": "48MiB", "segment_bytes": "1MiB"},
        ssd={"size_bytes": "128MiB", "segment_bytes": "4MiB", "min_free_bytes": 0},
        limits={"write_arena_bytes": "4MiB", "block_bytes_max": "1MiB", "lease_ttl_s": 20.0},
    )
    crowd = Crowd(daemon, tmp_path, dice("soak"))
    try:
        daemon.start()
        before = sample(daemon)
        samples = load(daemon, crowd)
        crowd.close()
        grown = growth(samples)
        print(json.dumps(summary(crowd, grown, len(samples)), indent=1))  # noqa: T201
        assert crowd.done["WRONG BYTES"] == 0
        assert crowd.done["read blocks"] > 100
        for name, most in GROWTH_MAX.items():
            early, late = grown[name]
            assert late - early <= most, f"{name} grew from {early} to {late}"
        assert_all_given_back(daemon, before)
        assert daemon.stop() == 0, daemon.log[-4000:]
        assert " ERROR " not in daemon.log
    finally:
        crowd.close()
        daemon.close()


def assert_all_given_back(daemon: Daemon, before: dict[str, float]) -> None:
    """No client is left, no block: then nothing is in use."""
    eventually(lambda: daemon.held() == (0, 0, 0), 30.0)
    check = daemon.admin.check()
    assert check.ok, check.problems
    eventually(lambda: sample(daemon)["fds"] <= before["fds"] + 80, 30.0)  # slabs are open now
    for entry in daemon.admin.namespaces().namespaces:
        daemon.admin.evict(entry.stat.namespace_id)
    eventually(lambda: all(tier.used_bytes == 0 for tier in daemon.stat().tiers), 60.0)
    check = daemon.admin.check()
    assert check.ok, check.problems


def summary(crowd: Crowd, grown: dict[str, Any], samples: int) -> dict[str, Any]:
    """What was done and what it left."""
    return {
        "soak_s": SOAK_S,
        "seed": SEED,
        "samples": samples,
        "clients": dict(crowd.ends),
        "done": dict(sorted(crowd.done.items())),
        "after warm-up, at the end": grown,
    }
