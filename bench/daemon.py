"""Daemon: a real `kvtier serve` in a process of its own, on a directory of its own, with sockets.

It dies with the bench, however that ends. Does not: know what is measured on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from kvtier.client import Client, Space
from kvtier.errors import DaemonUnavailable
from kvtier.units import GIB, MIB

ROOT: Final = Path(__file__).resolve().parent.parent
START_S: Final = 300.0
STOP_S: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Setup:
    """What of the daemon's configuration a bench chooses. `ssd_bytes` 0: no SSD tier."""

    dram_bytes: int = 256 * MIB
    ssd_bytes: int = 0
    ssd_segment_bytes: int = 0
    trust: str = "isolated"
    write_arena_bytes: int = 16 * MIB
    grace_s: float = 5.0
    group_commit_s: float = 0.005
    group_commit_bytes_max: int = 128 * MIB

    def toml(self, directory: Path) -> str:
        """The configuration file."""
        block_bytes_max = min(self.write_arena_bytes, 256 * MIB)
        return "\n".join([
            "[server]",
            f"runtime_dir = {json.dumps(str(directory / 'run'))}",
            f"trust = {json.dumps(self.trust)}",
            f"grace_s = {self.grace_s}",
            "[state]",
            f"dir = {json.dumps(str(directory / 'state'))}",
            "[tiers.dram]",
            f"size_bytes = {self.dram_bytes}",
            "[tiers.ssd]",
            f"enabled = {json.dumps(self.ssd_bytes > 0)}",
            f"size_bytes = {self.ssd_bytes or GIB}",
            f"segment_bytes = {self.ssd_segment_bytes}",
            "min_free_bytes = 0",
            f"group_commit_s = {self.group_commit_s}",
            f"group_commit_bytes_max = {self.group_commit_bytes_max}",
            "[limits]",
            f"write_arena_bytes = {self.write_arena_bytes}",
            f"block_bytes_max = {block_bytes_max}",
            "",
        ])  # fmt: skip


class Daemon:
    """A daemon on a temporary directory: `with Daemon(Setup(...)) as daemon`.

    With `start=False` the directory can be filled before `start()`. The directory goes with it.
    """

    def __init__(self, setup: Setup, *, start: bool = True) -> None:
        self.setup = setup
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-bench-"))
        self.socket = self.directory / "run" / "kvtier.sock"
        self.state = self.directory / "state"
        self._log = self.directory / "daemon.log"
        self._config = self.directory / "kvtier.toml"
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            try:
                self.start()
            except BaseException:
                self.close()
                raise

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "the daemon was not started"
        return self._process.pid

    def start(self, **changes: int) -> float:
        """Starts it (with a changed setup); returns the seconds until it served."""
        setup = replace(self.setup, **changes)  # type: ignore[arg-type]
        self._config.write_text(setup.toml(self.directory))
        before = self.log().count("daemon.ready")
        started_s = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvtier", "serve", "--config", str(self._config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        while self.log().count("daemon.ready") == before:
            if self._process.poll() is not None or time.monotonic() - started_s > START_S:
                raise DaemonUnavailable(f"the daemon did not start: {self.log()[-2000:]}")
            time.sleep(0.005)
        return time.monotonic() - started_s

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None, "the daemon was not started"
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_S)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None, "the daemon was not started"
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        """What it said so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def client(self, *, deadline_s: float = 10.0) -> Client:
        """A client that waits long: a bench wants slow answers, not misses."""
        return Client(self.socket, deadline_s=deadline_s, timeout_s=120.0, client_name="bench")

    def resident_bytes(self) -> tuple[int, int]:
        """(anonymous memory, all resident memory that is not a memfd) of the daemon."""
        anonymous = resident = 0
        is_memfd = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            name, _, rest = line.partition(":")
            if "-" in name.split(" ", 1)[0] and not name[0].isupper():
                is_memfd = "/memfd:" in line
            elif name == "Rss" and not is_memfd:
                resident += int(rest.split()[0]) * 1024
            elif name == "Anonymous" and not is_memfd:
                anonymous += int(rest.split()[0]) * 1024
        return anonymous, resident

    def close(self) -> None:
        """Ends it at once and removes its directory."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def attached(client: Client, *, block_bytes: int, model: str = "bench") -> Space:
    """The namespace of blocks of this size, once the daemon has room for the session.

    On a machine that is short of cores or memory a handshake may take longer than the library
    waits; a bench asks again.
    """
    from kvtier.block import BlockFormat

    shape = BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=block_bytes)
    for _ in range(20):
        with contextlib.suppress(DaemonUnavailable):
            return client.open_namespace(model=model, format=shape)
        time.sleep(0.5)
    return client.open_namespace(model=model, format=shape)
