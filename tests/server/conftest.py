"""Fixtures: daemons that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Running, config_text


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts daemons, each in a new folder (or in `folder`); waits until they are ready."""
    daemons: list[Running] = []

    def run(
        *arguments: str,
        more: str = "",
        ready: bool = True,
        folder: Path | None = None,
        **server: Any,
    ) -> Running:
        place = folder or tmp_path_factory.mktemp("d")
        daemons.append(Running(place, config_text(place, **server) + more, *arguments))
        if ready:
            daemons[-1].wait_for_log("daemon.ready")
        return daemons[-1]

    yield run
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def daemon(start: Callable[..., Running]) -> Running:
    return start()
