"""A real daemon with a bug that clients' deaths bring to light: `planted_daemon.py BUG CONFIG`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvtier import config
from kvtier.server import daemon
from kvtier.session import Session
from kvtier.store import Store


class LeaseNotReturned(Store):
    """The end of a session forgets its leases."""

    def end_session(self, session: Session) -> None:
        session.leases.clear()
        super().end_session(session)


class ReservationNotReturned(Store):
    """The end of a session forgets its reservations."""

    def end_session(self, session: Session) -> None:
        session.reservations.clear()
        super().end_session(session)


BUGS: dict[str, Any] = {
    "lease-not-returned": LeaseNotReturned,
    "reservation-not-returned": ReservationNotReturned,
}

if __name__ == "__main__":
    daemon.Store = BUGS[sys.argv[1]]  # type: ignore[misc]
    path = Path(sys.argv[2])
    sys.exit(daemon.run(config.load(path, {}), path))
