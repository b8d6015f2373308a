r"""Versions: state of another major version, set aside as it is and taken back when it is ours.

    ssd/VERSION, slabs/, ...              of one major version
    ssd/set-aside/v2/VERSION, slabs/, ... of another one

Nothing in there is read or written. VERSION goes last when state is set aside and first when it is
taken back: at any moment the VERSION at the top is of what lies there, and what lies in `set-aside`
without a VERSION belongs to it, so that a crash in the middle is continued either way.

Does not: know what the files of any version mean.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from kvtier.machine import directory_bytes
from kvtier.tiers.files import Files
from kvtier.units import format_bytes

SET_ASIDE: Final = "set-aside"
_VERSION: Final = "VERSION"

logger = logging.getLogger(__name__)


def settle(files: Files, directory: Path, found: int | None, ours: int) -> bool:
    """Makes `directory` hold state of the major version `ours`, or none. `found` is what lies there
    now (None: nothing). True: it holds some. Raises OSError; then or after a crash, call it again.
    """
    if found is not None and found != ours:
        _set_aside(files, directory, found)
        found = None
    kept = directory / SET_ASIDE / f"v{ours}"
    if not kept.exists():
        return found is not None
    if found is not None and (kept / _VERSION).exists():
        logger.warning("%s is let be: %s has state of its own", kept, directory)
        return True
    if found is None and not (kept / _VERSION).exists():
        return False
    _take_back(files, directory, kept)
    return True


def _set_aside(files: Files, directory: Path, major: int) -> None:
    target = directory / SET_ASIDE / f"v{major}"
    if (target / _VERSION).exists():
        files.rename(target, _unused(target))
    _make(files, target)
    for path in sorted(directory.iterdir()):
        if path.name not in (SET_ASIDE, _VERSION):
            place = target / path.name
            files.rename(path, _unused(place) if place.exists() else place)
    files.sync_directory(target)
    files.sync_directory(directory)
    files.rename(directory / _VERSION, target / _VERSION)
    files.sync_directory(target)
    files.sync_directory(directory)
    logger.warning(
        "state of version %d is set aside in %s and comes back when that kvtier starts here; until "
        "then it takes %s (remove it if that kvtier will not return)",
        major, target, format_bytes(directory_bytes(target)),
    )  # fmt: skip


def _take_back(files: Files, directory: Path, kept: Path) -> None:
    if (kept / _VERSION).exists():
        files.rename(kept / _VERSION, directory / _VERSION)
        files.sync_directory(directory)
    for path in sorted(kept.iterdir()):
        place = directory / path.name
        if place.is_dir() and any(place.iterdir()):
            logger.warning("%s is let be: %s is there", path, place)
            continue
        files.rename(path, place)
    files.sync_directory(directory)
    if not any(kept.iterdir()):
        kept.rmdir()
    logger.warning("state that was set aside in %s is back", kept)


def _make(files: Files, target: Path) -> None:
    for path in (target.parent, target):
        if not path.exists():
            path.mkdir(mode=0o700)
            files.sync_directory(path.parent)


def _unused(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (f"{path.name}-{stamp}", *(f"{path.name}-{stamp}-{n}" for n in range(1, 1000)))
    return next(place for place in map(path.with_name, names) if not place.exists())
