"""Named places in which a test makes the process die, to see what a restart finds.

`KVTIER_FAILPOINT=name` (or `name:3` for the third time) in the environment at start: the process
is killed there as by `kill -9`. Unset, as always outside of tests, `reach` does nothing.
`POINTS` says what has and what has not happened at each; no other name may be reached.

Does not: simulate power loss; what was written stays written.
"""

from __future__ import annotations

import os
import signal
from typing import Final

POINTS: Final = {
    # A batch of blocks to or from the SSD tier.
    "move.begin": "a batch of moves is about to be read or written",
    "move.written": "it was, and the ledger does not know yet",
    "write.begin": "slabs are ready, no byte of the batch is written",
    "write.written": "headers and payloads are written, not synced",
    "write.synced": "they are synced, and no record lists them",
    "write.listed": "records list them, and nobody was told yet",
    # A slab is made ready.
    "slab.create": "a slab file is about to be made",
    "slab.open": "it exists and has no room yet",
    "slab.allocated": "it has room, and its name may not be durable",
    "slab.created": "it is there for good, and not cut yet",
    "slab.emptied": "a slab is to be cut for another size: its records are gone",
    "slab.unnamed": "and it lists no namespace",
    "slab.cut": "and its header has the new size",
    "slab.named": "it lists other namespaces, not synced",
    "slab.shrink": "a slab is longer than planned and about to be cut off",
    # Forgetting.
    "erase.begin": "records are about to be wiped or deleted",
    "erase.matched": "it is known which slots still hold what is to go",
    "erase.wiped": "their headers are zeros, not synced",
    "erase.synced": "synced, and the records are there still",
    "erase.deleted": "the records are gone, not yet for good",
    "erase.done": "for good, and the slots are not free yet",
    "epoch.begin": "a namespace was cleared in the books, not yet on disk",
    "epoch.done": "on disk too, and nobody was told yet",
    "purge.begin": "a namespace to be purged was cleared in the books, not yet on disk",
    "purge.keyless": "it has no key and a new epoch on disk, its old bytes are there",
    "purge.wiped": "they are not, and nobody was told yet",
    # Small files.
    "file.written": "a small file's next content is written beside it, not synced",
    "file.synced": "synced",
    "file.renamed": "it has the name, not yet durably",
    "file.done": "durably",
    # The catalogue.
    "catalogue.begin": "a transaction is about to be written",
    "catalogue.committed": "it was",
    "catalogue.sync": "the catalogue is about to be synced",
    "catalogue.synced": "it was, and nobody was told yet",
    "catalogue.closed": "it is closed in order, without the clean marker",
    # A block in memory.
    "commit.begin": "a client's blocks are about to be copied",
    "commit.copied": "they were, and nobody can read them yet",
    "commit.ready": "they can be read, and nobody was told yet",
    "durable.begin": "a durable commit is about to wait for its moves",
    "durable.written": "its blocks are on the SSD tier, not synced",
    "durable.synced": "synced, and nobody was told yet",
    "flush.written": "what was only in memory is on the SSD tier, not synced",
    "flush.synced": "synced, and nobody was told yet",
    # Coming back.
    "recover.begin": "the directory is prepared, nothing was read",
    "recover.opened": "slabs are open and their namespaces are known",
    "recover.unclean": "the clean marker is gone",
    "recover.catalogue": "the catalogue is open and believed",
    "recover.records": "its records were read",
    "recover.cleaned": "those that do not count are gone",
    "recover.swept": "headers that no record names are gone, durably",
    "recover.restored": "the books have them",
    "aside.begin": "the catalogue is damaged and about to be set aside",
    "aside.done": "it has its dated name",
    "rebuild.scanned": "all slot headers were read",
    "rebuild.listed": "records list them",
    "rebuild.done": "the catalogue alone is believed from now on",
    # What an operator asks for.
    "scrub.pinned": "slots are pinned and about to be read",
    "resize.begin": "the SSD tier is about to get another size",
    "resize.copied": "blocks of segments that go are copied to others, the books have the former",
    "resize.emptied": "nothing lies any longer in segments that go",
    "resize.wiped": "nor can it come back, and their files are there still",
    "slab.remove": "a slab's file is about to be deleted",
    "resize.deleted": "it is, not yet durably",
    "resize.done": "durably, the books have the new size, and nobody was told yet",
    # Ending.
    "close.begin": "the last flush is over, moves end",
    "close.erased": "nothing is to be erased any more, tiers are open",
    "close.done": "all is closed, the clean marker is there",
}

_name, _nth = "", 0


def arm(plan: str) -> None:
    """Dies at `name`, or `name:3` at its third time, from now on; with "" nowhere.

    Raises:
        ValueError: no failpoint has this name.
    """
    global _name, _nth
    name, _, nth = plan.partition(":")
    if name and name not in POINTS:
        raise ValueError(f"no failpoint {name!r}: {', '.join(POINTS)}")
    _name, _nth = name, int(nth or 1)


def reach(name: str) -> None:
    """Dies here if that is planned. Any thread."""
    if _name == name:
        _die()


def _die() -> None:
    global _nth
    _nth -= 1
    if _nth <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("KVTIER_FAILPOINT", ""))
