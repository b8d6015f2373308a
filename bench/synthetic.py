"""A state directory that says a million blocks lie on SSD: true catalogue and slab headers, sparse
slabs without payloads. What is asked of it (recovery, lookups) never reads a payload.

Does not: hold bytes that could be leased.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from bench.keys import CHAIN_BLOCKS, chain
from kvtier.block import SLOT_BITS, BlockFormat, NamespaceSpec, SlotLabel
from kvtier.tiers.catalogue import Catalogue
from kvtier.tiers.files import Files
from kvtier.tiers.identity import Identity
from kvtier.tiers.packing import pack_record
from kvtier.tiers.slab import SLAB_RESERVED_BYTES, Slab
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.tiers.state import Named, NamespaceBook, prepare_directory
from kvtier.units import GIB, KIB

BLOCK_BYTES: Final = 4 * KIB
SLOT_BYTES: Final = BLOCK_BYTES + SLOT_HEADER_BYTES
SEGMENT_BYTES: Final = GIB
# A slab file is as large as a segment: what its head takes is not there for slots.
_SLAB_BYTES: Final = SEGMENT_BYTES - SLAB_RESERVED_BYTES
SLOTS: Final = _SLAB_BYTES // SLOT_BYTES
_EPOCH: Final = 1
_RECORDS_PER_TRANSACTION: Final = 100 * CHAIN_BLOCKS


def spec() -> NamespaceSpec:
    """The namespace whose blocks they are; the one that `daemon.attached` opens."""
    shape = BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=BLOCK_BYTES)
    return NamespaceSpec("bench", shape)


def ssd_bytes(block_count: int) -> int:
    """What the SSD tier must have room for."""
    return -(-block_count // SLOTS) * SEGMENT_BYTES


def write_state(state: Path, block_count: int, *, tier_bytes: int) -> None:
    """Fills an empty state directory with `keys.chains(block_count)`, cleanly closed."""
    directory = state / "ssd"
    files = Files()
    prepare_directory(files, directory)
    space = spec()
    names = {space.digest: Named(_EPOCH, space.to_json())}
    NamespaceBook(files, directory / "namespaces").save(names)
    for index in range(ssd_bytes(block_count) // SEGMENT_BYTES):
        path = directory / "slabs" / f"{index:05}.slab"
        path.touch(mode=0o600)
        os.truncate(path, SEGMENT_BYTES)
        slab = Slab(files, path, index, _SLAB_BYTES, direct=False)
        slab.open_existing()
        slab.cut(SLOT_BYTES, 1)
        slab.list_names(names)
        slab.close()
    catalogue = Catalogue(files, directory, tier_bytes)
    catalogue.open()
    records: list[tuple[bytes, bytes]] = []
    for number in range(block_count // CHAIN_BLOCKS):
        parent = b""
        for position, key in enumerate(chain(number).split()):
            index = number * CHAIN_BLOCKS + position
            slot = index // SLOTS << SLOT_BITS | index % SLOTS
            label = SlotLabel(
                space.digest, _EPOCH, key, parent, position, 0, BLOCK_BYTES,
                checksum=index + 1, generation=index + 2,
            )  # fmt: skip
            records.append(pack_record(slot, SLOT_BYTES, label))
            parent = key
        if len(records) >= _RECORDS_PER_TRANSACTION:
            catalogue.put(records)
            records = []
    catalogue.put(records)
    catalogue.complete()
    catalogue.close()
    identity = Identity(files, directory / "identity")
    identity.choose([bytes(16)])
    identity.begin(block_count + 2)
