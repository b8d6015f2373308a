"""Every kind of call fails, once and for ever, at each place: no promise breaks, and it heals."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos_files import ERRORS
from chaos_nursery import Nursery
from chaos_plan import COUNT, SIZE, TIMEOUT_S

pytestmark = pytest.mark.timeout(TIMEOUT_S)
LANES = 2
CASES = [(operation, how) for operation, hows in ERRORS.items() for how in hows]
# CI looks where things change; the large size at every call, until the workload runs clean.
SOME = [1, 2, 4, 10, 40]
FEW = [1, 5]  # errors that are no different to us


def numbers(how: str) -> list[int]:
    if SIZE >= 10 or COUNT:
        return list(range(1, COUNT or 2000))
    return FEW if how in ("ENOSPC", "EDQUOT", "EMFILE") else SOME


def lane(place: Path, number: int) -> tuple[int, list[str]]:
    place.mkdir()
    problems: list[str] = []
    struck = 0
    with Nursery(place / "log") as nursery:
        for operation, how in CASES[number::LANES]:
            nursery.begin("chaos_faults:fail", str(place), operation, how, numbers(how))
            status = nursery.end(3600.0)
            lines = nursery.said().splitlines()
            problems += [line for line in lines if line.startswith("PROBLEM")]
            if status:
                case = [line for line in lines if line.startswith("case")][-1:]
                problems.append(f"{case} status {status}: " + "\n".join(lines[-25:]))
            cases = sum(line.startswith("case") for line in lines)
            struck += cases - sum(line.startswith("clean") for line in lines)
    return struck, problems


def test_each_call_fails_once_and_for_ever(tmp_path: Path) -> None:
    with ThreadPoolExecutor(LANES) as pool:
        done = list(pool.map(lambda n: lane(tmp_path / str(n), n), range(LANES)))
    problems = [problem for _, some in done for problem in some]
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems[:40])
    struck = sum(count for count, _ in done)
    print(json.dumps({"faults": struck, "kinds": len(CASES)}))  # noqa: T201
    assert struck > 2 * len(CASES)
