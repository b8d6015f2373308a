"""Wear: how much was written to the SSD tier in the last 24 hours, kept over restarts.

Counted are slots, headers included; the catalogue adds some hundred bytes a block, wipes 4 KiB.

File `wear` of the state directory: JSON, bytes by hour since 1970. When it is lost or damaged,
counting begins anew; a kill loses what was counted since the last `save`.

Does not: limit anything (housekeeping.py), or know why something was written.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvtier.tiers.files import Files

_HOUR_S: Final = 3600
_HOURS: Final = 24

logger = logging.getLogger(__name__)


class Wear:
    """Any thread. `wall_s`: seconds since 1970."""

    def __init__(self, files: Files, path: Path, wall_s: Callable[[], float] = time.time) -> None:
        self._files = files
        self._path = path
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._hours: dict[int, int] = {}
        self._saved: dict[int, int] = {}

    def load(self) -> None:
        """Takes over what the file says. Never raises."""
        try:
            hours = {int(hour): int(count) for hour, count in json.loads(self._path.read_bytes())}
            if any(count < 0 for count in hours.values()):
                raise ValueError("negative")
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: %s; what was written today is counted anew", self._path, error)
            return
        with self._lock:
            for hour, count in hours.items():
                self._hours[hour] = self._hours.get(hour, 0) + count
            self._saved = dict(self._hours)

    def add(self, size_bytes: int) -> None:
        """So much was written just now."""
        hour = int(self._wall_s()) // _HOUR_S
        with self._lock:
            self._hours[hour] = self._hours.get(hour, 0) + size_bytes

    def day_bytes(self) -> int:
        """Of the current hour and the 24 before it. What a clock that was set back since dates
        into the future counts as written now: setting a clock gives nobody a new budget.
        """
        now = int(self._wall_s()) // _HOUR_S
        with self._lock:
            for hour in [hour for hour in self._hours if hour > now]:
                self._hours[now] = self._hours.get(now, 0) + self._hours.pop(hour)
            for hour in [hour for hour in self._hours if hour < now - _HOURS]:
                del self._hours[hour]
            return sum(self._hours.values())

    def save(self) -> None:
        """Keeps it, if there is something new. Worker thread. Never raises."""
        with self._lock:
            hours = dict(self._hours)
        if hours == self._saved:
            return
        try:
            self._files.replace(self._path, json.dumps(sorted(hours.items())).encode())
            self._saved = hours
        except OSError as error:
            logger.warning("%s: %s; a restart forgets what was written today", self._path, error)

    def __repr__(self) -> str:
        return f"<Wear {self._path} {self.day_bytes()} bytes today>"
