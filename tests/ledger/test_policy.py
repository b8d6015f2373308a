"""Every policy passes the conformance suite, and the suite catches one that does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvtier.errors import ConfigError
from kvtier.ledger.policy import POLICIES, Lru, make_policy
from kvtier.testing.policies import check_policy


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_conforms(name: str) -> None:
    check_policy(lambda: make_policy(name))


def test_an_unknown_policy_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="'best' is not one of lru"):
        make_policy("best")


class ForgetsSplit(Lru):
    """The tail of a cut run is not known to it."""

    def split(self, run_id: int, tail_id: int) -> None:
        pass


class HeadFirst(Lru):
    """A head goes before its tail."""

    def split(self, run_id: int, tail_id: int) -> None:
        self.add(tail_id)


class NeverTouches(Lru):
    """First in, first out."""

    def touch(self, run_id: int) -> None:
        pass


class EatsItself(Lru):
    """Asking for the order empties it."""

    def order(self) -> Iterator[int]:
        while self._order:
            yield self._order.popitem(last=False)[0]


class NewestFirst(Lru):
    """The last used goes first."""

    def order(self) -> Iterator[int]:
        return reversed(self._order)


@pytest.mark.parametrize("broken", [ForgetsSplit, HeadFirst, NeverTouches, EatsItself, NewestFirst])
def test_a_planted_bug_is_caught(broken: type[Lru]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check_policy(broken)
