"""Nursery: a process that has imported everything and forks a child for each life of a store.

A fork costs 20 ms where a Python that imports kvtier costs 400, and hundreds of lives are killed.
The nursery never opens a store, a thread or a loop itself, so that its forks are as fresh starts.
Its children die with it, and it with the test. One child at a time each; one thread at a time.

    nursery.begin("chaos_life:live", ...) --> pid;   kill it or not;   nursery.end() --> status

Run as a program, this file is that process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WAIT_S = 120.0
_PACKET_BYTES = 65536
_PRELOADED = ("chaos_life", "chaos_survivor", "chaos_faults")


class Nursery:
    """The other side: starts the process, begins and ends lives. `log` holds what they say."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = (ROOT, HERE, HERE.parent, HERE.parent / "store")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        with there:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "chaos_nursery.py"), str(there.fileno())],
                pass_fds=[there.fileno()],
                env=environment,
            )
        self._socket.settimeout(WAIT_S)
        self.pid = 0

    def begin(self, task: str, *arguments: Any, **environment: str) -> int:
        """Runs `module:function` with these arguments (JSON) in a new process; its pid. What it
        prints goes to a log of its own.
        """
        assert not self.pid, "the former life has not ended"
        self.log.write_bytes(b"")
        order = [task, arguments, str(self.log), environment]
        self._socket.send(json.dumps(order).encode())
        self.pid = int(self._socket.recv(_PACKET_BYTES))
        return self.pid

    def kill(self) -> int:
        """SIGKILL; the status, which may be another one when it had ended before."""
        os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self, within_s: float = WAIT_S) -> int:
        """Waits; the exit status, or minus the signal. Raises AssertionError, and kills it."""
        self._socket.settimeout(within_s)
        try:
            status = int(self._socket.recv(_PACKET_BYTES))
        except TimeoutError:
            os.kill(self.pid, signal.SIGABRT)  # faulthandler says where it hangs
            self._socket.settimeout(WAIT_S)
            self._socket.recv(_PACKET_BYTES)
            self.pid = 0
            raise AssertionError(f"it hangs: {self.said()}") from None
        self.pid = 0
        return status

    def live(self, task: str, *arguments: Any, **environment: str) -> list[str]:
        """Begins, waits, asserts status 0; the lines it said."""
        self.begin(task, *arguments, **environment)
        status = self.end()
        assert status == 0, f"status {status} of {task}{arguments}: {self.said()}"
        return self.said().splitlines()

    def until(self, condition: Callable[[str], bool], within_s: float = WAIT_S) -> bool:
        """Waits for what it says; False when it ended before."""
        until_s = time.monotonic() + within_s
        self._socket.setblocking(False)
        while not condition(self.said()):
            assert time.monotonic() < until_s, self.said()
            try:
                self._socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                time.sleep(0.003)
            else:
                return condition(self.said())
        return True

    def said(self) -> str:
        """What the life printed so far."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Ends the process and a life that runs."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _live(task: str, arguments: list[Any], log: str, environment: dict[str, str]) -> int:
    _die_with_parent()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(environment)
    import faulthandler

    faulthandler.enable()
    module, _, name = task.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except BaseException:  # noqa: BLE001 - whatever it was, the log has it
        traceback.print_exc()
        return 1
    return 0


def _serve(there: socket.socket) -> None:
    for module in _PRELOADED:
        if (HERE / f"{module}.py").exists():
            importlib.import_module(module)
    while order := there.recv(_PACKET_BYTES):
        pid = os.fork()
        if pid == 0:
            there.close()
            status = 1
            try:
                status = _live(*json.loads(order))
            finally:
                os._exit(status)
        there.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        there.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    _die_with_parent()
    _serve(socket.socket(fileno=int(sys.argv[1])))
