"""A whole store in this process: real tiers (small), faults on demand, a client that checks bytes.

Shared by tests/store and tests/chaos.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.block import (
    SLOT_BITS,
    BlockFormat,
    GroupQuery,
    Keys,
    LeaseGrant,
    NamespaceSpec,
    Reason,
    ReserveGrant,
    SlotTable,
)
from kvtier.config import Config
from kvtier.errors import TierFailed
from kvtier.rules import encrypted_by
from kvtier.sections import (
    DramConfig,
    EncryptionConfig,
    LimitsConfig,
    NamespaceConfig,
    ServerConfig,
    SsdConfig,
    StateConfig,
    TenantConfig,
    TiersConfig,
)
from kvtier.session import Session
from kvtier.store import Store
from kvtier.testing.faults import FaultyTier, Gate
from kvtier.tiers.arena import Arena, MappedArena
from kvtier.tiers.cipher import Keyring
from kvtier.tiers.dram import DramTier
from kvtier.tiers.files import Files
from kvtier.tiers.ssd import SsdTier
from kvtier.units import KIB, MIB, SystemClock

FORMAT = BlockFormat(1, 1, 64, "bfloat16", 16)  # 4 KiB a block
BLOCK_BYTES = FORMAT.size_bytes
WAIT_S = 20.0


def chain(seed: object, count: int) -> list[bytes]:
    keys, parent = [], b""
    for index in range(count):
        parent = hashlib.sha256(parent + f"{seed}/{index}".encode()).digest()
        keys.append(parent)
    return keys


def payload(key: bytes, size_bytes: int = BLOCK_BYTES, shard: int = 0) -> bytes:
    unit = hashlib.sha256(key + bytes((shard,))).digest()
    return (unit * (size_bytes // len(unit) + 1))[:size_bytes]


@dataclass
class Clock:
    """The machine's clock, moved forward at will; `wall_ahead_s` as somebody sets the time."""

    ahead_s: float = 0.0
    wall_ahead_s: float = 0.0

    def monotonic_s(self) -> float:
        return SystemClock().monotonic_s() + self.ahead_s

    def wall_s(self) -> float:
        return SystemClock().wall_s() + self.wall_ahead_s


@dataclass
class Attached:
    """A session and what its process would have mapped."""

    session: Session
    arenas: dict[int, MappedArena]
    withdrawn: list[int] = field(default_factory=list)

    def write(self, table: SlotTable, at: int, content: bytes) -> None:
        numbers = array("I", table.slots)
        view = {v.segment: v for v in table.views}[numbers[at] >> SLOT_BITS]
        offset = view.base_offset + (numbers[at] & ((1 << SLOT_BITS) - 1)) * table.slot_bytes
        assert len(content) == table.size_bytes
        room = self.session.room
        if room is not None and view.arena_id == room.arena.id:
            ctypes.memmove(room.arena.address + offset, content, len(content))
        else:  # single-tenant trust: the read arena itself
            self.arenas[view.arena_id].view(offset, len(content))[:] = content

    def contents(self, table: SlotTable) -> list[bytes]:
        views = {view.segment: view for view in table.views}
        found = []
        for slot in array("I", table.slots):
            view = views[slot >> SLOT_BITS]
            offset = view.base_offset + (slot & ((1 << SLOT_BITS) - 1)) * table.slot_bytes
            found.append(bytes(self.arenas[view.arena_id].view(offset, table.size_bytes)))
        return found


