"""Hello and Welcome: what a client says first on the session socket, and what it accepts.

Does not: touch the socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from kvtier import wire
from kvtier.block import MEMORY_LAYOUT_VERSION, PROTOCOL_VERSION
from kvtier.errors import DaemonUnavailable, VersionMismatch
from kvtier.v1 import session_pb2


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a session says of itself."""

    path: Path  # of the session socket
    group: str = ""
    client_name: str = ""
    writes: bool = True


def hello(options: SessionOptions) -> bytes:
    """The first packet: who we are and the versions this library speaks."""
    return session_pb2.Hello(
        protocol_min=PROTOCOL_VERSION,
        protocol_max=PROTOCOL_VERSION,
        memory_layout_min=MEMORY_LAYOUT_VERSION,
        memory_layout_max=MEMORY_LAYOUT_VERSION,
        group=options.group,
        client_name=options.client_name,
        writes=options.writes,
    ).SerializeToString()


def welcome(
    options: SessionOptions, packet: session_pb2.SessionPacket | None
) -> session_pb2.Welcome:
    """The daemon's answer, if it lets us in.

    Raises:
        DaemonUnavailable: it closed the socket. VersionMismatch: it speaks something else.
        KvTierError: the daemon's Refusal, as the class its reason names.
    """
    if packet is None:
        raise DaemonUnavailable(f"{options.path}: the daemon closed the session at once")
    kind = packet.WhichOneof("packet")
    if kind == "refusal":
        raise wire.error_of(packet.refusal.reason, packet.refusal.message)
    if kind != "welcome":
        raise VersionMismatch(f"{options.path}: {kind or 'an unknown packet'} before Welcome")
    answer = packet.welcome
    if (answer.protocol, answer.memory_layout) != (PROTOCOL_VERSION, MEMORY_LAYOUT_VERSION):
        raise VersionMismatch(
            f"the daemon speaks protocol {answer.protocol} with memory layout "
            f"{answer.memory_layout}, this library {PROTOCOL_VERSION} and "
            f"{MEMORY_LAYOUT_VERSION}; install the kvtier of the daemon's version"
        )
    return answer


def decode(payload: bytes) -> session_pb2.SessionPacket:
    """One packet of the daemon. Raises VersionMismatch: it is none."""
    try:
        return session_pb2.SessionPacket.FromString(payload)
    except DecodeError as error:
        raise VersionMismatch(f"the session socket speaks another protocol: {error}") from error
