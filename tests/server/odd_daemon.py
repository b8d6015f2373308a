"""A real daemon with bugs that the real one does not have: `python odd_daemon.py CONFIG`.

Opening a namespace of the model "bug", "invariant", "die" or "stray" meets one. It is the only way
to see what the server does about an exception that no request can cause.
"""

import asyncio
import sys
from pathlib import Path
from typing import NoReturn

from kvtier import config
from kvtier.block import NamespaceSpec
from kvtier.errors import InvariantViolated
from kvtier.server import daemon
from kvtier.session import Session
from kvtier.store import Store


class OddStore(Store):
    """The store, and what a bug in it would look like from outside."""

    def open_namespace(
        self, session: Session, spec: NamespaceSpec, prefill_tokens_per_s: float
    ) -> tuple[int, int, int]:
        if spec.model == "bug":
            raise RuntimeError("a bug")
        if spec.model == "invariant":
            raise InvariantViolated("the books disagree")
        if spec.model == "die":
            self.keeper._hold_water_marks = _task_died
            self.keeper.wake()
        if spec.model == "stray":
            asyncio.get_running_loop().call_soon(_books_disagree)
        return super().open_namespace(session, spec, prefill_tokens_per_s)


def _task_died() -> NoReturn:
    raise RuntimeError("a background task died")


def _books_disagree() -> NoReturn:
    raise InvariantViolated("the books disagree")


if __name__ == "__main__":
    daemon.Store = OddStore
    path = Path(sys.argv[1])
    sys.exit(daemon.run(config.load(path, {}), path))
