"""What was written in the last 24 hours, whatever clocks and files do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtier.tiers.files import Files
from kvtier.tiers.wear import Wear

HOUR_S = 3600.0
NOON_S = 500_000 * HOUR_S


class Wall:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def wall() -> Wall:
    return Wall()


def wear(directory: Path, wall: Wall, files: Files | None = None) -> Wear:
    made = Wear(files or Files(), directory / "wear", wall)
    made.load()
    return made


def test_a_day_later_it_is_forgotten(tmp_path: Path, wall: Wall) -> None:
    one = wear(tmp_path, wall)
    one.add(100)
    wall.now_s += HOUR_S
    one.add(10)
    assert one.day_bytes() == 110
    wall.now_s += 23 * HOUR_S
    assert one.day_bytes() == 110
    wall.now_s += HOUR_S
    assert one.day_bytes() == 10
    wall.now_s += HOUR_S
    assert one.day_bytes() == 0


def test_it_outlives_a_restart(tmp_path: Path, wall: Wall) -> None:
    one = wear(tmp_path, wall)
    one.add(100)
    one.save()
    one.add(7)  # a kill loses this
    again = wear(tmp_path, wall)
    assert again.day_bytes() == 100
    again.add(1)
    again.save()
    assert wear(tmp_path, wall).day_bytes() == 101
    assert (tmp_path / "wear").stat().st_mode & 0o777 == 0o600


def test_a_clock_that_is_set_back_gives_no_new_budget(tmp_path: Path, wall: Wall) -> None:
    one = wear(tmp_path, wall)
    one.add(100)
    wall.now_s -= 1000 * HOUR_S
    assert one.day_bytes() == 100
    wall.now_s += 23 * HOUR_S
    assert one.day_bytes() == 100
    wall.now_s += 2 * HOUR_S
    assert one.day_bytes() == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "[[1]]", '[["a", 1]]', "null", "[[1, -5]]", "\x00\xff", "{}5"]
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, wall: Wall, content: str) -> None:
    (tmp_path / "wear").write_bytes(content.encode("latin-1"))
    one = wear(tmp_path, wall)
    assert one.day_bytes() == 0
    one.add(5)
    one.save()
    assert wear(tmp_path, wall).day_bytes() == 5


class _Full(Files):
    def replace(self, path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_only_forgets(tmp_path: Path, wall: Wall) -> None:
    one = wear(tmp_path, wall, _Full())
    one.add(5)
    one.save()
    assert one.day_bytes() == 5
    assert not (tmp_path / "wear").exists()


def test_nothing_new_is_not_written_again(tmp_path: Path, wall: Wall) -> None:
    one = wear(tmp_path, wall)
    one.add(5)
    one.save()
    (tmp_path / "wear").write_text(json.dumps([[int(NOON_S // HOUR_S), 6]]))
    one.save()
    assert wear(tmp_path, wall).day_bytes() == 6
