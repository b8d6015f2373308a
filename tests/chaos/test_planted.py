"""Bugs put into the production code: the harness finds each, in every run, or is broken itself.

The two that only a power cut shows (fsync ignored, catalogue before data) are planted by
tests/crash; those that a client's death shows by test_clients.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_nursery import Nursery
from chaos_oracle import BLOCKS
from chaos_plan import TIMEOUT_S
from test_damage import Case, survive_all
from test_kill import Lives

pytestmark = pytest.mark.timeout(TIMEOUT_S)


def found_by_lives(tmp_path: Path, bug: str, until: str) -> str:
    """What the harness says of a life with this bug and of the one after it."""
    with Nursery(tmp_path / "log") as nursery:
        lives = Lives(tmp_path / "lives", nursery, "planted", tight=False)
        lives.begin("chaos_life:live", "planted", "0", CHAOS_PLANT=bug)
        nursery.until(lambda said: said.count(until) >= 30 or "PROBLEM" in said)
        try:
            lives.end(nursery.kill(), -9)
            lives.only_check()
        except AssertionError as found:
            return str(found)
    raise AssertionError(f"{bug} was not found: the harness is broken")


def test_a_source_freed_before_its_target_is_readable(tmp_path: Path) -> None:
    found = found_by_lives(tmp_path, "source-freed-early", "nothing else ends it\n")
    assert "blocks, stored in this life were" in found


def test_an_evict_that_is_not_durable(tmp_path: Path) -> None:
    found = found_by_lives(tmp_path, "evict-forgets-the-disk", "evicted ")
    said = (f"{BLOCKS} blocks, not", "blocks, not 0 to", "is purged, and the disk has bytes of")
    assert any(text in found for text in said), found


def test_a_checksum_that_is_not_compared(tmp_path: Path) -> None:
    cases = [Case(number, "flip-slab", 400, clean=True) for number in range(2)]
    problems, _ = survive_all(tmp_path, cases, "checksum-off")
    assert any("wrong bytes" in problem for problem in problems), problems


def test_a_generation_that_is_not_compared(tmp_path: Path) -> None:
    cases = [Case(number, "replay-old-copies", 1, clean=number % 2 == 0) for number in range(2)]
    problems, _ = survive_all(tmp_path, cases, "generation-not-checked")
    assert any("wrong bytes" in problem for problem in problems), problems
