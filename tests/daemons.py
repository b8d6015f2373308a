"""Real daemons in processes of their own, plain clients of their sockets, and ways to wait.

`Daemon` is what tests of the client, the server and the whole start, stop and kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import grpc

from kvtier import errors, wire
from kvtier.block import BlockFormat
from kvtier.client import ReservedBlock, Space
from kvtier.client.admin import AdminClient
from kvtier.units import KIB
from kvtier.v1 import admin_pb2, cache_pb2, cache_pb2_grpc, session_pb2, types_pb2

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
FORMAT = BlockFormat(layers=2, kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=16)
LARGE = BlockFormat(1, 1, 1, "float16", 16, opaque_bytes=256 * KIB)
# A DRAM tier of 16 LARGE blocks, which demotes only when room is wanted.
SMALL_DRAM = {"size_bytes": "4MiB", "segment_bytes": "1MiB", "high_water": 1.0, "low_water": 0.9}
START_S = 30.0


def keys_of(seed: str, count: int) -> list[bytes]:
    """Distinct keys of 32 bytes."""
    return [hashlib.sha256(f"{seed}-{index}".encode()).digest() for index in range(count)]


def content(key: bytes, size_bytes: int = FORMAT.size_bytes) -> bytes:
    """What tests store under a key: no two keys have the same."""
    return (key * (size_bytes // len(key) + 1))[:size_bytes]


def fill(block: ReservedBlock) -> None:
    """Writes a block's `content`."""
    block.view[:] = content(block.key, len(block.view))


def stored(space: Space, keys: Sequence[bytes], **options: Any) -> Space:
    """The space, with these keys stored."""
    assert space.store(keys, fill, timeout_s=30, **options).stored_count == len(keys)
    return space


def read(space: Space, keys: Sequence[bytes]) -> list[bytes]:
    """The bytes of the chain's longest prefix."""
    with space.lease(keys) as lease:
        return [bytes(view) for view in lease.views] if len(lease) else []


def holds(space: Space, keys: Sequence[bytes]) -> bool:
    """Whether all of the chain is there with the bytes that were stored."""
    return read(space, keys) == [content(key, space.view_bytes) for key in keys]


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Returns once it holds. Raises AssertionError when it does not by then."""
    until_s = time.monotonic() + within_s
    while not _holds_now(condition):
        assert time.monotonic() < until_s, "it did not come true in time"
        time.sleep(0.005)


async def eventually_async(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """As `eventually`, while the loop runs."""
    until_s = time.monotonic() + within_s
    while not _holds_now(condition):
        assert time.monotonic() < until_s, "it did not come true in time"
        await asyncio.sleep(0.005)


def _holds_now(condition: Callable[[], object]) -> bool:
    with contextlib.suppress(grpc.RpcError, errors.DaemonUnavailable, errors.DeadlineExceeded):
        return bool(condition())
    return False


def error_of(call: Callable[..., Any], request: Any, timeout_s: float = 5) -> errors.KvTierError:
    """What a call of a stub fails with, as the client library would raise it."""
    try:
        call(request, timeout=timeout_s)
    except grpc.RpcError as error:
        failure = wire.error_from(error)
        code = error.code()  # type: ignore[attr-defined]
        assert code.name == failure.grpc_code
        return failure
    raise AssertionError("the call did not fail")


class Attached:
    """A session socket after its Hello: the answer and what came with it."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fds: list[int] = []
        try:
            self.packet = self._greet(path, changes)
        except BaseException:
            self.close()
            raise
        self.token = self.packet.welcome.session_token

    def _greet(self, path: Path, changes: dict[str, Any]) -> session_pb2.SessionPacket:
        self.socket.settimeout(5)
        self.socket.connect(str(path))
        values = {
            "protocol_min": 1,
            "protocol_max": 1,
            "memory_layout_min": 1,
            "memory_layout_max": 1,
            "client_name": "test",
            "writes": True,
        }
        self.socket.send(session_pb2.Hello(**(values | changes)).SerializeToString())
        return self.receive()

    def receive(self) -> session_pb2.SessionPacket:
        """The next packet; its descriptor is the last of `fds`."""
        data, fds, _, _ = socket.recv_fds(self.socket, 8192, 1)
        self.fds += fds
        return session_pb2.SessionPacket.FromString(data)

    def ended(self, within_s: float = 5.0) -> bool:
        """Whether the daemon closed this session by then."""
        self.socket.settimeout(within_s)
        try:
            while self.socket.recv(8192):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        """Ends the session. Idempotent."""
        self.socket.close()
        while self.fds:
            os.close(self.fds.pop())


