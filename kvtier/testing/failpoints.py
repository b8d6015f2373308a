"""Named places in which a test makes the process die, to see what a restart finds.

`KVTIER_FAILPOINT=name` (or `name:3` for the third time) in the environment at start: the process
is killed there as by `kill -9`. Unset, as always outside of tests, `reach` does nothing.

    move.begin      a batch of moves is about to be read or written
    move.written    it was, and the ledger does not know yet
    erase.begin     records are about to be wiped or deleted
    erase.done      they were, and the slots are not free yet
    epoch.begin     a namespace was cleared in the books, not yet on disk
    epoch.done      on disk too, and nobody was told yet

Does not: simulate power loss; what was written stays written.
"""

from __future__ import annotations

import os
import signal

_name, _, _nth = os.environ.get("KVTIER_FAILPOINT", "").partition(":")
_left = int(_nth or 1)


def reach(name: str) -> None:
    """Dies here if that is planned. Any thread."""
    if _name == name:
        _die()


def _die() -> None:
    global _left
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
