"""Bytes and time: constants, parsing, formatting, rounding, and the Clock that tests replace.

Does not: know about tokens, blocks or rates of a device.
"""

from __future__ import annotations

import re
import time
from typing import Protocol

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
PAGE_BYTES = 4 * KIB
HUGE_PAGE_BYTES = 2 * MIB

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """`"64MiB"`, `"1.5 GiB"`, `"2g"`, `"4096"` as bytes; `MB` means 10**6, `MiB` and `M` 2**20.

    Raises:
        ValueError: not a size; the message shows what is accepted.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 4096, 64MiB or 1.5GiB")
    number, prefix, binary = match.groups()
    decimal = bool(prefix) and not binary and text.strip().lower().endswith("b")
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int(float(number) * (1000 if decimal else 1024) ** power)


def format_bytes(size_bytes: float) -> str:
    """`format_bytes(3 * GIB) == "3.0 GiB"`: at most one decimal, binary prefixes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def div_ceil(value: int, divisor: int) -> int:
    """The smallest integer not below value / divisor."""
    return -(-value // divisor)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` not below `value`."""
    return div_ceil(value, alignment) * alignment


class Clock(Protocol):
    """Where time comes from. Monotonic decides; wall time is only for people to read."""

    def monotonic_s(self) -> float:
        """Seconds that only grow, from an arbitrary start."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, UTC."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
