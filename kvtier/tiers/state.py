"""The small files of a state directory: its version, and its namespaces.

Does not: know slabs or the catalogue.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Final

from kvtier import machine, native
from kvtier.errors import DeviceUnavailable, TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.files import Files
from kvtier.tiers.versions import settle
from kvtier.units import PAGE_BYTES

STATE_VERSION: Final = (1, 0)  # (major, minor); another major is another layout
Names = dict[bytes, tuple[int, bytes]]  # digest -> epoch, descriptor

logger = logging.getLogger(__name__)


def prepare_directory(files: Files, directory: Path) -> None:
    """Makes the state directory, 0700, and whatever of it is of our version, at any moment known as
    that: state of another major version is set aside, state of ours that was is back.

    Raises:
        DeviceUnavailable: it cannot be made or read.
    """
    version = directory / "VERSION"
    major, minor = STATE_VERSION
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = read_version(version) if version.exists() else None
        if known is None and version.exists():
            logger.warning("%s is damaged (%r): written anew", version, version.read_bytes()[:64])
        # A damaged VERSION is no other version: what lies beside it is taken for ours.
        found = known[0] if known else major if version.exists() else None
        is_ours = settle(files, directory, found, major)
        (directory / "slabs").mkdir(mode=0o700, exist_ok=True)
        # A newer minor version stays what it is.
        if not is_ours or read_version(version) is None:
            text = b"%d.%d" % (major, minor)
            files.replace(version, b"%s %016x\n" % (text, native.checksum_bytes(text)))
    except OSError as error:
        raise DeviceUnavailable(
            f"{directory} cannot be used: {error.strerror}; set state.dir to a directory "
            "on a local disk that this user may write"
        ) from error


def read_version(path: Path) -> tuple[int, int] | None:
    """Major and minor; None when the file is damaged: a bit that rotted is no newer version, and
    every slab and slot says its own.
    """
    content = path.read_bytes()
    match = re.fullmatch(rb"((\d{1,9})\.(\d{1,9}))(?: ([0-9a-f]{16}))?\s*", content)
    if match is None or (match[4] and int(match[4], 16) != native.checksum_bytes(match[1])):
        return None
    return int(match[2]), int(match[3])


def choose_direct_io(directory: Path, wish: str) -> bool:
    """Whether slabs there are opened with O_DIRECT; tried, not believed. Warns where it is not.

    Raises:
        DeviceUnavailable: `wish` is "require" and the file system has none.
    """
    kind = machine.file_system(directory).type
    if kind in ("nfs", "9p", "fuse", "cifs"):
        logger.warning("%s lies on %s: LMDB is not safe there", directory, kind)
    if wish == "off":
        return False
    if machine.direct_io_works(directory / "slabs"):
        return True
    if wish == "require":
        raise DeviceUnavailable(
            f"{directory} lies on {kind}, which has no O_DIRECT; set "
            'tiers.ssd.direct_io = "auto" or choose another state.dir'
        )
    logger.warning("%s lies on %s without O_DIRECT: using the page cache", directory, kind)
    return False


def prove(files: Files, directory: Path) -> None:
    """Writes, syncs and reads back a small file there. Raises TierFailed."""
    path = directory / "probe"
    content = os.urandom(PAGE_BYTES)
    try:
        files.replace(path, content)
        if path.read_bytes() != content:
            raise TierFailed(f"{path}: what was read is not what was written")
        files.unlink(path)
    except OSError as error:
        raise TierFailed(f"{path}: {error.strerror or error}") from error


def read_book(content: bytes) -> Names:
    """What the file of namespaces says. Raises ValueError: it is damaged."""
    checksum, _, body = content.partition(b"\n")
    if int(checksum, 16) != native.checksum_bytes(body):
        raise ValueError("checksum")
    return {
        bytes.fromhex(digest): (int(epoch), descriptor.encode())
        for digest, epoch, descriptor in json.loads(body)
    }


class NamespaceBook:
    """Namespaces and their epochs, in a file of its own that is whole before a change returns.

    The first line is the XXH3-64 of the rest, which is JSON. Slabs list the same; where the file
    is missing or damaged, `merge` brings back what they say. Any one thread at a time.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self.names: Names = {}

    def load(self) -> None:
        """Reads the file; a damaged one is set aside and counts as missing. Raises TierFailed."""
        reach("recover.begin")
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
        try:
            self.names = read_book(content)
        except ValueError as error:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            aside = self._path.with_name(f"{self._path.name}.damaged-{stamp}")
            logger.warning("%s is damaged (%s): set aside as %s", self._path, error, aside.name)
            self._files.rename(self._path, aside)

    def merge(self, names: Names) -> None:
        """Adds what is new and takes the later epoch of what is known. Memory only."""
        for digest, (epoch, descriptor) in names.items():
            known = self.names.get(digest)
            if known is None or known[0] < epoch:
                self.names[digest] = (epoch, known[1] if known else descriptor)

    def save(self, names: Names) -> None:
        """These are the namespaces now, durably. Raises TierFailed: the former ones stay."""
        rows = [
            (digest.hex(), epoch, descriptor.decode())
            for digest, (epoch, descriptor) in names.items()
        ]
        body = json.dumps(rows).encode()
        try:
            self._files.replace(self._path, b"%016x\n%s" % (native.checksum_bytes(body), body))
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
        self.names = names
