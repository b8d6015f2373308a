"""Answers of the daemon as plain dictionaries: what `--json` prints and what tables are made of.

Does not: print, or know which answer it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import PurePath
from typing import Any


def plain(value: Any) -> Any:
    """Records and protobuf messages as dictionaries, enums by name in lower case, bytes as hex."""
    if isinstance(value, Enum):
        return value.name.lower() if isinstance(value, IntEnum) else value.value
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if hasattr(value, "DESCRIPTOR"):
        return {field.name: _field(field, value) for field in value.DESCRIPTOR.fields}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no plain form")


def plain_stat(answer: Any) -> dict[str, Any]:
    """A StatResponse; `reasons` becomes one object, and rates get their ratio."""
    stat: dict[str, Any] = plain(answer)
    if isinstance(stat["reasons"], list):
        stat["reasons"] = {entry["reason"]: entry["count"] for entry in stat["reasons"]}
    asked = stat["hit_blocks"] + stat["miss_blocks"]
    stat["hit_ratio"] = stat["hit_blocks"] / asked if asked else 0.0
    return stat


def _field(field: Any, message: Any) -> Any:
    value = getattr(message, field.name)
    if field.enum_type is None:
        return plain(value)
    names = field.enum_type.values_by_number
    if isinstance(value, int):
        return _short(names, value)
    return [_short(names, number) for number in value]


def _short(names: Mapping[int, Any], number: int) -> str:
    """`TIER_DRAM` as `dram`, `REASON_NEVER_STORED` as `never_stored`."""
    if number not in names:
        return str(number)
    return str(names[number].name).partition("_")[2].lower()
