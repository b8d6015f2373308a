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
from typing import Final, NamedTuple

from kvtier import machine, native
from kvtier.errors import DeviceUnavailable, TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.files import Files
from kvtier.tiers.versions import settle
from kvtier.units import PAGE_BYTES

STATE_VERSION: Final = (1, 0)  # (major, minor); another major is another layout


class Named(NamedTuple):
    """What is kept of a namespace. `key`: its data key, wrapped (cipher.py); b"" = not encrypted.
    `plain`: slots may hold bytes of it that are not encrypted.
    """

    epoch: int
    descriptor: bytes
    key: bytes = b""
    plain: bool = True


Names = dict[bytes, Named]  # by digest

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
        bytes.fromhex(digest): Named(
            int(epoch), descriptor.encode(), bytes.fromhex(key), bool(plain)
        )
        for digest, epoch, descriptor, key, plain in json.loads(body)
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
        """Adds what is new and takes the later epoch of what is known; of one epoch, what has a
        key (it was listed before the first write under it). Memory only.
        """
        for digest, named in names.items():
            known = self.names.get(digest)
            if known is None:
                self.names[digest] = named
            elif (known.epoch, bool(known.key)) < (named.epoch, bool(named.key)):
                self.names[digest] = named._replace(descriptor=known.descriptor)

    def save(self, names: Names, *, shred: bool = False) -> None:
        """These are the namespaces now, durably. With `shred`, what the former file (and damaged
        ones set aside) said is overwritten. Raises TierFailed: the former ones stay, in doubt.
        """
        rows = [
            (digest.hex(), named.epoch, named.descriptor.decode(), named.key.hex(), named.plain)
            for digest, named in names.items()
        ]
        body = json.dumps(rows).encode()
        content = b"%016x\n%s" % (native.checksum_bytes(body), body)
        try:
            old = self._files.open(self._path, os.O_WRONLY) if shred and self._path.exists() else -1
            try:
                self._files.replace(self._path, content)
                if old >= 0:
                    self._overwrite(old)
            finally:
                if old >= 0:
                    self._files.close(old)
            for path in self._path.parent.glob(f"{self._path.name}.*") if shred else ():
                fd = self._files.open(path, os.O_WRONLY)
                try:
                    self._overwrite(fd)
                finally:
                    self._files.close(fd)
                self._files.unlink(path)
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
        self.names = names

    def _overwrite(self, fd: int) -> None:
        """The file has zeros where it had anything, durably."""
        if size := self._files.size_bytes(fd):
            self._files.write(fd, memoryview(bytes(size)), 0)
        self._files.sync(fd)
