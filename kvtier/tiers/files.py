"""Files: every system call on a state directory, in one object.

A subclass records, fails or shortens them: that is how power cuts, full disks and failing devices
are tried on the production code. LMDB makes its own calls on `data.mdb`: they are not here.

Does not: know what is in the files, or turn an OSError into one of ours (callers name the file).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from kvtier import machine, native
from kvtier.testing.failpoints import reach


class Files:
    """The operating system's files. Stateless; any thread. Raises OSError where not said otherwise.

    Nothing is durable before `sync` (contents) or `sync_directory` (names), but `replace` is.
    `depth`: how many slots of one batch are read or written at once.
    """

    depth = 4

    def __init__(self, depth: int = depth) -> None:
        self.depth = depth

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A file descriptor, closed on exec; links are not followed."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def close(self, fd: int) -> None:
        """The descriptor is gone, also when this raises."""
        os.close(fd)

    def size_bytes(self, fd: int) -> int:
        """Length of the file."""
        return os.fstat(fd).st_size

    def allocate(self, fd: int, size_bytes: int) -> None:
        """The file has this length at least, and no write within it can lack space."""
        os.posix_fallocate(fd, 0, size_bytes)

    def truncate(self, fd: int, size_bytes: int) -> None:
        """The file ends there."""
        os.ftruncate(fd, size_bytes)

    def write(self, fd: int, content: memoryview, offset: int) -> None:
        """All of it; a short write is EIO. Alignment is the caller's affair."""
        if os.pwritev(fd, [content], offset) != len(content):
            raise OSError(errno.EIO, "short write")

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """How many bytes were read: fewer than asked where the file ends."""
        return os.preadv(fd, [into], offset)

    def write_slots(
        self,
        fds: Sequence[int],
        offsets: Sequence[int],
        headers: Sequence[int],
        payloads: Sequence[int],
        sizes: Sequence[int],
    ) -> list[int]:
        """As `native.slots_write`: an errno per slot."""
        return native.slots_write(fds, offsets, headers, payloads, sizes, depth=self.depth)

    def read_slots(
        self,
        fds: Sequence[int],
        offsets: Sequence[int],
        headers: Sequence[int],
        payloads: Sequence[int],
        sizes: Sequence[int],
        used: Sequence[int],
    ) -> tuple[list[int], list[int]]:
        """As `native.slots_read`: a checksum and an errno per slot."""
        return native.slots_read(fds, offsets, headers, payloads, sizes, used, depth=self.depth)

    def sync(self, fd: int) -> None:
        """What was written to the file is on stable storage; after an error nothing is known."""
        os.fdatasync(fd)

    def sync_directory(self, directory: Path) -> None:
        """Created, renamed and removed names in `directory` survive a power cut."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """`target` is what `source` was; durable with the next `sync_directory`."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """The name is gone, if it was there; durable with the next `sync_directory`."""
        path.unlink(missing_ok=True)

    def free_bytes(self, directory: Path) -> int:
        """What this user may still write to that file system."""
        return machine.file_system(directory).free_bytes

    def replace(self, path: Path, content: bytes) -> None:
        """A small file, 0600, becomes this, durably: old or new is there after a crash."""
        temporary = path.with_name(path.name + ".new")
        fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                if content:
                    self.write(fd, memoryview(content), 0)
                reach("file.written")
                self.sync(fd)
                reach("file.synced")
            finally:
                self.close(fd)
            self.rename(temporary, path)
            reach("file.renamed")
            self.sync_directory(path.parent)
            reach("file.done")
        except OSError:
            self.unlink(temporary)
            raise
