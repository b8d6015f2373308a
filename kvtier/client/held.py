"""Lease and Reservation, blocking and asyncio: what a client holds, with its waiting.

Does not: say what a verb means; that is in `lease.py` and `reservation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvtier.block import CommitResult
from kvtier.client.lease import LeaseState
from kvtier.client.reservation import ReservationState, ReservedBlock
from kvtier.client.steps import drive, drive_async


class Lease(LeaseState):
    """A lease of a blocking client; see `LeaseState`.

    As a context manager: entering waits until it is ready; leaving releases it (once no array
    derived from its views lives) and raises LeaseLost if what was read may be wrong.
    """

    def wait(self, timeout_s: float = 10.0) -> None:
        """Until promoted: then `ready`, with the prefix readable at the deadline at least."""
        drive(self.wait_flow(timeout_s))

    def release(self) -> None:
        """Gives the lease back, or has it given back with the last derived array. Idempotent.

        Raises nothing for a daemon that is gone. Does not check: see `check`.
        """
        drive(self.release_flow())

    def __enter__(self) -> Self:
        self.wait(self._owner.linker.options.timeout_s)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        drive(self.leave_flow(failed=kind is not None))


class Reservation(ReservationState):
    """Room to write of a blocking client; see `ReservationState`.

    As a context manager: leaving aborts what was not committed.
    """

    def commit(
        self,
        blocks: Sequence[ReservedBlock] | None = None,
        *,
        durable: bool = False,
        timeout_s: float = 30.0,
    ) -> CommitResult:
        """Makes all (or these) blocks readable by everyone; their views end with it.

        `durable`: returns once they are on stable storage.

        Raises:
            ReservationExpired: deadline, abort, or the daemon is gone: nothing was stored.
            DaemonUnavailable, DeadlineExceeded: during the call: it is not known whether.
        """
        return drive(self.commit_flow(blocks, durable, timeout_s))

    def abort(self) -> None:
        """Gives the room back; nothing of it becomes visible. Idempotent, never raises."""
        drive(self.abort_flow(10.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


class AsyncLease(LeaseState):
    """A lease of an asyncio client; as `blocking.Lease`, see `LeaseState`."""

    async def wait(self, timeout_s: float = 10.0) -> None:
        """As `Lease.wait`."""
        await drive_async(self.wait_flow(timeout_s))

    async def release(self) -> None:
        """As `Lease.release`."""
        await drive_async(self.release_flow())

    async def __aenter__(self) -> Self:
        await self.wait(self._owner.linker.options.timeout_s)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await drive_async(self.leave_flow(failed=kind is not None))


class AsyncReservation(ReservationState):
    """Room to write of an asyncio client; as `blocking.Reservation`, see `ReservationState`."""

    async def commit(
        self,
        blocks: Sequence[ReservedBlock] | None = None,
        *,
        durable: bool = False,
        timeout_s: float = 30.0,
    ) -> CommitResult:
        """As `Reservation.commit`."""
        return await drive_async(self.commit_flow(blocks, durable, timeout_s))

    async def abort(self) -> None:
        """As `Reservation.abort`."""
        await drive_async(self.abort_flow(10.0))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.abort()
