"""State of another major version is set aside whole and comes back whole, whatever dies between."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks
from kvtier.tiers import state
from kvtier.tiers.files import Files
from kvtier.tiers.ssd import SsdTier
from kvtier.tiers.state import prepare_directory
from kvtier.units import MIB

SIZE = 16 * 1024


def open_tier(directory: Path) -> tuple[SsdTier, int]:
    tier = SsdTier(directory, 2, MIB, min_free_bytes=0)
    count = len(tier.recover())
    tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
    return tier, count


def use(directory: Path, count: int) -> None:
    """A start that writes so many blocks, where there were none."""
    tier, before = open_tier(directory)
    assert before == 0
    blocks = Blocks(tier, count, SIZE)
    tier.write(blocks.items)
    assert [item.error for item in blocks.items] == [None] * count
    tier.close()


def be(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is a kvtier of that major version."""
    monkeypatch.setattr(state, "STATE_VERSION", (major, 0))


def tree(directory: Path, *, without: str = "") -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not (without and without in path.relative_to(directory).parts)
    }


def test_a_newer_state_is_set_aside_and_comes_back_when_its_kvtier_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(2, monkeypatch)
    use(tmp_path, 5)
    newer = tree(tmp_path)

    be(1, monkeypatch)
    use(tmp_path, 3)
    assert tree(tmp_path / "set-aside" / "v2") == newer

    be(2, monkeypatch)
    tier, count = open_tier(tmp_path)
    assert count == 5
    tier.close()
    assert (tmp_path / "set-aside" / "v1" / "VERSION").read_bytes().startswith(b"1.0")
    assert not (tmp_path / "set-aside" / "v2").exists()

    be(1, monkeypatch)
    tier, count = open_tier(tmp_path)
    assert count == 3
    tier.close()


def test_a_newer_minor_version_stays_what_it_is(tmp_path: Path) -> None:
    use(tmp_path, 2)
    (tmp_path / "VERSION").write_text("1.7\n")
    (tmp_path / "more").write_bytes(b"of a newer one")
    tier, count = open_tier(tmp_path)
    assert count == 2
    tier.close()
    assert (tmp_path / "VERSION").read_text() == "1.7\n"
    assert (tmp_path / "more").read_bytes() == b"of a newer one"
    assert not (tmp_path / "set-aside").exists()


class _Dies(Exception):
    pass


class _Mortal(Files):
    """Dies instead of the call number `at` that changes names."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Dies

    def rename(self, source: Path, target: Path) -> None:
        self._live()
        super().rename(source, target)

    def sync_directory(self, directory: Path) -> None:
        self._live()
        super().sync_directory(directory)


def small_state(directory: Path, major: int) -> dict[str, bytes]:
    """Something that no version would make anew."""
    (directory / "slabs").mkdir(parents=True)
    (directory / "VERSION").write_text(f"{major}.0\n")
    (directory / "slabs" / "00000.slab").write_bytes(b"slab of %d" % major)
    (directory / "namespaces").write_bytes(b"names of %d" % major)
    (directory / f"only-in-{major}").write_bytes(b"")
    return tree(directory)


def dying_starts(directory: Path, major: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Starts of that version until one lives, each dying a step later; how many died."""
    be(major, monkeypatch)
    for deaths in itertools.count():
        try:
            prepare_directory(_Mortal(deaths), directory)
        except _Dies:
            continue
        return deaths
    raise AssertionError


@pytest.mark.parametrize("between", [(2,), (1,), (1, 2), (2, 1), (3,), (2, 3)])
def test_state_is_never_mixed_whatever_dies_in_the_middle(
    between: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start of version 1 on state of version 2 dies at every step; then kvtiers of these versions
    start, dying on their way too; in the end each finds its own, and all of it.
    """
    for at in range(40):
        directory = tmp_path / str(at)
        newer = small_state(directory, 2)
        be(1, monkeypatch)
        died = True
        try:
            prepare_directory(_Mortal(at), directory)
            died = False
        except _Dies:
            pass
        for major in between:
            dying_starts(directory, major, monkeypatch)
            assert b"slab of" not in b"".join(
                content
                for name, content in tree(directory, without="set-aside").items()
                if major != 2 and name.endswith(".slab")
            )
        be(2, monkeypatch)
        prepare_directory(Files(), directory)
        (directory / "VERSION.new").unlink(missing_ok=True)  # of a small file not quite written
        assert tree(directory, without="set-aside") == newer
        if not died:
            break
    assert not died
    assert at > 5


def test_state_that_is_there_wins_over_a_copy_that_was_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(2, monkeypatch)
    use(tmp_path, 2)
    older = tmp_path / "set-aside" / "v2"
    small_state(older, 2)
    kept = tree(older)
    tier, count = open_tier(tmp_path)
    assert count == 2
    tier.close()
    assert tree(older) == kept

    be(1, monkeypatch)
    use(tmp_path, 1)  # and now there are two of version 2: none is lost
    assert len(list((tmp_path / "set-aside").glob("v2*"))) == 2
    assert kept in [tree(path) for path in (tmp_path / "set-aside").glob("v2-*")]


def test_what_is_set_aside_is_as_private_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(2, monkeypatch)
    use(tmp_path, 1)
    be(1, monkeypatch)
    use(tmp_path, 1)
    for path in (tmp_path / "set-aside", tmp_path / "set-aside" / "v2"):
        assert path.stat().st_mode & 0o777 == 0o700
