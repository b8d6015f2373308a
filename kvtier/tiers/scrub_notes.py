"""ScrubNotes: how far a scrub came and when one last ended, kept over restarts in a small file.

File `scrub` of the state directory: JSON. Of no consequence when it is lost: the scrub begins anew.

Does not: scrub.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
    damaged_count: int = 0
    stray_count: int = 0


def read_notes(path: Path) -> ScrubNotes | None:
    """What the file says; None when there is none, or none that can be read."""
    try:
        values = json.loads(path.read_bytes())
        notes = ScrubNotes(**{field.name: values[field.name] for field in fields(ScrubNotes)})
        numbers = asdict(notes).values()
        if all(isinstance(number, int | float) and 0 <= number < 2**63 for number in numbers):
            notes.segment, notes.slot = int(notes.segment), int(notes.slot)
            return notes
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_notes(files: Files, path: Path, notes: ScrubNotes) -> None:
    """Keeps them. Never raises: a disk that cannot take them has other troubles."""
    try:
        files.replace(path, json.dumps(asdict(notes)).encode())
    except OSError as error:
        logger.warning("%s: %s; after a restart the scrub begins anew", path, error)
