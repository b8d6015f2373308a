"""The transformers connector on a real daemon: over its restart, without it, and with damage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvtier.cli.demo_parts import Daemon  # noqa: E402
from kvtier.connectors.transformers import TransformersCache  # noqa: E402
from kvtier.testing.models import random_tokens, tiny_llama  # noqa: E402
from kvtier.units import MIB  # noqa: E402

IDS = torch.tensor([random_tokens(150, seed=1)])


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    directory = Path(tempfile.mkdtemp(prefix="kvhf-", dir="/tmp"))
    made = Daemon(directory, dram_bytes=64 * MIB, ssd_bytes=256 * MIB)
    try:
        made.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def _connected(model: Any, daemon: Daemon) -> TransformersCache:
    return TransformersCache(model, str(daemon.socket), deadline_s=10.0)


def _generate(generate: Any) -> Any:
    return generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_a_restart(daemon: Daemon, dtype: str) -> None:
    model = tiny_llama(dtype=dtype)
    plain = _generate(model.generate).tolist()
    cache = _connected(model, daemon)
    assert _generate(cache.generate).tolist() == plain
    assert cache.last.token_count == 0
    assert _generate(cache.generate).tolist() == plain
    assert (cache.last.token_count, cache.last.tier) == (144, "dram")

    daemon.stop()
    assert _generate(cache.generate).tolist() == plain
    assert (cache.last.token_count, cache.last.reason) == (0, "daemon_down")

    daemon.start()
    again = _connected(model, daemon)  # another engine; the first waits before it tries again
    assert _generate(again.generate).tolist() == plain
    assert (again.last.token_count, again.last.tier) == (144, "ssd")
    assert again.border.counts().failure_count == 0
    again.close()
    cache.close()


def test_flipped_bytes_on_disk_are_never_used(daemon: Daemon) -> None:
    """One byte of every 64 of every slab is flipped, headers included: refused, not believed."""
    model = tiny_llama()
    plain = _generate(model.generate).tolist()
    cache = _connected(model, daemon)
    _generate(cache.generate)
    cache.close()
    daemon.stop()
    slabs = 0
    for slab in (daemon.directory / "state").rglob("*"):
        if slab.is_file() and slab.stat().st_size >= MIB and "slab" in slab.name:
            content = bytearray(slab.read_bytes())
            content[::64] = bytes(byte ^ 0xFF for byte in content[::64])
            slab.write_bytes(content)
            slabs += 1
    assert slabs, [str(path) for path in (daemon.directory / "state").rglob("*")]
    daemon.start()

    damaged = _connected(model, daemon)
    assert _generate(damaged.generate).tolist() == plain
    assert damaged.last.token_count == 0
    damaged.close()
