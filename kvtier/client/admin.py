"""AdminClient: the operator's calls, on the admin socket, blocking.

Answers are the protobuf messages of `AdminService` (`proto/kvtier/v1/admin.proto`).

Does not: need a session, map memory, or retry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Self

from kvtier.block import TierId
from kvtier.client.keys import KeysLike, packed_keys
from kvtier.client.link import CHANNEL_OPTIONS, channel_target, socket_path
from kvtier.client.steps import call_error, call_failures
from kvtier.config import default_socket
from kvtier.v1 import admin_pb2
from kvtier.wire import TIER_NUMBERS

_WIPE_S = 3600.0  # how long a purge may overwrite


class AdminClient:
    """A connection to a daemon's admin socket; who may connect is the socket's mode.

    Args:
        address: `unix:/path`, a path, or None for `admin.sock` beside the default socket.
        timeout_s: seconds a call may take beyond the waiting it was asked to do.

    Every method raises DaemonUnavailable (not running, or this user may not connect),
    DeadlineExceeded, and what it says itself. Any thread; make a new one after a fork.
    """

    def __init__(
        self, address: str | os.PathLike[str] | None = None, *, timeout_s: float = 10.0
    ) -> None:
        import grpc

        from kvtier.v1 import admin_pb2_grpc

        self.socket = (
            default_socket(os.environ).with_name("admin.sock")
            if address is None
            else socket_path(address)
        )
        self.timeout_s = timeout_s
        self._channel = grpc.insecure_channel(channel_target(self.socket), options=CHANNEL_OPTIONS)
        self._stub: Any = admin_pb2_grpc.AdminServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def stat(self, namespaces_max: int = 0) -> admin_pb2.StatResponse:
        """Where every byte is; the largest `namespaces_max` namespaces (0: 10)."""
        answer: admin_pb2.StatResponse = self._call(
            "Stat", admin_pb2.StatRequest(namespaces_max=namespaces_max)
        )
        return answer

    def namespaces(self) -> admin_pb2.ListNamespacesResponse:
        """All namespaces with every identifying field."""
        answer: admin_pb2.ListNamespacesResponse = self._call(
            "ListNamespaces", admin_pb2.ListNamespacesRequest()
        )
        return answer

    def blocks(
        self, namespace_id: int, *, page_size: int = 0, page_token: str = ""
    ) -> admin_pb2.ListBlocksResponse:
        """One page of a namespace's blocks (0: 100, at most 1,000). Raises NotFound."""
        answer: admin_pb2.ListBlocksResponse = self._call(
            "ListBlocks",
            admin_pb2.ListBlocksRequest(
                namespace_id=namespace_id, page_size=page_size, page_token=page_token
            ),
        )
        return answer

    def all_blocks(self, namespace_id: int) -> Iterator[admin_pb2.BlockEntry]:
        """Every block of a namespace, page by page. Raises NotFound."""
        page_token = ""
        while True:
            page = self.blocks(namespace_id, page_size=1000, page_token=page_token)
            yield from page.blocks
            page_token = page.next_page_token
            if not page_token:
                return

    def drain(self, wait_s: float = 0.0) -> admin_pb2.DrainResponse:
        """No more stores; all that is only in memory goes to SSD, for at most `wait_s` seconds
        (0: the configured grace).
        """
        return self._drain(admin_pb2.DrainRequest(timeout_s=wait_s), wait_s or 60.0)

    def undrain(self) -> admin_pb2.DrainResponse:
        """Stores are taken again."""
        return self._drain(admin_pb2.DrainRequest(undo=True), 0.0)

    def _drain(self, request: admin_pb2.DrainRequest, wait_s: float) -> admin_pb2.DrainResponse:
        answer: admin_pb2.DrainResponse = self._call("Drain", request, wait_s)
        return answer

    def flush(self, wait_s: float = 60.0) -> admin_pb2.FlushResponse:
        """Writes what is only in memory to SSD, durably, for at most `wait_s` seconds."""
        answer: admin_pb2.FlushResponse = self._call(
            "Flush", admin_pb2.FlushRequest(timeout_s=wait_s), wait_s
        )
        return answer

    def heal(self) -> admin_pb2.HealResponse:
        """Has a degraded SSD tier tried at once. Raises TierFailed: it is not well."""
        answer: admin_pb2.HealResponse = self._call("Heal", admin_pb2.HealRequest())
        return answer

    def start_scrub(self, bytes_per_s: int = 0) -> admin_pb2.ScrubResponse:
        """Begins to read all of the SSD tier, at that rate (0: the configured one), and to drop
        what is damaged. Raises LimitReached (one is under way), InvalidRequest, TierFailed.
        """
        return self._scrub(admin_pb2.SCRUB_ACTION_START, bytes_per_s)

    def stop_scrub(self) -> admin_pb2.ScrubResponse:
        """Ends it where it is; nothing happens when there is none."""
        return self._scrub(admin_pb2.SCRUB_ACTION_STOP)

    def scrub(self) -> admin_pb2.ScrubResponse:
        """The scrub under way, else the last one."""
        return self._scrub(admin_pb2.SCRUB_ACTION_UNSPECIFIED)

    def _scrub(
        self, action: admin_pb2.ScrubAction, bytes_per_s: int = 0
    ) -> admin_pb2.ScrubResponse:
        request = admin_pb2.ScrubRequest(action=action, bytes_per_s=bytes_per_s)
        answer: admin_pb2.ScrubResponse = self._call("Scrub", request, 60.0)
        return answer

    def resize(
        self, tier: TierId, size_bytes: int, wait_s: float = 3600.0
    ) -> admin_pb2.ResizeTierResponse:
        """Gives the tier another size, until the next start; waits at most `wait_s` seconds for
        it, after which it goes on. Raises Unsupported, InvalidRequest, TierFull, TierFailed,
        LimitReached (one is under way).
        """
        request = admin_pb2.ResizeTierRequest(tier=TIER_NUMBERS[tier], size_bytes=size_bytes)
        answer: admin_pb2.ResizeTierResponse = self._call("ResizeTier", request, wait_s)
        return answer

    def purge(self, namespace_id: int, wait_s: float = 10.0) -> admin_pb2.PurgeResponse:
        """Destroys a namespace, in memory and on disk; waits that long for its leases.

        Raises BlocksHeld (somebody reads it; nothing was changed), TierFailed (purge it again).
        """
        request = admin_pb2.PurgeRequest(namespace_id=namespace_id, timeout_s=wait_s)
        # Overwriting a large tier takes its time.
        answer: admin_pb2.PurgeResponse = self._call("Purge", request, wait_s + _WIPE_S)
        return answer

    def bypass(self, *, on: bool, namespace_id: int = 0) -> admin_pb2.BypassResponse:
        """Every lookup misses and nothing is stored, in one namespace or (0) everywhere."""
        answer: admin_pb2.BypassResponse = self._call(
            "Bypass", admin_pb2.BypassRequest(on=on, namespace_id=namespace_id)
        )
        return answer

    def evict(
        self, namespace_id: int, keys: KeysLike | None = None
    ) -> admin_pb2.AdminEvictResponse:
        """Forgets blocks and their descendants, or (None) all of the namespace, durably."""
        request = admin_pb2.AdminEvictRequest(namespace_id=namespace_id)
        if keys is not None:
            chain = packed_keys(keys)
            request.keys, request.key_bytes = chain.packed, chain.size
        answer: admin_pb2.AdminEvictResponse = self._call("AdminEvict", request)
        return answer

    def pin(self, namespace_id: int, keys: KeysLike) -> admin_pb2.AdminPinResponse:
        """Keeps blocks from being forgotten until unpinned."""
        return self._pin(namespace_id, keys, unpin=False)

    def unpin(self, namespace_id: int, keys: KeysLike) -> admin_pb2.AdminPinResponse:
        """Undoes one `pin` of the same blocks."""
        return self._pin(namespace_id, keys, unpin=True)

    def _pin(self, namespace_id: int, keys: KeysLike, *, unpin: bool) -> admin_pb2.AdminPinResponse:
        chain = packed_keys(keys)
        answer: admin_pb2.AdminPinResponse = self._call(
            "AdminPin",
            admin_pb2.AdminPinRequest(
                namespace_id=namespace_id, keys=chain.packed, key_bytes=chain.size, unpin=unpin
            ),
        )
        return answer

    def check(self) -> admin_pb2.CheckResponse:
        """Runs every invariant check of the daemon's books. Seconds on a full daemon."""
        answer: admin_pb2.CheckResponse = self._call("Check", admin_pb2.CheckRequest(), 60.0)
        return answer

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, method: str, request: Any, wait_s: float = 0.0) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=self.timeout_s + wait_s)
        except call_failures() as error:
            raise call_error(error) from error

    def __repr__(self) -> str:
        return f"<AdminClient {self.socket}>"
