"""Daemon: the only builder. Starts everything in order, waits for a signal, ends it in reverse.

    lock -> memory -> tiers -> store (recovery) -> sockets -> READY
    SIGTERM: NOT_SERVING -> no more stores -> calls end -> sessions end -> flush, clean marker -> 0

Does not: serve a call or decide anything.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import kvtier
from kvtier import config as configuration
from kvtier import metrics
from kvtier.config import Config
from kvtier.counts import StoreCounts
from kvtier.errors import DeviceUnavailable, KvTierError
from kvtier.sections import session_socket
from kvtier.server import admin_service, cache_service
from kvtier.server.borders import Border
from kvtier.server.environment import (
    StateLock,
    check_memory,
    make_directories,
    notify_service_manager,
)
from kvtier.server.keys import open_keyring
from kvtier.server.sessions import SessionServer, Tenants
from kvtier.server.sockets import ADMIN_SOCKET_MODE, CLIENT_SOCKET_MODE, SocketPath
from kvtier.store import Store
from kvtier.units import SystemClock

log = logging.getLogger("kvtier.daemon")

EXIT_INVARIANT = 70  # the books disagreed, or a background task died: restart, SSD is whole
EXIT_KILLED = 128  # + signal: told a second time to stop
SWITCH_INTERVAL_S = 0.0005
# Young collections are frequent enough; a full one would stop the loop for long, and what lives
# long here (blocks, sessions) is not cyclic.
GC_THRESHOLDS = (50_000, 50, 1_000_000)
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_METRICS_TIMEOUT_S = 5.0
_PACKAGE = Path(kvtier.__file__).parent
_HEALTH_NAMES = ("", "liveness", cache_service.SERVICE, admin_service.SERVICE)

OpenStore = Callable[[Config], Awaitable[Store]]


def run(
    config: Config, config_path: Path | None = None, *, open_store: OpenStore | None = None
) -> int:
    """Serves until told to stop; returns the exit status. Logs to stderr, one line an event.

    0: clean stop. An environment error at start: its `exit_status`, after one line that says what
    to change. EXIT_INVARIANT and EXIT_KILLED + n leave the process at once, from wherever it is.
    """
    import uvloop

    logging.basicConfig(format=LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("kvtier").setLevel(config.server.log_level.upper())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(config, config_path, open_store=open_store))
        except KvTierError as error:
            log.error("daemon.failed %s: %s", error.reason, error)  # noqa: TRY400 - for people
            return error.exit_status
    return 0


async def serve(
    config: Config, config_path: Path | None = None, *, open_store: OpenStore | None = None
) -> None:
    """As `run`, on this event loop. Raises what prevents the start; then nothing is left behind."""
    daemon = Daemon(config, config_path)
    try:
        await daemon.start(open_store or build_store)
        await daemon.wait()
    finally:
        await daemon.stop()


async def build_store(config: Config) -> Store:
    """The tiers of this configuration and the store on them. Memory is prefaulted off the loop."""
    from kvtier.tiers.dram import DramTier
    from kvtier.tiers.files import Files
    from kvtier.tiers.slab import SLAB_RESERVED_BYTES
    from kvtier.tiers.ssd import SsdTier

    dram, ssd = config.tiers.dram, config.tiers.ssd
    keyring = open_keyring(config)
    dram_tier = await asyncio.to_thread(
        DramTier,
        dram.size_bytes // dram.segment_bytes,
        dram.segment_bytes,
        trust="single-tenant" if config.server.trust == "single-tenant" else "isolated",
        huge_pages=dram.huge_pages,
        name=config.state.memory_name,
    )
    ssd_tier: SsdTier | None = None
    try:
        if ssd.enabled:
            ssd_tier = await asyncio.to_thread(
                SsdTier,
                config.state.dir / "ssd",
                ssd.size_bytes // ssd.segment_bytes,
                ssd.segment_bytes - SLAB_RESERVED_BYTES,  # a slab file is a segment's size
                direct_io=ssd.direct_io,
                min_free_bytes=ssd.min_free_bytes,
                files=Files(max(1, ssd.queue_depth_max // config.batches_max)),
                record_crashes=True,
                keyring=keyring,
            )
        return await Store.open(config, dram=dram_tier, ssd=ssd_tier, clock=SystemClock())
    except BaseException:
        dram_tier.close()
        if ssd_tier is not None:
            ssd_tier.close()
        raise


class Daemon:
    """Everything that runs. Event loop only. `start`, `wait`, `stop`, once each and in order."""

    def __init__(self, config: Config, config_path: Path | None) -> None:
        self.config = config
        self._config_path = config_path
        self._store: Store | None = None
        self._sessions: SessionServer | None = None
        self._lock: StateLock | None = None
        self._paths: list[SocketPath] = []
        self._servers: list[Any] = []
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._border = Border(self.fatal)
        self._stop = asyncio.Event()
        self._stop_metrics: Callable[[], None] | None = None

    async def start(self, open_store: OpenStore) -> None:
        """All is up once this returns. Raises AlreadyRunning, DeviceUnavailable, store's errors."""
        config, loop = self.config, asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_exception)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number)
        own = [tenant.socket for tenant in config.tenants if tenant.socket is not None]
        sockets = [config.server.socket, *own]
        make_directories(config.state.dir, [*sockets, config.server.admin_socket])
        self._lock = StateLock(config.state.dir)
        predecessor_bytes = check_memory(config)
        store = self._store = await open_store(config)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._sessions = SessionServer(store, config, fatal=self.fatal)
        store.keeper.tally.predecessor_bytes = predecessor_bytes
        facts = admin_service.DaemonFacts(os.getpid(), config.server.trust, config.server.grace_s)
        self._cache = cache_service.CacheService(store, self._sessions, self._border)
        self._admin = admin_service.AdminService(store, self._border, facts)
        await self._serve_grpc(sockets, CLIENT_SOCKET_MODE, self._cache.handlers())
        await self._serve_grpc(
            [config.server.admin_socket], ADMIN_SOCKET_MODE, self._admin.handlers()
        )
        self._serve_sessions(sockets)
        if config.metrics.port is not None:
            self._start_metrics(config.metrics.host, config.metrics.port)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        notify_service_manager("READY=1")
        log.info(
            "daemon.ready pid=%d version=%s sockets=%s admin=%s state=%s",
            os.getpid(),
            kvtier.__version__,
            ",".join(map(str, sockets)),
            config.server.admin_socket,
            config.state.dir,
        )

    async def _serve_grpc(self, sockets: list[Path], mode: int, handlers: Any) -> None:
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", self.config.server.rpc_message_bytes_max),
                ("grpc.so_reuseport", 0),
            ),
            maximum_concurrent_rpcs=self.config.server.rpc_concurrency_max,
        )
        server.add_generic_rpc_handlers((handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        paths = []
        for socket_path in sockets:
            path = SocketPath(socket_path, mode)
            self._paths.append(path)
            paths.append(path)
            try:
                server.add_insecure_port(path.address)
            except RuntimeError as error:
                raise DeviceUnavailable(f"socket {socket_path}: {error}") from error
        self._servers.append(server)
        await server.start()
        for path in paths:
            path.publish()

    def _serve_sessions(self, sockets: list[Path]) -> None:
        assert self._sessions is not None
        for socket_path in sockets:
            path = SocketPath(session_socket(socket_path), CLIENT_SOCKET_MODE)
            self._paths.append(path)
            own = socket_path if socket_path != self.config.server.socket else None
            tenants = Tenants(t for t in self.config.tenants if t.socket == own)
            self._sessions.listen(path.bind_session_socket(), tenants)
            path.publish()

    def _start_metrics(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()

        async def snapshot() -> tuple[StoreCounts, dict[str, int], dict[tuple[str, str], int]]:
            assert self._store is not None
            counts = self._store.counts(admin_service.NAMESPACES_LISTED)
            assert isinstance(counts, StoreCounts)
            return counts, dict(self._border.calls), dict(self._border.failures)

        def read() -> tuple[StoreCounts, dict[str, int], dict[tuple[str, str], int]]:
            answer = asyncio.run_coroutine_threadsafe(snapshot(), loop)
            return answer.result(_METRICS_TIMEOUT_S)

        self._stop_metrics = metrics.serve_metrics(host, port, metrics.StoreCollector(read))

    async def wait(self) -> None:
        """Returns when a signal asks to stop. A background task's death ends the process."""
        assert self._store is not None
        stopped = asyncio.create_task(self._stop.wait())
        tending = self._store.tending
        awaited = [stopped] if tending is None else [stopped, tending]
        done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if tending is not None and tending in done:
            self.fatal(tending.exception() or AssertionError("the store's task ended by itself"))

    async def stop(self) -> None:
        """Everything ends in reverse order, within the grace. Also after a failed start."""
        deadline_s = time.monotonic() + self.config.server.grace_s
        notify_service_manager("STOPPING=1")
        if self._servers:
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        drain = None
        if self._store is not None and self._servers:
            # Ends calls that wait for room, and starts writing while the others end.
            drain = asyncio.create_task(self._store.drain(self.config.server.grace_s / 2))
        if self._sessions is not None:
            self._sessions.end_watches()
        calls_end_s = self.config.server.grace_s / 2
        await asyncio.gather(*(server.stop(calls_end_s) for server in self._servers))
        if drain is not None:
            await asyncio.wait([drain])
            if drain.exception() is not None:
                log.error("daemon.drain_failed", exc_info=drain.exception())
        if self._sessions is not None:
            self._sessions.stop()
        if self._store is not None:
            await self._store.close(grace_s=max(deadline_s - time.monotonic(), 1.0))
        for path in self._paths:
            path.remove()
        if self._lock is not None:
            self._lock.close()
        log.info("daemon.stopped")

    async def _set_health(self, status: Any) -> None:
        for name in _HEALTH_NAMES:
            await self._health.set(name, status)

    # --- signals

    def _on_stop_signal(self, number: signal.Signals) -> None:
        log.info("daemon.stopping signal=%s; once more ends it at once", number.name)
        self._stop.set()
        for again in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(again)
            signal.signal(again, _leave_at_once)

    def reload(self) -> None:
        """Takes what may change live from the configuration; says what needs a restart.

        A configuration that does not load changes nothing.
        """
        try:
            new = configuration.load(self._config_path, os.environ, running=self.config)
            taken = configuration.with_live_changes(self.config, new)
        except KvTierError as error:
            log.error("config.refused, the old one stays: %s", error)  # noqa: TRY400 - for people
            return
        old, self.config = self.config, taken
        for name, live in configuration.describe_changes(old, new):
            log.info("config.changed %s%s", name, "" if live else ": needs a restart")
        self._apply(taken)
        log.info("config.reloaded")

    def _apply(self, new: Config) -> None:
        assert self._store is not None
        assert self._sessions is not None
        logging.getLogger("kvtier").setLevel(new.server.log_level.upper())
        self._sessions.request_ids_max = new.limits.request_ids_max
        self._store.reconfigure(new)

    # --- bugs

    def _on_loop_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Callbacks and tasks that nobody awaits (moves, background work) end here."""
        error = context.get("exception")
        died = _is_ours(context.get("task") or context.get("future"))
        if error is not None and (isinstance(error, AssertionError) or died):
            self.fatal(error)
        loop.default_exception_handler(context)

    def fatal(self, error: BaseException) -> NoReturn:
        """Logs why and what the books say, and leaves the process: nothing may be trusted."""
        try:
            log.critical("daemon.bug: stopping at once", exc_info=error)
            log.critical("daemon.books %r", self._store)
            logging.shutdown()
        finally:
            os._exit(EXIT_INVARIANT)


def _is_ours(task: object) -> bool:
    """Whether this is a task that runs a coroutine of kvtier, and not one of gRPC's."""
    code = getattr(task.get_coro(), "cr_code", None) if isinstance(task, asyncio.Task) else None
    return code is not None and Path(code.co_filename).is_relative_to(_PACKAGE)


def _leave_at_once(number: int, _: object) -> NoReturn:
    os._exit(EXIT_KILLED + number)
