"""Run and Namespace: how the ledger keeps blocks.

An unbranched stretch of a chain is one `Run`: its keys packed one after another, one state byte
a block, slot numbers in arrays. 512 blocks are one Python object and a handful of arrays; the
index maps a key to `run id * RUN_BLOCKS_MAX + place`, a plain int, so that neither the index nor
the blocks are seen by the garbage collector. That is what makes a million blocks cheap to hold
(DESIGN section 9) and a lookup a few comparisons of memory.

    keys       |k0|k1|k2|...      key_size bytes each
    state      |s0|s1|s2|...      one byte: bit `1 << tier` = a readable copy there; 0 = lost
    slots[t]   |..|..|..|         shards u32 a block (meaningless where the state bit is not set)
    checksums  |..|..|..|         shards u64 a block
    written    |w0|w1|w2|...      u32 a block: when it was stored (seconds; 0 = not known)

Children hang on the END of a run only: a branch inside splits it.

Does not: keep its own books in order; `chains.py` does, and is the only writer.
"""

from __future__ import annotations

from array import array

from kvtier.block import NamespaceSpec, TierId
from kvtier.errors import InvalidRequest
from kvtier.ledger.index import Index

RUN_BLOCKS_MAX = 512
TIER_COUNT = len(TierId)


class Run:
    """Consecutive blocks of one chain. Fields as in the module's picture.

    `held[t]`: blocks with a copy in tier t. `below[t]`: children whose subtree has one. No block
    was stored before `oldest_s`.
    """

    __slots__ = (
        "below",
        "checksums",
        "children",
        "condemned",
        "held",
        "id",
        "keys",
        "leases",
        "oldest_s",
        "parent",
        "parent_key",
        "pins",
        "position",
        "slots",
        "space",
        "state",
        "written",
    )

    def __init__(self, run_id: int, space: Namespace, parent_key: bytes, position: int) -> None:
        self.id = run_id
        self.space = space
        self.parent = 0
        self.parent_key = parent_key
        self.position = position
        self.keys = bytearray()
        self.state = bytearray()
        self.slots: list[array[int] | None] = [None] * TIER_COUNT
        self.checksums = array("Q")
        self.written = array("I")
        self.oldest_s = 2**32 - 1
        self.held = [0] * TIER_COUNT
        self.below = [0] * TIER_COUNT
        self.children: set[int] | None = None
        self.leases: set[int] | None = None
        self.pins = 0
        self.condemned = False

    def __len__(self) -> int:
        return len(self.state)

    def key(self, place: int) -> bytes:
        size = self.space.key_size
        return bytes(self.keys[place * size : (place + 1) * size])

    def parent_of(self, place: int) -> bytes:
        return self.key(place - 1) if place else self.parent_key

    def slots_of(self, place: int, tier: TierId) -> array[int]:
        """The block's slots in a tier where it has a copy: one a shard."""
        slots = self.slots[tier]
        assert slots is not None
        shards = self.space.shards
        return slots[place * shards : (place + 1) * shards]

    def last_in(self, tier: TierId) -> int:
        """Place of the last block with a copy in the tier; -1 = none."""
        bit = 1 << tier
        for place in range(len(self.state) - 1, -1, -1):
            if self.state[place] & bit:
                return place
        return -1

    def __repr__(self) -> str:
        held = ", ".join(f"{t.label} {self.held[t]}" for t in TierId if self.held[t])
        return f"<Run {self.id}: {len(self)} blocks from {self.position}, {held or 'nothing held'}>"


class Namespace:
    """All blocks whose bytes are interchangeable; `epoch` grows when all of them die at once.

    `remember` notes keys that were forgotten lately (by hash, bounded), so that a miss can say
    `evicted` rather than `never_stored`; a wrong answer there harms nobody.
    """

    RECENT_MAX = 65_536

    def __init__(self, namespace_id: int, spec: NamespaceSpec, slot_bytes: list[int]) -> None:
        self.id = namespace_id
        self.spec = spec
        self.digest = spec.digest
        self.epoch = 1
        self.key_size = 0
        self.shards = spec.format.shards
        self.shard_bytes = spec.format.shard_bytes
        self.size_bytes = spec.format.size_bytes
        self.slot_bytes = slot_bytes
        self.needed_blocks = spec.format.needed_blocks
        self.block_tokens = spec.format.block_tokens
        self.index = Index()
        self.orphans: dict[bytes, list[int]] = {}
        self.block_count = 0
        self.placeholder_count = 0
        self.hit_blocks = 0
        self.miss_blocks = 0
        self.bypassed = False
        self.locked = ""  # why its blocks cannot be read: every lookup misses, nothing is lost
        self.purging = False
        self.max_age_s = 0.0  # 0: they grow as old as they may; else slots are wiped when freed
        self.prefill_tokens_per_s = 0.0
        # Two halves: the older is dropped whole. Deleting the first key of a dict again and again
        # costs a walk over all that were deleted before it (measured: 100 us a block).
        self._recent: dict[int, str] = {}
        self._less_recent: dict[int, str] = {}

    @property
    def tenant(self) -> str:
        return self.spec.tenant

    def accept_key_size(self, size: int) -> None:
        """Raises InvalidRequest when keys of this namespace have another length."""
        if self.key_size and size != self.key_size:
            raise InvalidRequest(
                f"keys of {size} bytes in a namespace whose keys have {self.key_size}"
            )

    def remember(self, key: bytes, why: str) -> None:
        """Notes why a key is gone; forgets the oldest notes beyond RECENT_MAX."""
        if len(self._recent) >= self.RECENT_MAX // 2:
            self._recent, self._less_recent = {}, self._recent
        self._recent[hash(key)] = why

    def note_of(self, key: bytes, otherwise: str) -> str:
        """Why the key is gone, if that is remembered."""
        noted = hash(key)
        return self._recent.get(noted) or self._less_recent.get(noted, otherwise)

    def forget_note(self, key: bytes) -> None:
        """The key is back."""
        self._recent.pop(hash(key), None)
        self._less_recent.pop(hash(key), None)

    def forget_notes(self) -> None:
        """A new epoch: nobody asks for what was before."""
        self._recent, self._less_recent = {}, {}

    def __repr__(self) -> str:
        name, count = self.spec.model, self.block_count
        return f"<Namespace {self.id} {name!r} epoch {self.epoch}: {count} blocks>"
