"""Real daemons in processes of their own (on a FakeStore), and a plain client of their sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from kvtier.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    cache_pb2,
    cache_pb2_grpc,
    session_pb2,
    types_pb2,
)

HERE = Path(__file__).parent
FORMAT = types_pb2.BlockFormat(layers=2, kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=16)


class Attached:
    """A session socket after its Hello: the answer and what came with it."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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
        self.fds: list[int] = []
        self.packet = self.receive()
        self.token = self.packet.welcome.session_token

    def receive(self) -> session_pb2.SessionPacket:
        data, fds, _, _ = socket.recv_fds(self.socket, 8192, 1)
        self.fds += fds
        return session_pb2.SessionPacket.FromString(data)

    def ended(self, within_s: float = 1.0) -> bool:
        """Whether the daemon closed this session by then."""
        self.socket.settimeout(within_s)
        try:
            return self.socket.recv(8192) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)


class Running:
    """A daemon process."""

    def __init__(self, folder: Path, config: str, *arguments: str) -> None:
        self.folder = folder
        self.socket = folder / "kvtier.sock"
        self.session_socket = folder / "kvtier.sock.session"
        self.config_path = folder / "config.toml"
        self.config_path.write_text(config)
        self.log_path = folder / "log"
        self._attached: list[Attached] = []
        self._channels: list[grpc.Channel] = []
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_fake.py"), str(self.config_path), *arguments],
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(HERE.parent.parent)},
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for_log(self, text: str, within_s: float = 10.0) -> None:
        wait_until(lambda: text in self.log or self.process.poll() is not None, within_s)
        assert text in self.log

    def attach(self, path: Path | None = None, **changes: Any) -> Attached:
        attached = Attached(path or self.session_socket, **changes)
        self._attached.append(attached)
        return attached

    def channel(self, path: Path | None = None) -> grpc.Channel:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.insecure_channel(f"unix:{quote(str(path or self.socket))}", options)
        self._channels.append(channel)
        return channel

    def cache(self) -> cache_pb2_grpc.CacheServiceStub:
        return cache_pb2_grpc.CacheServiceStub(self.channel())

    def admin(self) -> admin_pb2_grpc.AdminServiceStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel(self.folder / "admin.sock"))

    def stat(self) -> admin_pb2.StatResponse:
        return self.admin().Stat(admin_pb2.StatRequest(), timeout=5)

    def ended_sessions(self) -> int:
        """How many sessions the fake store was told to end."""
        return self.stat().evicted_blocks

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for attached in self._attached:
            attached.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_until(condition: Callable[[], bool], within_s: float = 1.0) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        with contextlib.suppress(grpc.RpcError):
            if condition():
                return True
        time.sleep(0.01)
    return False


def config_text(folder: Path, **server: Any) -> str:
    values = {"runtime_dir": str(folder), "sessions_max": 8} | server
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in values.items()
    ]
    return "\n".join(
        [
            "[server]",
            *lines,
            f"[state]\ndir = {str(folder / 'state')!r}",
            "[tiers.dram]\nsize_bytes = '16MiB'\n[tiers.ssd]\nsize_bytes = '64MiB'\n",
        ]
    )


def open_namespace(daemon: Running, token: bytes, model: str = "m") -> int:
    request = cache_pb2.OpenNamespaceRequest(
        session_token=token, spec=types_pb2.NamespaceSpec(model=model, format=FORMAT)
    )
    return daemon.cache().OpenNamespace(request, timeout=5).namespace_id