class Node:
    """A store on `directory`. `dram_blocks` and `ssd_blocks` are of `FORMAT`, in segments of 16."""

    def __init__(
        self,
        directory: Path,
        *,
        dram_blocks: int = 64,
        ssd_blocks: int = 1024,
        ssd_enabled: bool = True,
        trust: str = "isolated",
        tenants: tuple[TenantConfig, ...] = (),
        dram_high_water: float = 0.9,
        write_arena_bytes: int = MIB,
        watch_events_max: int = 4096,
        files: Files | None = None,
        namespaces: tuple[NamespaceConfig, ...] = (),
        master: bytes | None = None,
        clock: Clock | None = None,
        **limits: Any,
    ) -> None:
        self.files, self.master = files, master
        limits.setdefault("block_bytes_max", min(write_arena_bytes, MIB))
        self.config = Config(
            server=ServerConfig(
                runtime_dir=directory / "run",
                trust=trust,
                io_threads=8,
                copy_threads=4,
                watch_events_max=watch_events_max,
            ),
            state=StateConfig(dir=directory / "state"),
            tiers=TiersConfig(
                dram=DramConfig(
                    size_bytes=dram_blocks * BLOCK_BYTES,
                    segment_bytes=16 * BLOCK_BYTES,
                    high_water=dram_high_water,
                    low_water=dram_high_water - 0.1,
                    huge_pages="off",
                ),
                ssd=SsdConfig(
                    size_bytes=ssd_blocks * 2 * BLOCK_BYTES,
                    segment_bytes=32 * BLOCK_BYTES,
                    min_free_bytes=0,
                    enabled=ssd_enabled,
                ),
            ),
            limits=LimitsConfig(write_arena_bytes=write_arena_bytes, **limits),
            tenants=tenants,
            namespaces=namespaces,
            encryption=EncryptionConfig(key_file=Path("/not/read") if master else None),
        )
        self.clock = clock or Clock()
        self.ssd: Any = None
        self.closed = False

    async def open(self, *, recovered: bool = True) -> Node:
        """With `recovered` it waits until the SSD tier is back. Raises TierFailed when it is not;
        then nothing is open.
        """
        await self.start()
        if recovered:
            try:
                await self.recovered()
            except TierFailed:
                await self.close()
                raise
        return self

    async def recovered(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.store.keeper.recovering.wait()

    def prepare(self) -> None:
        """Makes the tiers, on which faults can be planned before `start`."""
        tiers = self.config.tiers
        self.dram: Any = FaultyTier(
            DramTier(
                tiers.dram.size_bytes // tiers.dram.segment_bytes,
                tiers.dram.segment_bytes,
                trust=self.config.server.trust,  # type: ignore[arg-type]
                huge_pages="off",
            )
        )
        if tiers.ssd.enabled:
            self.ssd = FaultyTier(
                SsdTier(
                    self.config.state.dir,
                    tiers.ssd.size_bytes // tiers.ssd.segment_bytes,
                    tiers.ssd.segment_bytes,
                    min_free_bytes=0,
                    files=self.files,
                    keyring=Keyring(self.master, wanted=encrypted_by(self.config)),
                )
            )

    async def start(self) -> None:
        if not hasattr(self, "dram"):
            self.prepare()
        self.store = await Store.open(self.config, dram=self.dram, ssd=self.ssd, clock=self.clock)
        self.ledger = self.store.keeper.ledger
        self.filling = self.store.keeper.filling
        self.moves = self.store.keeper.moves

    async def close(self, grace_s: float = 10.0) -> None:
        if not self.closed:
            self.closed = True
            self.dram.heal()
            if self.ssd is not None:
                self.ssd.heal()
            async with asyncio.timeout(WAIT_S):
                await self.store.close(grace_s=grace_s)

    def attach(self, tenant: str = "default", group: str = "", *, writes: bool = True) -> Attached:
        arenas: dict[int, MappedArena] = {}
        withdrawn: list[int] = []

        def announce(arena: Arena) -> None:
            fd = os.dup(arena.fd)
            arenas[arena.id] = MappedArena(fd, arena.layout.size, writable=arena.writable)
            os.close(fd)

        session = self.store.open_session(
            tenant=tenant,
            group=group,
            client_name="test",
            pid=os.getpid(),
            writes=writes,
            announce=announce,
            withdraw=withdrawn.append,
        )
        return Attached(session, arenas, withdrawn)

    def space(self, who: Attached, model: str = "m", form: BlockFormat = FORMAT) -> int:
        return self.store.open_namespace(who.session, NamespaceSpec(model, form), 0)[0]

    # --- verbs, as a client library would use them

    async def reserve(
        self,
        who: Attached,
        space: int,
        keys: Sequence[bytes],
        *,
        parent: bytes = b"",
        position: int = 0,
        shard: int = 0,
        deadline_s: float = WAIT_S,
    ) -> ReserveGrant:
        return await self.store.reserve(
            who.session, space, Keys.of(keys),
            parent=parent, position=position, shard=shard, deadline_s=deadline_s,
        )  # fmt: skip

    def fill(
        self, who: Attached, grant: ReserveGrant, keys: Sequence[bytes], shard: int = 0
    ) -> None:
        if grant.table is not None:
            for at, index in enumerate(grant.granted):
                who.write(grant.table, at, payload(keys[index], grant.table.size_bytes, shard))

    async def put(
        self,
        who: Attached,
        space: int,
        keys: Sequence[bytes],
        *,
        parent: bytes = b"",
        shard: int = 0,
        durable: bool = False,
        deadline_s: float = WAIT_S,
    ) -> None:
        done = 0
        while done < len(keys):
            rest = keys[done:]
            above = keys[done - 1] if done else parent
            grant = await self.reserve(
                who, space, rest, parent=above, position=done, shard=shard, deadline_s=deadline_s
            )
            if grant.table is not None:
                self.fill(who, grant, rest, shard)
                await self.store.commit(who.session, grant.reservation_id, None, durable=durable)
            done += grant.covered_count

    def found(self, who: Attached, space: int, keys: Sequence[bytes]) -> int:
        return self.why(who, space, keys)[0]

    def why(self, who: Attached, space: int, keys: Sequence[bytes]) -> tuple[int, Reason]:
        [one] = self.store.lookup(
            who.session, [GroupQuery(space, Keys.of(keys))],
            lease=False, prefetch=False, touch=False, shard=0,
        ).groups  # fmt: skip
        return one.block_count, one.reason

    async def lease(
        self, who: Attached, space: int, keys: Sequence[bytes], *, shard: int = 0,
        deadline_s: float = WAIT_S,
    ) -> LeaseGrant:  # fmt: skip
        query = GroupQuery(space, Keys.of(keys))
        return (await self.store.lease(who.session, query, 0, shard=shard, deadline_s=deadline_s))[
            0
        ]

    async def read(
        self, who: Attached, space: int, keys: Sequence[bytes], *, shard: int = 0,
        deadline_s: float = WAIT_S,
    ) -> int:  # fmt: skip
        """Leases, compares every byte, releases; how many blocks there were."""
        grant = await self.lease(who, space, keys, shard=shard, deadline_s=deadline_s)
        if grant.table is None:
            return 0
        needed = keys[grant.first_needed : grant.block_count]
        contents = who.contents(grant.table)
        self.store.release(who.session, [grant.lease_id])
        assert len(contents) == len(needed)
        for key, content in zip(needed, contents, strict=True):
            assert content == payload(key, grant.table.size_bytes, shard), "wrong bytes"
        return grant.block_count

    async def read_pieces(self, who: Attached, space: int, keys: Sequence[bytes]) -> int:
        """`read` in pieces that fit a small DRAM tier: how far the prefix goes."""
        total = 0
        for end in range(16, len(keys) + 16, 16):
            # Only the last 16 are pinned for long: the prefix of a chain pins all of its runs.
            total = await self.read(who, space, keys[:end])
            if total < min(end, len(keys)):
                break
        return total

    def query(self, space: int, keys: Sequence[bytes]) -> GroupQuery:
        return GroupQuery(space, Keys.of(keys))

    async def evict(self, who: Attached, space: int, keys: Sequence[bytes]) -> int:
        return await self.store.evict(who.session, self.query(space, keys))

    async def until(self, condition: Any) -> None:
        """Waits for a condition on the store's own progress."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                with suppress(TimeoutError):
                    await self.store.keeper.progress.wait(0.05)

    async def quiet(self) -> None:
        """Nothing moves, nothing is to be erased, nothing to be reaped."""
        await self.until(
            lambda: (
                self.store.keeper.mover.is_idle
                and not self.moves.moves
                and not self.ledger.is_erasing
                and not self.ledger._condemned
            )
        )

    def plaintext_of(self, keys: Sequence[bytes]) -> int:
        """Of how many blocks some bytes lie in the state directory as they were stored."""
        files = (path for path in self.config.state.dir.rglob("*") if path.is_file())
        on_disk = b"".join(path.read_bytes() for path in files)
        return sum(payload(key)[:32] in on_disk for key in keys)

    def tier_state(self, name: str) -> str:
        uses = {use.tier.label: use for use in self.store.counts(1).tiers}
        return uses[name].state

    def blocks_in(self, name: str) -> int:
        uses = {use.tier.label: use for use in self.store.counts(1).tiers}
        return uses[name].block_count

    def assert_sound(self) -> None:
        assert self.store.check() == []
        for session in self.store._sessions.values():
            if session.room is not None:
                held = {
                    r.extent
                    for r in self.filling.reservations.values()
                    if r.session_id == session.id and r.extent is not None
                }
                assert set(session.room._taken) == held, "an extent of nobody"
            assert session.leases <= self.ledger.leases.keys()
        for lease in self.ledger.leases.values():
            assert lease.session_id in self.store._sessions, "a lease of nobody"
        for reservation in self.filling.reservations.values():
            assert reservation.session_id in self.store._sessions or reservation.busy

    async def assert_nothing_held(self) -> None:
        """No lease, reservation, extent or move; every slot belongs to a copy."""
        await self.quiet()
        self.assert_sound()
        assert not self.ledger.leases
        assert not self.filling.reservations
        assert not self.filling.partials
        assert not self.ledger._doomed
        assert not self.ledger.readers
        for session in self.store._sessions.values():
            assert not session.leases
            assert not session.reservations
        for tier in self.ledger.tiers:
            copies = sum(r.held[tier] * r.space.shards for r in self.ledger.chains.runs.values())
            assert self.ledger.slots[tier].counts().used_slots == copies, f"slots of {tier.label}"


async def reached(gate: Gate) -> None:
    """A batch waits at the gate."""
    assert await asyncio.to_thread(gate.reached.wait, WAIT_S)


__all__ = ["BLOCK_BYTES", "FORMAT", "KIB", "Attached", "Node", "chain", "payload", "reached"]
