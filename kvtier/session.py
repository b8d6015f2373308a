"""Session: one attached client process, as the store sees it.

Its end returns everything it held. Sessions of one tenant that name the same group may use each
other's leases; the taker owns them. The server makes sessions (`server/sessions.py`) and gives
each two callbacks that speak to the client's socket.

Does not: know sockets, tokens or credentials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtier.tiers.arena import Arena
from kvtier.tiers.room import WriteRoom


@dataclass(slots=True, eq=False)
class Session:
    """What one client may use. Event loop only.

    `announce(arena)` sends the arena's descriptor before any answer that names it;
    `withdraw(arena_id)` asks the client to unmap, answered through `Store.arena_returned`.
    """

    id: int
    tenant: str
    group: str
    client_name: str
    pid: int
    started_s: float
    announce: Callable[[Arena], None]
    withdraw: Callable[[int], None]
    room: WriteRoom | None = None
    announced: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    reservations: set[int] = field(default_factory=set)
    copying: int = 0  # commits whose bytes are being copied from `room` now
    ended: bool = False
