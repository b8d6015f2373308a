"""Recovering: brings the SSD tier back while clients are served from what is there already.

    load (names, epochs) -> [serve] -> read and order records (thread) -> adopt (loop, in slices)
                                -> forget the rest (thread) -> the tier takes copies: serving
    fails --> failed: DRAM alone serves; tried again by itself, and by `retry`

Until the tier serves, no slot of it is given away: what clients store stays in DRAM, demotions,
erasures and durable commits wait. What they store, evict or clear meanwhile wins over what comes
back later: stores are merged with it, an evict waits and looks again, and a cleared namespace's
epoch is durable at once, so that older records are dropped.

Does not: know how records are read (tiers/) or how a block comes into the books (ledger/recovery).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

from kvtier.block import NamespaceSpec, TierId
from kvtier.errors import DaemonUnavailable, KvTierError, TierFailed
from kvtier.ledger.chain import Namespace
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.recovery import adopt, merge
from kvtier.tally import Tally
from kvtier.testing.failpoints import reach
from kvtier.tiers.records import Found, Stretch
from kvtier.tiers.ssd import SsdTier
from kvtier.units import Clock

T = TypeVar("T")
log = logging.getLogger(__name__)
# What the loop does between two turns of everybody else. Lookups wait for that long at most.
_SLICE_S = 0.0005
_HAND_ON_S = 0.00003
_NOBODY_S = 0.00003  # an empty turn of the loop takes less
_CALL_S = 0.0015
_RETRY_S = 10.0
_NICE = 15
_LOCKED = "encrypted under another key"

SERVING, RECOVERING, FAILED = "serving", "recovering", "failed"


class InThread(Protocol):
    """Runs blocking work in a worker thread."""

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]: ...


class Recovering:
    """The way of one SSD tier back into one ledger. Event loop only.

    `state` is "recovering", "failed" (`problem` says why) or "serving", for good. `wake` is called
    when it changed; `stop_by` with what must stop the daemon.
    """

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        tally: Tally,
        clock: Clock,
        *,
        in_thread: InThread,
        set_epoch: Callable[[SsdTier, Namespace], None],
        wake: Callable[[], None],
        stop_by: Callable[[BaseException], None],
    ) -> None:
        self.state = SERVING if ssd is None else RECOVERING
        self.problem = ""
        self.registered: set[bytes] = set()  # digests of namespaces that the tier knows
        self._ssd = ssd
        self._ledger = ledger
        self._tally = tally
        self._clock = clock
        self._in_thread = in_thread
        self._set_epoch = set_epoch
        self._wake = wake
        self._stop_by = stop_by
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._again = asyncio.Event()
        self._stopping = False
        self._loaded = False
        # Cleared while nobody could say which epochs lie on disk.
        self._cleared: set[bytes] = set()

    @property
    def is_over(self) -> bool:
        """Whether all that the tier had is in the ledger, and it takes copies."""
        return self.state == SERVING

    # --- coming back

    async def begin(self) -> None:
        """Namespaces and their epochs are in the ledger when this returns, unless the tier failed;
        blocks follow in the background.
        """
        if self._ssd is None:
            return
        self._ledger.closed_tiers.add(TierId.SSD)
        with suppress(TierFailed):
            await self._load(self._ssd)
        self._task = asyncio.get_running_loop().create_task(self._run(self._ssd))
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stop_by(error)

    async def _load(self, ssd: SsdTier) -> None:
        try:
            await self._in_thread(ssd.load)
            await self._join(ssd)
        except TierFailed as error:
            self._fail(error)
            raise
        self._loaded = True

    async def _join(self, ssd: SsdTier) -> None:
        """Namespaces on disk and those opened since are the same from now on."""
        for digest, descriptor, epoch in ssd.namespaces():
            try:
                space = self._ledger.recall_namespace(NamespaceSpec.from_json(descriptor))
            except (KvTierError, TypeError, ValueError, KeyError):
                log.warning("namespace.unknown %s: its blocks are dropped", digest.hex())
                continue
            if space.digest != digest:
                continue
            if digest in self._cleared:
                space.epoch = max(space.epoch, epoch + 1)
                await self._in_thread(functools.partial(self._set_epoch, ssd, space))
                self._cleared.discard(digest)
            space.epoch = max(space.epoch, epoch)
            space.locked = _LOCKED if digest in ssd.keyring.locked else ""
            self.registered.add(digest)

    async def _run(self, ssd: SsdTier) -> None:
        started_s = self._clock.monotonic_s()
        while True:
            try:
                if not self._loaded:
                    await self._load(ssd)
                found = await self._find(ssd)
                break
            except TierFailed as error:
                self._fail(error)
            except DaemonUnavailable:
                return
            if not await self._wait_to_retry():
                return
        if not await self._adopt(ssd, found):
            return
        reach("recover.restored")
        while not await self._forget(ssd, found):
            if not await self._wait_to_retry():
                return
        await self._in_thread(found.let_go)
        self._tally.recovery_s = self._clock.monotonic_s() - started_s
        self._ledger.closed_tiers.discard(TierId.SSD)
        self._change(SERVING)
        log.info(
            "tier.recovered blocks=%d seconds=%.2f",
            self._tally.recovered_blocks,
            self._tally.recovery_s,
        )

    async def _find(self, ssd: SsdTier) -> Found:
        return await self._apart(functools.partial(ssd.find, stopping=lambda: self._stopping))

    async def _apart(self, work: Callable[[], T]) -> T:
        """In a thread of its own that runs when nobody else wants the core."""
        with ThreadPoolExecutor(1, "kvtier-recover", initializer=_be_nice) as pool:
            return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def _forget(self, ssd: SsdTier, found: Found) -> bool:
        """Whether what did not come back can never come back: else, once what is newer is evicted,
        an older copy of the same block would at the next start.
        """
        try:
            forget = functools.partial(ssd.forget, found, stopping=lambda: self._stopping)
            await self._apart(forget)
        except TierFailed as error:
            self._fail(error)
            return False
        except DaemonUnavailable:
            return False
        return True

    def _fail(self, error: TierFailed) -> None:
        self.problem = str(error)
        if self.state != FAILED:
            log.warning("tier.failed at start, DRAM serves alone: %s", error)
        self._change(FAILED)

    async def _wait_to_retry(self) -> bool:
        """Whether to try again; else the daemon stops."""
        self._again.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                await self._again.wait()
        if self.state == FAILED and not self._stopping:
            self._change(RECOVERING)
        return not self._stopping

    async def _adopt(self, ssd: SsdTier, found: Found) -> bool:
        """All blocks into the books, in slices; False when the daemon stops meanwhile."""
        spaces = {space.digest: space for space in self._ledger.spaces.values()}
        until_s = time.perf_counter() + _SLICE_S
        for stretch in found.stretches():
            space = spaces.get(stretch.namespace)
            epoch = found.shapes[stretch.namespace].epoch
            for refused in self._place(space, epoch, stretch):
                # Of an older epoch its header says so; another must not be read a second time.
                old = space is not None and space.epoch != epoch
                (found.dropped if old else found.stale).extend(refused)
                if time.perf_counter() >= until_s:
                    await _give_way()
                    if self._stopping:
                        return False
                    until_s = time.perf_counter() + _SLICE_S
        for _ in self._ledger.slots[TierId.SSD].settle():
            await _give_way()
        return not self._stopping

    def _place(
        self, space: Namespace | None, epoch: int, stretch: Stretch
    ) -> Iterable[Iterable[int]]:
        """Yields what is refused, after each part that the loop may be held for."""
        if space is None or space.epoch != epoch:
            yield stretch.slots
            return
        if adopt(self._ledger, space, TierId.SSD, stretch):
            self._tally.recovered_blocks += len(stretch.keys) // stretch.key_size
            yield ()
            return
        at = 0
        for count, refused in merge(self._ledger, space, TierId.SSD, stretch):
            self._tally.recovered_blocks += count
            at += count * space.shards + len(refused)
            yield refused
            if space.epoch != epoch:  # cleared meanwhile
                yield stretch.slots[at:]
                return

    # --- others

    def cleared(self, space: Namespace) -> None:
        """The namespace began an epoch that could not be made durable: the tier was not there.

        Raises:
            TierFailed: always, then; the epoch is made durable when the tier comes back.
        """
        if self._ssd is not None and not self._loaded:
            self._cleared.add(space.digest)
            raise TierFailed(f"cleared in memory, but not yet durably: {self.problem}")

    async def wait(self) -> None:
        """Returns when all that the tier had is in the ledger.

        Raises:
            TierFailed: it cannot be read now. DaemonUnavailable: the daemon stops.
        """
        while self.state == RECOVERING:
            if self._stopping:
                raise DaemonUnavailable("the daemon is stopping, and its SSD tier is not read yet")
            await self._changed.wait()
        if self.state == FAILED:
            raise TierFailed(f"the SSD tier failed at start: {self.problem}")

    async def settle(self, timeout_s: float) -> None:
        """As `wait`, but no longer than that, and without an error."""
        with suppress(TierFailed, DaemonUnavailable, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait()

    def retry(self) -> bool:
        """Tries a failed tier again at once; False when it has not failed."""
        if self.state != FAILED:
            return False
        self._change(RECOVERING)
        self._again.set()
        return True

    async def stop(self) -> None:
        """Ends it wherever it is; the next start finds everything. Idempotent."""
        self._stopping = True
        self._again.set()
        self._changed.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _change(self, state: str) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()
        self._wake()

    def __repr__(self) -> str:
        return f"<Recovering {self.state} {self.problem}>"


def _be_nice() -> None:
    with suppress(OSError):  # not allowed: it takes its share like others
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


async def _give_way() -> None:
    """Lets everybody else run. A call takes several turns of the loop: where somebody has begun
    one, it gets the loop for as long as a call takes, or each of its turns would wait for us.
    """
    # gRPC polls in a thread of its own, which could not tell us anything while we worked.
    time.sleep(_HAND_ON_S)  # noqa: ASYNC251 - a twentieth of a millisecond
    before_s = time.perf_counter()
    await asyncio.sleep(0)
    if time.perf_counter() - before_s > _NOBODY_S:
        await asyncio.sleep(_CALL_S)
