"""Policy: in which order runs of a tier are asked to give room.

A policy orders runs, the ledger takes blocks from a run's end (leaves first): so a block's copy
stays while a descendant's copy in the tier does, whatever the policy says.

Does not: know slots, leases or pins. The ledger skips what it may not take.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from kvtier.errors import ConfigError


class Policy(Protocol):
    """Order of one tier's runs. All calls O(1) amortised; event loop only."""

    def add(self, run_id: int) -> None:
        """The run holds its first copy in the tier; it counts as used now."""
        ...

    def touch(self, run_id: int) -> None:
        """The run was used. Descendants are touched before their ancestors."""
        ...

    def remove(self, run_id: int) -> None:
        """The run holds nothing in the tier any longer."""
        ...

    def split(self, run_id: int, tail_id: int) -> None:
        """`tail_id` is the cut-off end of `run_id`: as old as it, and to go before it."""
        ...

    def order(self) -> Iterator[int]:
        """Runs, the first to go first. The caller may change the policy only after it stopped."""
        ...

    def __len__(self) -> int: ...


class Lru:
    """Least recently used first; ties (one use touches a chain from its end) leave leaves first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, run_id: int) -> None:
        self._order[run_id] = None

    def touch(self, run_id: int) -> None:
        self._order.move_to_end(run_id)

    def remove(self, run_id: int) -> None:
        del self._order[run_id]

    def split(self, run_id: int, tail_id: int) -> None:
        # An OrderedDict cannot insert beside an entry: the tail counts as used now, its head after
        # it. One use too many for a stretch that was just branched from, which is a use of it.
        self._order[tail_id] = None
        self._order.move_to_end(run_id)

    def order(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru}


def make_policy(name: str) -> Policy:
    """A new policy by its configured name. Raises ConfigError naming what exists."""
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[name]()
