r"""ReservationState: room to write as a client holds it, the part that both clients share.

    reserved --commit()--> committed            (a part committed: the rest stays reserved)
         \---abort(), end of `with`, session's end, deadline--> as if never reserved

Does not: wait. Verbs are flows (`steps.py`).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence

from kvtier import wire
from kvtier.block import CommitResult, ReserveGrant
from kvtier.client.link import Link
from kvtier.client.steps import Flow
from kvtier.client.views import Places
from kvtier.errors import InvalidRequest, KvTierError, ReservationExpired
from kvtier.v1 import cache_pb2


class ReservedBlock:
    """One block to write: `key`, `index` among the keys asked for, and its writable `view`."""

    __slots__ = ("_place", "_places", "_view", "index", "key")

    def __init__(self, key: bytes, index: int, places: Places, place: int) -> None:
        self.key = key
        self.index = index
        self._places = places
        self._place = place
        self._view: memoryview | None = None

    @property
    def view(self) -> memoryview:
        """Writable memory of one shard of the block; released by commit and abort."""
        if self._view is None:
            arena, offset = self._places.place(self._place)
            self._view = arena.view(offset, self._places.size_bytes)
        return self._view

    def end(self) -> None:
        """Makes the view unusable, unless an array was made of it: that cannot be."""
        if self._view is not None:
            with contextlib.suppress(BufferError):
                self._view.release()

    def __repr__(self) -> str:
        return f"<ReservedBlock {self.index} {self.key.hex()[:16]}>"


class ReservationState:
    """Room for the blocks of one reserve that were not present.

    `blocks` are to be written. Of the keys asked for, those before `covered_count` have room now
    or are present already (`present_count` of them); those from it on found no room: reserve
    again. `reservation_id` 0: there is nothing to write.
    """

    _ended = True  # until built: `__del__` may see less

    def __init__(
        self, owner: object, link: Link, grant: ReserveGrant, keys: Sequence[bytes], shard: int
    ) -> None:
        self._owner = owner
        self.reservation_id = grant.reservation_id
        self.covered_count = grant.covered_count
        self.present_count = grant.present_count
        self.shard = shard
        self.blocks: tuple[ReservedBlock, ...] = ()
        self._link = link
        self._ended = not grant.reservation_id
        if grant.table is not None and grant.reservation_id:
            try:
                places = Places(link.session, grant.table)
            except KvTierError:
                self.abort_later()
                raise
            self.blocks = tuple(
                ReservedBlock(keys[index], index, places, place)
                for place, index in enumerate(grant.granted)
            )

    def commit_flow(
        self, blocks: Sequence[ReservedBlock] | None, durable: bool, timeout_s: float
    ) -> Flow[CommitResult]:
        if not self.reservation_id or (blocks is not None and not blocks):
            return CommitResult(0, 0, 0)
        if self._ended:
            raise ReservationExpired("this reservation was committed or aborted already")
        session = self._link.session
        if not session.probe():
            self._ended = True
            raise ReservationExpired(
                "the daemon that gave the room is gone, and the room with it: nothing was stored"
            )
        request = cache_pb2.CommitRequest(
            session_token=session.token,
            reservation_id=self.reservation_id,
            indexes=b"" if blocks is None else self._indexes(blocks),
            durable=durable,
            request_id=uuid.uuid4().hex,
        )
        try:
            answer = yield from self._link.call("Commit", request, time.monotonic() + timeout_s)
        except ReservationExpired:
            self._ended = True
            raise
        self._ended = blocks is None
        for block in self.blocks if blocks is None else blocks:
            block.end()
        return wire.decode_commit(answer)

    def _indexes(self, blocks: Sequence[ReservedBlock]) -> bytes:
        places = {id(block): place for place, block in enumerate(self.blocks)}
        try:
            return wire.pack_u32(sorted({places[id(block)] for block in blocks}))
        except KeyError:
            raise InvalidRequest("only blocks of this reservation can be committed by it") from None

    def abort_flow(self, timeout_s: float) -> Flow[None]:
        if self._ended:
            return
        self._ended = True
        for block in self.blocks:
            block.end()
        if self._link.session.alive:
            try:
                yield from abort(self._link, self.reservation_id, time.monotonic() + timeout_s)
            except KvTierError:
                self._ended = False
                self.abort_later()

    def abort_later(self) -> None:
        """Notes an abort for the background; what does not get through ends with the session."""
        if self._ended:
            return
        self._ended = True
        link, reservation_id = self._link, self.reservation_id
        if link.session.alive:
            link.session.later(lambda: abort_again(link, reservation_id))

    def __del__(self) -> None:
        self.abort_later()

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open"
        return f"<{type(self).__name__} {self.reservation_id} {state}, {len(self.blocks)} blocks>"


def abort(link: Link, reservation_id: int, until_s: float) -> Flow[None]:
    """Gives reserved room back."""
    request = cache_pb2.AbortRequest(
        session_token=link.session.token, reservation_id=reservation_id
    )
    yield from link.call("Abort", request, until_s)


def abort_again(link: Link, reservation_id: int) -> Flow[None]:
    """`abort` for the background: never raises, and comes back while the session lives."""
    try:
        yield from abort(link, reservation_id, time.monotonic() + 10.0)
    except KvTierError:
        if link.session.alive:
            link.session.jobs.append(lambda: abort_again(link, reservation_id))
