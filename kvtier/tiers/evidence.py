"""Evidence: what was damaged, kept under a dated name for whoever wants to know why.

Does not: decide what is damaged.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Final

from kvtier.testing.failpoints import reach
from kvtier.tiers.files import Files

logger = logging.getLogger(__name__)
KEPT_MAX: Final = 3  # of one name; the oldest goes first


def set_aside(files: Files, path: Path, *, kept_max: int = KEPT_MAX) -> Path:
    """Renames a directory, durably, to `NAME.damaged-DATE`; `kept_max` of those stay.

    Raises OSError.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{path.name}.damaged-"
    names = (f"{name}{stamp}", *(f"{name}{stamp}-{number:03}" for number in range(1, 1000)))
    target = next(place for place in map(path.with_name, names) if not place.exists())
    reach("aside.begin")
    files.rename(path, target)
    files.sync_directory(target.parent)
    reach("aside.done")
    for old in sorted(target.parent.glob(f"{name}*"))[:-kept_max]:
        shutil.rmtree(old)
    return target


def give_way(files: Files, directory: Path, name: str, wanted_bytes: int) -> None:
    """Removes evidence of that name, the oldest first, until so much of the file system is free:
    what is served goes before what was damaged. Raises OSError.
    """
    for old in sorted(directory.glob(f"{name}.damaged-*")):
        if files.free_bytes(directory) >= wanted_bytes:
            return
        logger.warning("%s is removed: its space is needed", old)
        shutil.rmtree(old)
