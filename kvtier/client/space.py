"""SpaceBase and ClientBase: what the blocking and the asyncio client share besides the flows.

Does not: wait.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Required, TypedDict

from kvtier.block import BlockFormat, NamespaceSpec
from kvtier.client.link import CHANNEL_OPTIONS, ClientOptions, Linker, SpaceState, socket_path
from kvtier.client.session import Session
from kvtier.errors import InvalidRequest


class Identity(TypedDict, total=False):
    """The fields of `NamespaceSpec` that an engine states; all must match for a hit."""

    model: Required[str]
    format: Required[BlockFormat]
    weights: str
    adapter: str
    quantisation: str
    engine_config: str
    layout_fingerprint: str
    hash_algorithm: str
    hash_seed: str
    group_name: str


class SpaceBase:
    """A namespace of this client. Stays good when the daemon restarts: it is opened again."""

    def __init__(self, client: ClientBase, state: SpaceState) -> None:
        self._client = client
        self.state = state

    @property
    def spec(self) -> NamespaceSpec:
        """What was asked for; the tenant is the daemon's to say."""
        return self.state.spec

    @property
    def format(self) -> BlockFormat:
        """The shape of its blocks."""
        return self.state.spec.format

    @property
    def namespace_id(self) -> int:
        """Its number while this daemon lives (`kvtier namespaces`); 0 when not open."""
        return self.state.id

    @property
    def epoch(self) -> int:
        """The epoch as of the last open or clear; 0 when never open."""
        return self.state.epoch

    @property
    def view_bytes(self) -> int:
        """Bytes of one view: one shard of one block."""
        return self.state.spec.format.shard_bytes

    def __repr__(self) -> str:
        model = self.state.spec.model
        return f"<{type(self).__name__} {self.state.id or 'not open'}, model {model!r}>"


class ClientBase:
    """One client: its options and its link."""

    def __init__(
        self,
        address: str | os.PathLike[str] | None,
        open_channel: Callable[[str], tuple[Any, Any]],
        run_background: Callable[[Session], None],
        *,
        deadline_s: float,
        timeout_s: float,
        group: str,
        client_name: str,
        writes: bool,
    ) -> None:
        for name, seconds in (("deadline_s", deadline_s), ("timeout_s", timeout_s)):
            if not seconds > 0:
                raise InvalidRequest(f"{name} is {seconds}; it must be more than 0 seconds")
        options = ClientOptions(
            socket=socket_path(address),
            deadline_s=deadline_s,
            timeout_s=timeout_s,
            group=group,
            client_name=client_name or Path(sys.argv[0] or "python").name,
            writes=writes,
        )
        self.linker = Linker(options, open_channel, run_background)

    @property
    def linked(self) -> bool:
        """Whether a session stands now. False is normal before the first call."""
        link = self.linker.current()
        return link is not None and link.session.probe()

    @property
    def tenant(self) -> str:
        """Who the daemon says we are; "" before the first call."""
        link = self.linker.current()
        return "" if link is None else link.session.tenant

    def __repr__(self) -> str:
        state = "linked" if self.linked else "not linked"
        return f"<{type(self).__name__} {self.linker.options.socket}, {state}>"


def blocking_channel(target: str) -> tuple[Any, Any]:
    """Channel and stub of CacheService for threads."""
    import grpc

    from kvtier.v1 import cache_pb2_grpc

    channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    return channel, cache_pb2_grpc.CacheServiceStub(channel)  # type: ignore[no-untyped-call]


def asyncio_channel(target: str) -> tuple[Any, Any]:
    """Channel and stub of CacheService for the running loop."""
    import grpc.aio

    from kvtier.v1 import cache_pb2_grpc

    channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    return channel, cache_pb2_grpc.CacheServiceStub(channel)  # type: ignore[no-untyped-call]
