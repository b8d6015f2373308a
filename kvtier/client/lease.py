r"""LeaseState: a lease as a client holds it, the part that both clients share.

    granted --wait--> ready --release()--> released
                        \--- taken back, session ended, daemon gone ---> lost

A lease is really released when the lease object was released (or dropped) *and* the last array
derived from its views is gone; until then `check` goes on working.

Does not: wait. Verbs are flows (`steps.py`).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

from kvtier import wire
from kvtier.block import LeaseGrant, Reason
from kvtier.client.link import Link
from kvtier.client.session import Session
from kvtier.client.space import ClientBase
from kvtier.client.steps import Flow
from kvtier.client.views import Hold, Holding, Places, Views, released
from kvtier.errors import InvalidRequest, KvTierError, LeaseLost
from kvtier.v1 import cache_pb2

RELEASE_TIMEOUT_S = 10.0


class LeaseState:
    """What a client may read, and the means to check that it still may.

    `block_count` blocks from the first of the chain are leased; those from `first_needed` on have
    views. `reason` says why it is not all that was asked for. With `block_count` 0 nothing was
    leased and there is nothing to release.
    """

    lease_id = 0  # until built: `__del__` may see less

    def __init__(
        self,
        owner: ClientBase,
        link: Link,
        grant: LeaseGrant,
        reason: Reason,
        shard: int,
    ) -> None:
        self._owner = owner
        self.lease_id = grant.lease_id
        self.reason = reason
        self._link = link
        self._shard = shard
        self._hold: Hold | None = None
        self._hold_weak: Callable[[], Hold | None] = lambda: None
        self._holding: Holding | None = None
        self._views: Views | None = None
        self._released = False
        try:
            self._take(grant)
        except KvTierError:
            self._released = True
            if grant.lease_id:
                link.session.drop(grant.lease_id)
            raise

    def _take(self, grant: LeaseGrant) -> None:
        self.block_count = grant.block_count
        self.first_needed = grant.first_needed
        self.ready_count = grant.ready_count
        if grant.table is not None and grant.lease_id:
            session = self._link.session
            self._hold = Hold(session, self.lease_id, Places(session, grant.table))
            self._hold_weak = weakref.ref(self._hold)
            self._holding = self._hold.holding

    @property
    def ready(self) -> bool:
        """Whether all blocks can be read now; else `wait` (entering `with` does)."""
        return self._hold is not None or not self.block_count

    @property
    def views(self) -> Views:
        """Read-only memoryviews of blocks `first_needed`..`block_count`, in order, made lazily.

        They lie in the daemon's memory: nothing was copied. Cost: nothing until indexed.

        Raises:
            LeaseLost: the lease was released. InvalidRequest: it is not ready yet.
        """
        if self._views is None:
            if self._released:
                raise released()
            if self._hold is None:
                if self.block_count:
                    raise InvalidRequest("the lease's blocks are still on their way: wait() first")
                raise LeaseLost("nothing was leased: there are no views")
            self._views = Views(self._hold)
        return self._views

    def view(self, index: int) -> memoryview:
        """The view of block `index` of the chain (`first_needed` <= index < `block_count`)."""
        if not self.first_needed <= index < self.block_count:
            bounds = f"{self.first_needed} to {self.block_count - 1}"
            raise InvalidRequest(f"block {index} has no view in this lease; {bounds} have")
        return self.views[index - self.first_needed]

    def check(self) -> None:
        """Returns if all that was read from the views until now is what was committed.

        Call it after reading or copying and before using what was read. Costs a few microseconds.

        Raises:
            LeaseLost: the daemon took the lease back, the session ended, the daemon is gone, or
                the lease was released and no view of it lives.
        """
        if not self.lease_id:
            return
        hold = self._hold_weak()
        gone = hold is None and (self._released or self._holding is not None)
        taken_back = hold is not None and hold.places.taken_back()
        del hold  # a traceback of what follows must not keep the lease
        if gone:
            raise released()
        if not self._link.session.probe():
            raise LeaseLost("the daemon that gave the lease is gone, and the lease with it")
        if taken_back:
            raise LeaseLost("the daemon took the lease back: what was read may be other bytes")

    def wait_flow(self, timeout_s: float) -> Flow[None]:
        """Has the daemon finish promoting; after it the lease is ready, maybe with less."""
        if self.ready:
            return
        request = cache_pb2.LeaseRequest(
            session_token=self._link.session.token, lease_id=self.lease_id, shard=self._shard
        )
        if not self._link.session.alive:
            raise LeaseLost("the daemon that gave the lease is gone, and the lease with it")
        until_s = time.monotonic() + timeout_s
        answer = yield from self._link.call("Lease", request, until_s)
        self.reason = wire.decode_reason(answer.reason)
        self._take(wire.decode_lease(answer.grant))

    def release_flow(self) -> Flow[None]:
        """Lets go. Does not raise for a daemon that is gone: nothing is held there then."""
        if self._released or not self.lease_id:
            return
        self._released = True
        holding = self._holding
        if holding is not None:
            holding.leaving = True
            self._views = None
            self._hold = None  # with no derived array alive, this runs Hold.__del__ now
            holding.leaving = False
            if not holding.free:
                return
        session = self._link.session
        if not session.alive:
            return
        try:
            yield from release(self._link, [self.lease_id])
        except KvTierError:
            session.dropped.append(self.lease_id)  # the keeper tries again

    def leave_flow(self, failed: bool) -> Flow[None]:
        """The end of `with`: releases, then raises LeaseLost unless the body failed already."""
        lost: LeaseLost | None = None
        if not self._released:
            try:
                self.check()
            except LeaseLost as error:
                lost = error
        yield from self.release_flow()
        if lost is not None and not failed:
            raise lost

    def __del__(self) -> None:
        if self.lease_id and not self._released and self._holding is None:
            self._link.session.drop(self.lease_id)

    def __len__(self) -> int:
        return self.block_count

    def __repr__(self) -> str:
        state = "released" if self._released else "ready" if self.ready else "waiting"
        return f"<{type(self).__name__} {self.lease_id} {state}, {self.block_count} blocks>"


def release(link: Link, lease_ids: list[int]) -> Flow[None]:
    """Releases leases of this link."""
    request = cache_pb2.ReleaseRequest(session_token=link.session.token, lease_ids=lease_ids)
    yield from link.call("Release", request, time.monotonic() + RELEASE_TIMEOUT_S)


def background(link: Link, session: Session) -> list[Flow[None]]:
    """Takes all that is left to do for a session, as flows that never raise."""
    flows = []
    lease_ids: list[int] = []
    while session.dropped and len(lease_ids) < wire.LEASES_PER_CALL_MAX:
        lease_ids.append(session.dropped.popleft())
    if lease_ids:
        flows.append(_release_again(link, lease_ids))
    while session.jobs:
        flows.append(session.jobs.popleft()())
    return flows


def _release_again(link: Link, lease_ids: list[int]) -> Flow[None]:
    try:
        yield from release(link, lease_ids)
    except KvTierError:
        if link.session.alive:
            link.session.dropped.extend(lease_ids)
