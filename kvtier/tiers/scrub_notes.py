"""ScrubNotes: how far a scrub came and when one last ended, kept over restarts in a small file.

File `scrub` of the state directory: JSON. Of no consequence when it is lost: the scrub begins anew.

Does not: scrub.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvtier.tiers.files import Files

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ScrubNotes:
    """Times are seconds since 1970; 0 = never. A scrub is under way when `started_s` is not 0:
    then it goes on at slot `slot` of `segment`, and the counts are its; else the last one's.
    """

    since_s: float = 0.0  # from when the interval to the next one counts
    started_s: float = 0.0
    ended_s: float = 0.0
    segment: int = 0
    slot: int = 0
    elapsed_s: float = 0.0
    block_count: int = 0
    read_bytes: int = 0
    stray_count: int = 0
    damaged: dict[str, int] = field(default_factory=dict)  # copies dropped, by what was wrong


def read_notes(path: Path) -> ScrubNotes | None:
    """What the file says; None when there is none, or none that can be read."""
    try:
        values = json.loads(path.read_bytes())
        notes = ScrubNotes()
        for each in fields(ScrubNotes):
            value = values[each.name]
            if each.name == "damaged":
                notes.damaged = {str(kind): int(_number(count)) for kind, count in value.items()}
            else:
                setattr(notes, each.name, type(getattr(notes, each.name))(_number(value)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return notes


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise ValueError(value)
    return value


def write_notes(files: Files, path: Path, notes: ScrubNotes) -> None:
    """Keeps them. Never raises: a disk that cannot take them has other troubles."""
    try:
        files.replace(path, json.dumps(asdict(notes)).encode())
    except OSError as error:
        logger.warning("%s: %s; after a restart the scrub begins anew", path, error)


def begun_s(directory: Path) -> float:
    """Since when there is state there (seconds since 1970); 0: nobody knows."""
    try:
        return (directory / "VERSION").stat().st_mtime
    except OSError:
        return 0.0
