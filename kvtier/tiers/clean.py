"""The clean marker: a file that says that the last process on a state directory ended in order.

Then, and only then, no slot has a sound header that the catalogue does not list, and all that the
catalogue lists is on stable storage. It goes before anything is changed.

Does not: decide when that is so.
"""

from __future__ import annotations

from pathlib import Path

from kvtier.errors import TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.files import Files


class CleanMarker:
    """The file `clean` of a state directory. One thread at a time."""

    def __init__(self, files: Files, directory: Path) -> None:
        self._files = files
        self._path = directory / "clean"

    def take(self) -> bool:
        """Whether it was there; it is gone, durably, so that an end from here on is an unclean
        one. Raises TierFailed.
        """
        try:
            found = self._path.exists()
            self._files.unlink(self._path)
            self._files.sync_directory(self._path.parent)
            reach("recover.unclean")
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
        return found

    def leave(self) -> None:
        """Made, durably. Raises TierFailed."""
        try:
            self._files.replace(self._path, b"")
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
