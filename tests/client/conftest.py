"""Daemons to test the client against, and what every test needs to talk to one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_daemon import FakeDaemon

from kvtier.block import BlockFormat

ROOT = Path(__file__).parents[2]
FORMAT = BlockFormat(layers=2, kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=16)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "kvtier.sock"


@pytest.fixture
def daemon(socket_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(socket_path)
    yield daemon
    daemon.stop()


class DaemonProcess:
    """The fake daemon in a process of its own, to be stopped and killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        script = Path(__file__).parent / "fake_daemon.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@pytest.fixture
def daemon_process(socket_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(socket_path)
    daemon.start()
    yield daemon
    daemon.kill()


@pytest.fixture
def keys() -> list[bytes]:
    return [bytes([index]) * 32 for index in range(1, 9)]


@pytest.fixture
def payload(keys: list[bytes]) -> dict[bytes, bytes]:
    return {key: key[:1] * FORMAT.size_bytes for key in keys}


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    def wait(condition: Callable[[], object], within_s: float = 5.0) -> None:
        until_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until_s, "it did not come true in time"
            time.sleep(0.005)

    return wait
