"""The catalogue when LMDB or the disk is not well: damage, failed syncs, evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb
import pytest

from kvtier.errors import TierFailed
from kvtier.testing.conformance import DESCRIPTOR, NAMESPACE, Blocks
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB, PAGE_BYTES

SIZE = 16 * 1024


def open_tier(directory: Path) -> tuple[SsdTier, int]:
    tier = SsdTier(directory, 2, MIB, min_free_bytes=0)
    count = len(tier.recover())
    tier.register_namespace(NAMESPACE, DESCRIPTOR, 0)
    return tier, count


def filled(directory: Path) -> SsdTier:
    tier, _ = open_tier(directory)
    blocks = Blocks(tier, 8, SIZE)
    tier.write(blocks.items)
    assert [item.error for item in blocks.items] == [None] * 8
    return tier


@pytest.mark.parametrize("page", [0, 1, 2, 3, 4, 5, 6, 7])
def test_a_page_that_rotted_after_a_clean_stop_is_found_before_it_is_mapped(
    page: int, tmp_path: Path
) -> None:
    filled(tmp_path).close()
    assert (tmp_path / "clean").exists()
    data = tmp_path / "catalogue" / "data.mdb"
    content = bytearray(data.read_bytes())
    if (page + 1) * PAGE_BYTES > len(content):
        pytest.skip(f"the catalogue has no page {page}")
    for at in range(page * PAGE_BYTES, (page + 1) * PAGE_BYTES):
        content[at] ^= 0xA5
    data.write_bytes(content)
    tier, count = open_tier(tmp_path)
    assert count == 8
    tier.check()
    tier.close()


def test_damage_that_lmdb_finds_while_it_reads_is_set_aside_in_the_same_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path).close()
    monkeypatch.setattr(lmdb.verify, "verify", lambda _: [])  # a verifier that sees nothing
    data = tmp_path / "catalogue" / "data.mdb"
    content = bytearray(data.read_bytes())
    # Page numbers within pages: LMDB compares flags of what it follows, and says so.
    for page in range(2, len(content) // PAGE_BYTES):
        content[page * PAGE_BYTES + 10 : page * PAGE_BYTES + 12] = b"\0\0"
    data.write_bytes(content)
    tier, count = open_tier(tmp_path)
    assert count == 8
    assert list(tmp_path.glob("catalogue.damaged-*"))
    tier.close()


def test_evidence_is_kept_but_does_not_grow(tmp_path: Path) -> None:
    filled(tmp_path).close()
    for _ in range(5):
        (tmp_path / "catalogue" / "data.mdb").write_bytes(b"no catalogue" * 1000)
        tier, count = open_tier(tmp_path)
        assert count == 8
        tier.close()
    assert 1 <= len(list(tmp_path.glob("catalogue.damaged-*"))) <= 3


class _FailingSync:
    """The environment, its syncs failing as after an EIO of fsync."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.fails = True

    def sync(self, force: bool) -> None:
        if self.fails:
            self.fails = False
            raise lmdb.DiskError("planned: fsync")
        self._env.sync(force)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def test_a_failed_sync_is_never_made_good_by_a_later_one(tmp_path: Path) -> None:
    tier = filled(tmp_path)
    catalogue = tier._catalogue
    env = catalogue._env
    assert env is not None
    catalogue._env = _FailingSync(env)  # type: ignore[assignment]
    with pytest.raises(TierFailed, match="sync failed"):
        tier.sync()
    with pytest.raises(TierFailed, match="restart"):
        tier.sync()  # the kernel would say yes this time
    more = Blocks(tier, 1, SIZE, seed=1, first_slot=20)
    tier.write(more.items)
    assert isinstance(more.items[0].error, TierFailed)
    with pytest.raises(TierFailed):
        tier.close()
    assert not (tmp_path / "clean").exists()
    env.close()
    tier, count = open_tier(tmp_path)
    assert count == 8  # nobody promised them; nothing was lost here
    tier.sync()
    tier.close()
