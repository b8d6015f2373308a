"""Fixtures: stores that must be sound when their test ends, on uvloop."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvloop
from stores import Node

Start = Callable[..., Awaitable[Node]]


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop of the daemon; before pytest-asyncio 1.4 the plain one."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Start]:
    """Opens stores; each is checked and closed after the test. `within=` another's directory."""
    nodes: list[Node] = []

    async def run(within: Path | None = None, **options: Any) -> Node:
        node = Node(within or tmp_path / str(len(nodes)), **options)
        nodes.append(await node.open())
        return node

    yield run
    for node in nodes:
        if not node.closed:
            tending = node.store.tending
            assert tending is not None
            if tending.done():
                tending.result()
            node.assert_sound()
        await node.close()
        assert node.store.check() == []
    errors = [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert not errors, [r.getMessage() for r in errors]


@pytest_asyncio.fixture
async def node(start: Start) -> Node:
    return await start()
