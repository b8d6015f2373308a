"""Many clients at once, each a process of its own: `chaos_swarm.py FOLDER LIGHT FULL NAME`.

A light one holds its session socket, maps its write arena and half-fills a block of it; this
process leases and reserves in its name, by its token, which saves 45 of 50 gRPC channels. A full
one is the client library. All hold leases on the chain "held" and reservations of their own when
this process prints their pids, one line; then it waits until its input ends.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from pathlib import Path
from urllib.parse import quote

from daemons import FORMAT, Attached, keys_of

from kvtier import wire
from kvtier.v1 import cache_pb2, session_pb2, types_pb2  # noqa: F401

HELD = keys_of("held", 4)
MODEL = "swarm"


def light(folder: Path, out: int) -> None:
    attached = Attached(folder / "kvtier.sock.session", client_name="light")
    fd = attached.fds[0]
    with mmap.mmap(fd, os.fstat(fd).st_size) as arena:
        arena[4096 : 4096 + FORMAT.size_bytes // 2] = b"x" * (FORMAT.size_bytes // 2)
        os.write(out, attached.token)
        signal.pause()


def full(folder: Path, out: int, name: str) -> None:
    from kvtier.client import Client

    client = Client(folder / "kvtier.sock", deadline_s=10, timeout_s=30, client_name="full")
    space = client.open_namespace(model=MODEL, format=FORMAT)
    lease = space.lease(HELD)
    assert len(lease) == len(HELD)
    reservation = space.reserve(keys_of(name, 2))
    assert len(reservation) == 2
    view = reservation.blocks[0].view
    view[: len(view) // 2] = b"y" * (len(view) // 2)
    os.write(out, bytes(16))
    signal.pause()


def hold(folder: Path, tokens: list[bytes], name: str) -> None:
    """A lease and a reservation in the name of each."""
    import grpc

    from kvtier.v1 import cache_pb2_grpc

    with grpc.insecure_channel(f"unix:{quote(str(folder / 'kvtier.sock'))}") as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        spec = types_pb2.NamespaceSpec(model=MODEL, format=wire.encode_format(FORMAT))
        for number, token in enumerate(tokens):
            opened = stub.OpenNamespace(
                cache_pb2.OpenNamespaceRequest(session_token=token, spec=spec), timeout=30
            )
            query = cache_pb2.GroupQuery(
                namespace_id=opened.namespace_id, keys=b"".join(HELD), key_bytes=32
            )
            found = stub.Lookup(
                cache_pb2.LookupRequest(session_token=token, groups=[query], lease=True),
                timeout=30,
            )
            assert found.groups[0].block_count == len(HELD), found
            granted = stub.Reserve(
                cache_pb2.ReserveRequest(
                    session_token=token,
                    namespace_id=opened.namespace_id,
                    keys=b"".join(keys_of(f"{name}-{number}", 2)),
                    key_bytes=32,
                ),
                timeout=30,
            )
            assert granted.reservation_id, granted


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[4]
    lights, fulls = int(sys.argv[2]), int(sys.argv[3])
    pids: list[int] = []
    ends: list[int] = []
    for number in range(lights + fulls):
        reading, writing = os.pipe()
        # Before this process has a channel: gRPC's threads do not survive a fork.
        pid = os.fork()
        if pid == 0:
            try:
                if number < lights:
                    light(folder, writing)
                else:
                    full(folder, writing, f"{name}-full-{number}")
            finally:
                os._exit(1)
        os.close(writing)
        pids.append(pid)
        ends.append(reading)
    tokens = [os.read(end, 16) for end in ends]
    assert all(tokens), "a client did not come up"
    hold(folder, tokens[:lights], name)
    sys.stdout.write(" ".join(map(str, pids)) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


if __name__ == "__main__":
    main()
