"""AdminService: the operator's RPCs, on a socket whose mode says who may call them.

Does not: know sessions; the store takes `None` for the operator.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import grpc

import kvtier
from kvtier.block import GroupQuery, Keys
from kvtier.counts import NamespaceUse, ScrubUse, StoreCounts, TierUse
from kvtier.errors import InvalidRequest
from kvtier.server.borders import Border, Context, Plain, Waiting, unary
from kvtier.store import Store
from kvtier.v1 import admin_pb2
from kvtier.wire import REASON_NUMBERS, TIER_NUMBERS, decode_tier, encode_spec

SERVICE = "kvtier.v1.AdminService"
NAMESPACES_LISTED = 10
NAMESPACES_LISTED_MAX = 65_536
BLOCKS_LISTED = 100
BLOCKS_LISTED_MAX = 1000
WAIT_S_MAX = 3600.0
_PAGE_TOKEN_CHARACTERS_MAX = 128


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """What Stat says beside the store's counts."""

    pid: int
    trust: str
    grace_s: float


class AdminService:
    """The handlers. Event loop only. Raises from each: InvalidRequest, store's."""

    def __init__(self, store: Store, border: Border, facts: DaemonFacts) -> None:
        self._store = store
        self._border = border
        self.facts = facts

    def handlers(self) -> Any:
        """What a server is given: every RPC of the service, behind the border."""
        plain: dict[str, tuple[Plain, Any]] = {
            "Stat": (self.stat, admin_pb2.StatRequest),
            "ListNamespaces": (self.list_namespaces, admin_pb2.ListNamespacesRequest),
            "ListBlocks": (self.list_blocks, admin_pb2.ListBlocksRequest),
            "Bypass": (self.bypass, admin_pb2.BypassRequest),
            "AdminPin": (self.pin, admin_pb2.AdminPinRequest),
            "Check": (self.check, admin_pb2.CheckRequest),
        }
        waiting: dict[str, tuple[Waiting, Any]] = {
            "Drain": (self.drain, admin_pb2.DrainRequest),
            "Flush": (self.flush, admin_pb2.FlushRequest),
            "AdminEvict": (self.evict, admin_pb2.AdminEvictRequest),
            "Heal": (self.heal, admin_pb2.HealRequest),
            "Scrub": (self.scrub, admin_pb2.ScrubRequest),
            "ResizeTier": (self.resize_tier, admin_pb2.ResizeTierRequest),
            "Purge": (self.purge, admin_pb2.PurgeRequest),
        }
        border = self._border
        methods = {n: unary(border.plain(n, verb), kind) for n, (verb, kind) in plain.items()}
        methods |= {n: unary(border.waiting(n, verb), kind) for n, (verb, kind) in waiting.items()}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def stat(self, request: admin_pb2.StatRequest, _: Context) -> bytes:
        """The store's counts and the daemon's facts."""
        listed = min(request.namespaces_max or NAMESPACES_LISTED, NAMESPACES_LISTED_MAX)
        counts = self._store.counts(listed)
        assert isinstance(counts, StoreCounts)
        return encode_counts(counts, self.facts).SerializeToString()

    def list_namespaces(self, _request: admin_pb2.ListNamespacesRequest, _: Context) -> bytes:
        """All of them."""
        answer = admin_pb2.ListNamespacesResponse()
        for use in self._store.namespaces():
            assert isinstance(use, NamespaceUse)
            answer.namespaces.add(
                stat=_namespace_stat(use),
                spec=encode_spec(use.spec),
                fields=use.spec.flat(),
                digest=use.digest.hex(),
            )
        return answer.SerializeToString()

    def list_blocks(self, request: admin_pb2.ListBlocksRequest, _: Context) -> bytes:
        """A page, by key; the page token is the last key of the page before, in hex."""
        size = request.page_size or BLOCKS_LISTED
        if size > BLOCKS_LISTED_MAX:
            raise InvalidRequest(f"page_size is {size}; at most {BLOCKS_LISTED_MAX} are listed")
        try:
            after = bytes.fromhex(request.page_token[:_PAGE_TOKEN_CHARACTERS_MAX])
        except ValueError:
            raise InvalidRequest("page_token is none that was answered") from None
        blocks: list[Any] = self._store.blocks(request.namespace_id, after, size)
        answer = admin_pb2.ListBlocksResponse()
        for block in blocks:
            answer.blocks.add(
                key=block.key,
                parent=block.parent,
                position=block.position,
                tiers=[TIER_NUMBERS[tier] for tier in block.tiers],
                size_bytes=block.size_bytes,
                lease_count=block.lease_count,
                pin_count=block.pin_count,
            )
        if len(blocks) == size:
            answer.next_page_token = blocks[-1].key.hex()
        return answer.SerializeToString()

    async def drain(self, request: admin_pb2.DrainRequest, _: Context) -> bytes:
        """Stops or takes up stores."""
        timeout_s = self._timeout_s(request.timeout_s)
        if request.undo:
            self._store.undrain()
            return b""
        flushed, remaining = await self._store.drain(timeout_s)
        return admin_pb2.DrainResponse(
            flushed_blocks=flushed, remaining_blocks=remaining
        ).SerializeToString()

    async def flush(self, request: admin_pb2.FlushRequest, _: Context) -> bytes:
        """Writes down what is only in memory."""
        flushed, remaining = await self._store.flush(self._timeout_s(request.timeout_s))
        return admin_pb2.FlushResponse(
            flushed_blocks=flushed, remaining_blocks=remaining
        ).SerializeToString()

    async def heal(self, _request: admin_pb2.HealRequest, _: Context) -> bytes:
        """Probes the SSD tier; TierFailed when it is not well."""
        return admin_pb2.HealResponse(state=await self._store.keeper.heal()).SerializeToString()

    async def scrub(self, request: admin_pb2.ScrubRequest, _: Context) -> bytes:
        """Begins or ends one; what there is to say of it."""
        scrubbing = self._store.keeper.scrubbing
        if request.action == admin_pb2.SCRUB_ACTION_START:
            await scrubbing.start(request.bytes_per_s)
        elif request.action == admin_pb2.SCRUB_ACTION_STOP:
            await scrubbing.stop()
        use = scrubbing.use()
        answer = admin_pb2.ScrubResponse(**{name: getattr(use, name) for name in _SCRUB_FIELDS})
        for damage, count in use.damaged.items():
            answer.damaged.add(damage=damage, count=count)
        return answer.SerializeToString()

    async def resize_tier(self, request: admin_pb2.ResizeTierRequest, _: Context) -> bytes:
        """Another size, until the next start."""
        tier = decode_tier(request.tier)
        done = await self._store.keeper.resizing.resize(tier, request.size_bytes)
        return admin_pb2.ResizeTierResponse(**asdict(done)).SerializeToString()

    async def purge(self, request: admin_pb2.PurgeRequest, _: Context) -> bytes:
        """Clears a namespace off the disk."""
        timeout_s = self._timeout_s(request.timeout_s)
        done = await self._store.purge(request.namespace_id, timeout_s)
        return admin_pb2.PurgeResponse(
            block_count=done.block_count,
            key_destroyed=done.key_destroyed,
            wiped_bytes=done.wiped_bytes,
        ).SerializeToString()

    def bypass(self, request: admin_pb2.BypassRequest, _: Context) -> bytes:
        """On or off, for all or one namespace."""
        self._store.bypass(request.on, request.namespace_id)
        return admin_pb2.BypassResponse(on=request.on).SerializeToString()

    async def evict(self, request: admin_pb2.AdminEvictRequest, _: Context) -> bytes:
        """Keys with their descendants, or without keys the whole namespace."""
        if request.keys:
            keys = Keys(request.keys, request.key_bytes)
            count = await self._store.evict(None, GroupQuery(request.namespace_id, keys))
        else:
            count = (await self._store.clear_namespace(None, request.namespace_id))[1]
        return admin_pb2.AdminEvictResponse(evicted_count=count).SerializeToString()

    def pin(self, request: admin_pb2.AdminPinRequest, _: Context) -> bytes:
        """Pins, or undoes a pin."""
        query = GroupQuery(request.namespace_id, Keys(request.keys, request.key_bytes))
        verb = self._store.unpin if request.unpin else self._store.pin
        return admin_pb2.AdminPinResponse(block_count=verb(None, query)).SerializeToString()

    def check(self, _request: admin_pb2.CheckRequest, _: Context) -> bytes:
        """What the daemon says of its own books."""
        problems = self._store.check()
        return admin_pb2.CheckResponse(ok=not problems, problems=problems).SerializeToString()

    def _timeout_s(self, asked_s: float) -> float:
        if not (math.isfinite(asked_s) and 0 <= asked_s <= WAIT_S_MAX):
            raise InvalidRequest(f"timeout_s is {asked_s}; it must be 0 to {WAIT_S_MAX:.0f}")
        return asked_s or self.facts.grace_s


