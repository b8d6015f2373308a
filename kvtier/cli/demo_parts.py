"""The processes of `kvtier demo`: a daemon on temporary directories, and engines.

Each ends with the demo, however that ends: engines when their input closes, the daemon because it
is told, or because its parent died. Does not: know the story.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from kvtier.errors import DaemonUnavailable, KvTierError

START_S = 60.0
STOP_S = 60.0
MODEL_S = 300.0
LOG_LINES = 8
_PR_SET_PDEATHSIG = 1


class DemoFailed(KvTierError):
    """A process of the demo did not do its part; the message has the end of its log."""


class Daemon:
    """`kvtier serve` on a directory of its own; may be stopped and started again."""

    def __init__(self, directory: Path, *, dram_bytes: int, ssd_bytes: int) -> None:
        self.directory = directory
        self.socket = directory / "run" / "kvtier.sock"
        self.admin_socket = directory / "run" / "admin.sock"
        self._config = directory / "kvtier.toml"
        self._log = directory / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._config.write_text(
            f"[server]\nruntime_dir = {json.dumps(str(directory / 'run'))}\n"
            f"[state]\ndir = {json.dumps(str(directory / 'state'))}\n"
            f"[tiers.dram]\nsize_bytes = {dram_bytes}\n"
            f"[tiers.ssd]\nsize_bytes = {ssd_bytes}\nmin_free_bytes = 0\n"
        )

    def start(self) -> float:
        """Starts it and waits until it serves; returns the seconds that took."""
        started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = _spawn(
                [sys.executable, "-P", "-m", "kvtier", "serve", "--config", str(self._config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        while not self._serves():
            if self._process.poll() is not None:
                raise DemoFailed(f"the daemon ended at its start: {_tail(self._log)}")
            if time.monotonic() - started > START_S:
                raise DemoFailed(f"the daemon did not serve in {START_S:.0f} s: {_tail(self._log)}")
            time.sleep(0.02)
        return time.monotonic() - started

    def stop(self) -> float:
        """SIGTERM and its clean end; returns the seconds that took."""
        assert self._process is not None, "stop() before start()"
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(f"the daemon did not stop: {_tail(self._log)}") from error
        if status:
            raise DemoFailed(f"the daemon stopped with status {status}: {_tail(self._log)}")
        self._process = None
        return time.monotonic() - started

    def close(self) -> None:
        """Ends it whatever its state."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _serves(self) -> bool:
        from kvtier.client.admin import AdminClient
        from kvtier.config import session_socket

        if not self.admin_socket.exists() or not session_socket(self.socket).exists():
            return False
        try:
            with AdminClient(self.admin_socket) as admin:
                return bool(admin.stat().state == "serving")
        except DaemonUnavailable:
            return False


class Engine:
    """One engine process; `restart` replaces it by a new one that knows nothing."""

    def __init__(self, name: str, model: str, socket: Path, log: Path) -> None:
        self.name = name
        self.started_count = 0
        self._arguments = ["serve", model, str(socket)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts without waiting: `ready` does."""
        self._process = _engine(self._arguments, self._log)
        self.started_count += 1

    def ready(self) -> None:
        assert self._process is not None, "ready() before start()"
        _read(self._process, self._log)

    def restart(self) -> None:
        self.close()
        self.start()
        self.ready()

    def ask(self, tokens: list[int], new_tokens: int) -> dict[str, Any]:
        """One request, answered with and without kvtier."""
        assert self._process is not None, "ask() before start()"
        assert self._process.stdin is not None
        line = json.dumps({"tokens": tokens, "new_tokens": new_tokens}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise DemoFailed(f"{self.name} ended: {_tail(self._log)}") from error
        return _read(self._process, self._log)

    def close(self) -> None:
        """Closes its input, on which it ends, and makes sure it has."""
        if self._process is not None:
            process, self._process = self._process, None
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it ended before us: just as well
                process.stdin.close()
            _end(process, patience_s=5.0)
            process.stdout.close()


def make_model(directory: Path, given: Path | None) -> dict[str, Any]:
    """What `demo_engine make` says of the model it made or was given."""
    log = directory / "model.log"
    arguments = ["make", str(directory), *([str(given)] if given else [])]
    process = _engine(arguments, log)
    try:
        return _read(process, log)
    finally:
        _end(process, patience_s=5.0)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def environment(environ: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Ours, without settings of another kvtier, with no way to a model hub, and leaving what
    torch keeps in temporary directories in `directory`.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith("KVTIER_")}
    native = {name: environ[name] for name in ("KVTIER_NATIVE",) if name in environ}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**kept, **native, **offline, "TMPDIR": str(directory)}


def _engine(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as errors:
        return _spawn(
            [sys.executable, "-P", "-m", "kvtier.cli.demo_engine", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip


def _spawn(
    arguments: list[str], *, stdin: int, stdout: int | IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that Ctrl-C reaches the demo alone, which then ends all."""
    return subprocess.Popen(
        arguments,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment(os.environ, Path(stderr.name).parent),
        start_new_session=True,
        preexec_fn=_end_with_parent,  # one thread, and only a system call
    )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise DemoFailed(f"an engine ended: {_tail(log)}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _end(process: subprocess.Popen[bytes], *, patience_s: float = 0.0) -> None:
    """Waits `patience_s`, then asks, then does not ask."""
    for act, wait_s in ((None, patience_s), (process.terminate, 10.0), (process.kill, 10.0)):
        if act is not None:
            act()
        try:
            process.wait(wait_s)
            return
        except subprocess.TimeoutExpired:
            continue


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
    return " | ".join(lines) or "(it said nothing)"