class Daemon:
    """`python -m kvtier serve` (or `command`) on a short directory of its own.

    Keywords are sections (`server`, `limits`, `dram`, `ssd`) whose keys differ from the tests'
    configuration; `more` is TOML text after them; FOLDER is its directory there. That goes with
    `close`, unless given.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        command: Sequence[str] = ("-m", "kvtier", "serve", "--config"),
        more: str = "",
        **sections: dict[str, Any],
    ) -> None:
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
        self.socket = self.folder / "kvtier.sock"
        self.session_socket = self.folder / "kvtier.sock.session"
        self.config_path = self.folder / "config.toml"
        self.log_path = self.folder / "log"
        self._command = command
        self.configure(more=more, **sections)
        self.admin = AdminClient(self.folder / "admin.sock")
        self._attached: list[Attached] = []
        self._channels: list[grpc.Channel] = []
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, *, more: str = "", **sections: dict[str, Any]) -> None:
        """Writes the configuration file anew."""
        known: dict[str, dict[str, Any]] = {
            "server": {"runtime_dir": str(self.folder)},
            "state": {"dir": str(self.folder / "state")},
            "tiers.dram": {"size_bytes": "64MiB"},
            "tiers.ssd": {"size_bytes": "256MiB", "min_free_bytes": 0},
            "limits": {"write_arena_bytes": "16MiB", "block_bytes_max": "4MiB"},
        }
        for name, values in sections.items():
            known[{"dram": "tiers.dram", "ssd": "tiers.ssd"}.get(name, name)] |= values
        lines = [
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in values.items())
            for name, values in known.items()
        ]
        self.config_path.write_text("\n".join([*lines, more]).replace("FOLDER", str(self.folder)))

    # --- its life

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the last `launch`."""
        assert self._process is not None
        return self._process

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def launch(self, **variables: str) -> Self:
        """Starts the process and does not wait."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._command, str(self.config_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT | variables,
            )
        return self

    def start(self, *, recovered: bool = True) -> Self:
        """Starts it and waits until it says (as it does to systemd) that it is ready; with
        `recovered` also until its SSD tier is back.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            address = f"\0kvtier-test-{os.getpid()}-{self.folder.name}"
            manager.bind(address)
            logged = len(self.log) if self.log_path.exists() else 0
            self.launch(NOTIFY_SOCKET="@" + address[1:])
            pidfd = os.pidfd_open(self.process.pid)
            try:
                ready, _, _ = select.select([manager, pidfd], [], [], START_S)
            finally:
                os.close(pidfd)
            assert manager in ready, self.log
            assert manager.recv(100) == b"READY=1", self.log
        if recovered and "enabled = false" not in self.config_path.read_text():
            # Not asked for: some tests allow one call at a time.
            eventually(lambda: "tier.recovered" in self.log[logged:], START_S)
        return self

    def tier_states(self) -> list[str]:
        """Of DRAM and, if there is one, SSD."""
        return [tier.state for tier in self.stat().tiers]

    def signal(self, number: signal.Signals) -> None:
        """Sends it to the process."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.running:
            self.signal(signal.SIGTERM)
        return self.process.wait(START_S)

    def kill(self) -> None:
        """SIGKILL, and its end."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> Self:
        """Clean stop and start: what it had is on SSD only."""
        assert self.stop() == 0, self.log
        return self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP, and at the end SIGCONT."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends it whatever its state, and all that was made by it."""
        self._let_go()
        self.admin.close()
        if self.running:
            self.kill()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _let_go(self) -> None:
        while self._channels:
            self._channels.pop().close()
        while self._attached:
            self._attached.pop().close()

    # --- what it says

    @property
    def log(self) -> str:
        """All lines so far."""
        return self.log_path.read_text()

    def wait_for_log(self, text: str) -> None:
        """Until a line has it."""
        eventually(lambda: text in self.log)

    def stat(self) -> admin_pb2.StatResponse:
        """AdminService.Stat."""
        return self.admin.stat(1000)

    def held(self) -> tuple[int, int, int]:
        """Leases, reservations and sessions of all clients."""
        stat = self.stat()
        return stat.lease_count, stat.reservation_count, len(stat.sessions)

    def descriptors(self) -> int:
        """How many the process has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def assert_sound(self, within_s: float = 5.0) -> None:
        """Nobody holds anything any longer and its books agree. Drops what `attach` made."""
        self._let_go()
        gc.collect()
        until_s = time.monotonic() + within_s
        while (held := self.held()) != (0, 0, 0):
            left = self.stat()
            assert time.monotonic() < until_s, f"leases, reservations, sessions: {held}: {left}"
            time.sleep(0.005)
        check = self.admin.check()
        assert check.ok, check.problems

    # --- plain clients

    def attach(self, path: Path | None = None, **changes: Any) -> Attached:
        """A session that lasts as long as the test."""
        attached = Attached(path or self.session_socket, **changes)
        self._attached.append(attached)
        return attached

    def channel(self, path: Path | None = None) -> grpc.Channel:
        """A connection of its own to the daemon's, or another, gRPC socket."""
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.insecure_channel(f"unix:{quote(str(path or self.socket))}", options)
        self._channels.append(channel)
        return channel

    def cache(self) -> cache_pb2_grpc.CacheServiceStub:
        """A stub of CacheService."""
        return cache_pb2_grpc.CacheServiceStub(self.channel())  # type: ignore[no-untyped-call]

    def open_namespace(self, token: bytes, model: str = "m", **changes: Any) -> int:
        """The id of a namespace of FORMAT, for a session with this token."""
        shape = types_pb2.BlockFormat()
        shape.CopyFrom(wire.encode_format(FORMAT))
        for name, value in changes.items():
            setattr(shape, name, value)
        request = cache_pb2.OpenNamespaceRequest(
            session_token=token, spec=types_pb2.NamespaceSpec(model=model, format=shape)
        )
        return int(self.cache().OpenNamespace(request, timeout=5).namespace_id)

    def __repr__(self) -> str:
        return f"<Daemon {self.folder}>"


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `code`; `line_of` waits for what it says, `end` ends it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line it prints, waited for."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.endswith("\n"), "the process ended"
    return line.strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    """Writes a line to its input."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and its end."""
    process.kill()
    process.communicate()