def encode_counts(counts: StoreCounts, facts: DaemonFacts) -> admin_pb2.StatResponse:
    """What Stat answers: fields of one name on both sides, and the few that differ."""
    answer = admin_pb2.StatResponse(
        version=kvtier.__version__,
        pid=facts.pid,
        trust=facts.trust,
        hit_ratio=counts.hit_ratio,
        **{name: getattr(counts, name) for name in _COUNTS},
    )
    for tier in counts.tiers:
        values = {name: getattr(tier, name) for name in _TIER_COUNTS}
        answer.tiers.add(tier=TIER_NUMBERS[tier.tier], **values)
    for reason, count in counts.reasons.items():
        answer.reasons.add(reason=REASON_NUMBERS[reason], count=count)
    for damage, count in counts.corrupt.items():
        answer.corrupt.add(damage=damage, count=count)
    for session in counts.sessions:
        answer.sessions.add(
            client_name=session.client_name,
            tenant=session.tenant,
            group=session.group,
            pid=session.pid,
            lease_count=session.lease_count,
            reservation_count=session.reservation_count,
            age_s=session.age_s,
        )
    for route in counts.routes:
        answer.routes.add(
            route=route.route,
            move_count=route.move_count,
            size_bytes=route.size_bytes,
            failed_count=route.failed_count,
            in_flight=route.in_flight,
            queued=route.queued,
        )
    answer.namespaces.extend(_namespace_stat(use) for use in counts.namespaces)
    return answer


def _namespace_stat(use: NamespaceUse) -> admin_pb2.NamespaceStat:
    return admin_pb2.NamespaceStat(
        namespace_id=use.namespace_id,
        tenant=use.spec.tenant,
        model=use.spec.model,
        group_name=use.spec.group_name,
        epoch=use.epoch,
        block_count=use.block_count,
        size_bytes=use.size_bytes,
        hit_blocks=use.hit_blocks,
        miss_blocks=use.miss_blocks,
        bypassed=use.bypassed,
        block_tokens=use.spec.format.block_tokens,
        encrypted=use.encrypted,
        locked=use.locked,
        max_age_s=use.max_age_s,
    )


_FILLED_APART = {"tiers", "reasons", "sessions", "routes", "namespaces", "corrupt", "scrub"}
_COUNTS = tuple(name for name in StoreCounts.__slots__ if name not in _FILLED_APART)
_TIER_COUNTS = tuple(name for name in TierUse.__slots__ if name != "tier")
_SCRUB_FIELDS = tuple(name for name in ScrubUse.__slots__ if name != "damaged")
