"""Every Prometheus series of kvtier, read from `StoreCounts` when scraped. Off by default.

Names and labels are a promise to dashboards and alerts. Labels never hold a key, a token, a model
name or anything else a client chose: namespaces go by their number.

Does not: count anything, or know the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from kvtier.counts import StoreCounts
from kvtier.errors import DeviceUnavailable

# (series, gauge or counter, help, attribute of TierUse)
TIER_SERIES: Final = (
    ("kvtier_tier_capacity_bytes", "gauge", "Size of the tier.", "capacity_bytes"),
    ("kvtier_tier_used_bytes", "gauge", "Bytes of slots in use.", "used_bytes"),
    ("kvtier_tier_payload_bytes", "gauge", "Bytes of block content held.", "payload_bytes"),
    ("kvtier_tier_blocks", "gauge", "Blocks that have a copy in the tier.", "block_count"),
    ("kvtier_tier_fragmentation_ratio", "gauge", "Owned but without content.", "fragmentation"),
    ("kvtier_tier_in_bytes_total", "counter", "Bytes written into the tier.", "in_bytes"),
    ("kvtier_tier_out_bytes_total", "counter", "Bytes read from the tier.", "out_bytes"),
    ("kvtier_tier_hit_blocks_total", "counter", "Blocks found here by lookups.", "hit_blocks"),
    ("kvtier_tier_written_day_bytes", "gauge", "Written in 24 h (SSD).", "written_day_bytes"),
    ("kvtier_tier_errors_total", "counter", "Failed slot reads and writes.", "error_count"),
)
# (..., attribute of StoreCounts)
STORE_SERIES: Final = (
    ("kvtier_uptime_seconds", "gauge", "Since the daemon's start.", "uptime_s"),
    ("kvtier_lookups_total", "counter", "Lookups.", "lookup_count"),
    ("kvtier_lookup_blocks_total", "counter", "Blocks asked for.", "lookup_blocks"),
    ("kvtier_hit_blocks_total", "counter", "Blocks found.", "hit_blocks"),
    ("kvtier_miss_blocks_total", "counter", "Blocks asked for and not found.", "miss_blocks"),
    ("kvtier_leases", "gauge", "Leases held.", "lease_count"),
    ("kvtier_lease_oldest_seconds", "gauge", "Age of the oldest lease.", "lease_oldest_s"),
    ("kvtier_reservations", "gauge", "Reservations held.", "reservation_count"),
    ("kvtier_reservation_oldest_seconds", "gauge", "Oldest.", "reservation_oldest_s"),
    ("kvtier_corrupt_total", "counter", "Copies dropped as damaged: alert.", "corrupt_count"),
    ("kvtier_stored_blocks_total", "counter", "Blocks committed.", "stored_blocks"),
    ("kvtier_evicted_blocks_total", "counter", "Blocks forgotten.", "evicted_blocks"),
    ("kvtier_recovered_blocks", "gauge", "Blocks found again at start.", "recovered_blocks"),
    ("kvtier_recovery_seconds", "gauge", "How long that took.", "recovery_s"),
    ("kvtier_leases_revoked_total", "counter", "Leases taken back.", "leases_revoked"),
    ("kvtier_predecessor_bytes", "gauge", "Memory old clients hold.", "predecessor_bytes"),
)
ROUTE_SERIES: Final = (
    ("kvtier_moves_total", "counter", "Moves between tiers.", "move_count"),
    ("kvtier_move_bytes_total", "counter", "Bytes moved.", "size_bytes"),
    ("kvtier_move_failures_total", "counter", "Moves that failed.", "failed_count"),
    ("kvtier_moves_in_flight", "gauge", "Moves under way.", "in_flight"),
    ("kvtier_moves_queued", "gauge", "Moves that wait.", "queued"),
)
NAMESPACE_SERIES: Final = (
    ("kvtier_namespace_blocks", "gauge", "Blocks of the namespace.", "block_count"),
    ("kvtier_namespace_bytes", "gauge", "Bytes of the namespace.", "size_bytes"),
    ("kvtier_namespace_hit_blocks_total", "counter", "Blocks found.", "hit_blocks"),
    ("kvtier_namespace_miss_blocks_total", "counter", "Blocks not found.", "miss_blocks"),
)
RPC_SERIES: Final = (
    ("kvtier_rpc_calls_total", "counter", "Calls by method.", ("method",)),
    ("kvtier_rpc_failures_total", "counter", "Failed calls by reason.", ("method", "reason")),
)
SCRUB_SERIES: Final = (
    ("kvtier_scrub_progress_ratio", "gauge", "Of the scrub under way.", "progress"),
    ("kvtier_scrub_ended_timestamp_seconds", "gauge", "All was last read then.", "ended_s"),
)
_Series = Sequence[tuple[str, str, str, str]]


class StoreCollector:
    """Turns one `StoreCounts` into series at every scrape.

    `read()` is called in the endpoint's thread and returns the counts, the calls by method, and
    the failures by (method, reason).
    """

    def __init__(
        self,
        read: Callable[[], tuple[StoreCounts, dict[str, int], dict[tuple[str, str], int]]],
    ) -> None:
        self._read = read

    def describe(self) -> Iterator[Any]:
        """Nothing in advance: registering must not ask the store."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """All families, each with its samples."""
        counts, calls, failures = self._read()
        tiers = [((use.tier.label,), use) for use in counts.tiers]
        namespaces = [((str(use.namespace_id), use.spec.tenant), use) for use in counts.namespaces]
        yield from _families(STORE_SERIES, (), [((), counts)])
        yield from _families(TIER_SERIES, ("tier",), tiers)
        yield from _families(ROUTE_SERIES, ("route",), [((r.route,), r) for r in counts.routes])
        yield from _families(NAMESPACE_SERIES, ("namespace", "tenant"), namespaces)
        reasons = _family("kvtier_lookup_reasons_total", "counter", "What stopped.", ("reason",))
        for reason, count in counts.reasons.items():
            reasons.add_metric((reason.value,), count)
        yield reasons
        yield from _families(SCRUB_SERIES, (), [((), counts.scrub)])
        damage = _family("kvtier_corrupt_copies_total", "counter", "By damage.", ("damage",))
        for kind, count in counts.corrupt.items():
            damage.add_metric((kind,), count)
        yield damage
        state = _family("kvtier_state", "gauge", "1 for the state it is in.", ("state",))
        for name in ("serving", "draining", "bypassed"):
            state.add_metric((name,), float(counts.state == name))
        yield state
        sessions = _family("kvtier_sessions", "gauge", "Attached clients.", ("tenant",))
        for tenant in {session.tenant for session in counts.sessions}:
            sessions.add_metric((tenant,), sum(s.tenant == tenant for s in counts.sessions))
        yield sessions
        keyed: tuple[dict[Any, int], ...] = (
            {(method,): count for method, count in calls.items()},
            failures,
        )
        for (name, kind, about, labels), values in zip(RPC_SERIES, keyed, strict=True):
            family = _family(name, kind, about, labels)
            for key, count in values.items():
                family.add_metric(key, count)
            yield family


def serve_metrics(host: str, port: int, collector: StoreCollector) -> Callable[[], None]:
    """Answers scrapes at `http://host:port/metrics` in a thread; returns what ends it.

    Raises:
        DeviceUnavailable: the address cannot be bound.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise DeviceUnavailable(f"metrics at {host}:{port}: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _families(
    series: _Series, labels: tuple[str, ...], sources: Sequence[tuple[tuple[str, ...], object]]
) -> Iterator[Any]:
    for name, kind, about, attribute in series:
        family = _family(name, kind, about, labels)
        for values, source in sources:
            family.add_metric(values, getattr(source, attribute))
        yield family


def _family(name: str, kind: str, about: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
    return family(name.removesuffix("_total"), about, labels=labels)
