"""What this machine offers: memory, disks, huge pages, NUMA, CXL, GPUs, and who holds old arenas.

Every question reads `/proc`, `/sys` and `/dev` below an injectable `root` and changes nothing; the
one exception is `direct_io_works`, which writes and removes a temporary file.
Does not: decide sizes (config) or allocate anything (tiers).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import DeviceUnavailable
from kvtier.units import KIB, PAGE_BYTES, div_ceil

ROOT = Path("/")
_REFUSES_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class HugePages:
    """Reserved huge pages of the default size, and how shared memory gets transparent ones."""

    total: int
    free: int
    page_bytes: int
    shmem: str  # always, within_size, advise, never, deny, force; "" when the kernel has none

    @property
    def free_bytes(self) -> int:
        return self.free * self.page_bytes


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One memory node. `cpu_count == 0` is how CXL memory and HBM expanders look."""

    index: int
    cpu_count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The file system a path lies on (or would lie on). `free_bytes`: what we may use."""

    type: str
    mount_point: str
    total_bytes: int
    free_bytes: int


# --- memory


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Bytes this process may use at most: the least of MemTotal and every cgroup above it.

    Raises:
        DeviceUnavailable: /proc/meminfo cannot be read.
    """
    limits = [_meminfo(root)["MemTotal"]]
    for directory in _cgroup_directories(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(directory / name).strip()
            if text.isdigit():
                limits.append(int(text))
    return min(limits)


def memory_available_bytes(root: Path = ROOT) -> int:
    """Bytes the machine could give without swapping (MemAvailable, not bounded by a cgroup).

    Raises:
        DeviceUnavailable: /proc/meminfo cannot be read.
    """
    values = _meminfo(root)
    return values.get("MemAvailable", values.get("MemFree", 0))


def huge_pages(root: Path = ROOT) -> HugePages:
    """What a memfd can get: reserved pages, else transparent ones. Raises DeviceUnavailable."""
    values = _meminfo(root)
    shmem = _text(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = re.search(r"\[(\w+)\]", shmem)
    return HugePages(
        total=values.get("HugePages_Total", 0),
        free=values.get("HugePages_Free", 0),
        page_bytes=values.get("Hugepagesize", 0),
        shmem=chosen.group(1) if chosen else "",
    )


def memlock_bytes(root: Path = ROOT) -> int | None:
    """The soft limit of locked memory (RLIMIT_MEMLOCK) in bytes; None when unlimited."""
    match = re.search(
        r"^Max locked memory\s+(\d+|unlimited)", _text(root / "proc/self/limits"), re.MULTILINE
    )
    return int(match.group(1)) if match and match.group(1).isdigit() else None


def memfd_bytes_held_by_others(
    name_prefix: str, exclude_pid: int, root: Path = ROOT
) -> list[tuple[int, int]]:
    """`(pid, bytes)` of memfds called `name_prefix...` that other processes still hold or map.

    A memfd counts once, for the lowest pid that has it, and not at all when `exclude_pid` has it
    too (then it is ours). A mapping without a descriptor counts up to its highest mapped byte.
    Processes we may not look into, or that end meanwhile, are passed over. Cost: reads all maps.
    """
    seen = set(_memfds(root / "proc" / str(exclude_pid), name_prefix))
    held = []
    pids = sorted(int(name) for name in _names(root / "proc") if name.isdigit())
    for pid in pids:
        if pid == exclude_pid:
            continue
        memfds = _memfds(root / "proc" / str(pid), name_prefix)
        size_bytes = sum(size for key, size in memfds.items() if key not in seen)
        seen.update(memfds)
        if size_bytes:
            held.append((pid, size_bytes))
    return held


def _memfds(process: Path, name_prefix: str) -> dict[tuple[int, int, int], int]:
    """Bytes per (major, minor, inode) of the process's memfds of that name; empty when refused."""
    wanted = f"/memfd:{name_prefix}"
    sizes: dict[tuple[int, int, int], int] = {}
    for line in _text(process / "maps").splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and columns[5].startswith(wanted):
            start, end = (int(address, 16) for address in columns[0].split("-"))
            major, minor = (int(number, 16) for number in columns[3].split(":"))
            key = (major, minor, int(columns[4]))
            sizes[key] = max(sizes.get(key, 0), int(columns[2], 16) + end - start)
    for name in _names(process / "fd"):
        link = process / "fd" / name
        try:
            if os.readlink(link).startswith(wanted):  # noqa: PTH115 - not a path, only looks so
                stat = link.stat()
                key = (os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino)
                sizes[key] = stat.st_size
        except OSError:
            continue
    return sizes


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes; the HugePages_ counts as they are."""
    text = _text(root / "proc/meminfo")
    found = re.findall(r"^([\w()]+):\s+(\d+)( kB)?$", text, re.MULTILINE)
    values = {name: int(number) * (KIB if unit else 1) for name, number, unit in found}
    if "MemTotal" not in values:
        raise DeviceUnavailable(f"{root / 'proc/meminfo'} does not say MemTotal; is /proc mounted?")
    return values


def _cgroup_directories(root: Path, controller: str) -> list[Path]:
    """Where the limits of this process may stand, own group first, up to the mounted root.

    A path that a container does not see (cgroup v1 without a namespace) ends at its mounted root.
    """
    directories = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controllers and controller)
        parts = [part for part in group.split("/") if part not in ("", "..")]
        directories += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return directories


# --- disks


def file_system(path: Path, root: Path = ROOT) -> FileSystem:
    """The file system of `path`, or of its nearest existing parent. Creates nothing.

    `type` is the kernel's name, with nfs4 as "nfs" and every fuse.* as "fuse"; "unknown" when the
    mount table cannot be read. Raises DeviceUnavailable when even the parents cannot be asked.
    """
    existing = existing_parent(path)
    try:
        stat = os.statvfs(existing)
    except OSError as error:
        raise DeviceUnavailable(f"{existing}: {error.strerror}") from error
    mount_point, name = "", "unknown"
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        target = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal.group(1), 8)), left.split()[4])
        # Of two mounts on one point the later hides the earlier: hence >=.
        if existing.is_relative_to(target) and len(target) >= len(mount_point):
            mount_point, name = target, right.split()[0]
    name = "nfs" if name == "nfs4" else name.partition(".")[0]
    return FileSystem(
        type=name,
        mount_point=mount_point,
        total_bytes=stat.f_blocks * stat.f_frsize,
        free_bytes=stat.f_bavail * stat.f_frsize,
    )


def existing_parent(path: Path) -> Path:
    """`path` itself when it exists, else its nearest existing parent; links resolved."""
    resolved = path.resolve()
    return next((p for p in (resolved, *resolved.parents) if _exists(p)), ROOT)


def directory_bytes(directory: Path) -> int:
    """Bytes on disk of all files below `directory`; 0 when it does not exist or is not ours."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += Path(folder, name).lstat().st_blocks * 512
            except OSError:
                continue  # removed meanwhile
    return total


def direct_io_works(directory: Path) -> bool:
    """Whether a file in `directory` (or its nearest existing parent) takes O_DIRECT both ways.

    Tried with a temporary file that is gone afterwards: some file systems accept the flag and
    refuse the write. Where the disk is full, reading what is there must do. Raises
    DeviceUnavailable when no file can be written there for another reason.
    """
    import tempfile  # costs 10 ms, and clients import this file

    where = existing_parent(directory)
    try:
        descriptor, name = tempfile.mkstemp(prefix=".kvtier-direct-io-", dir=where)
    except OSError as error:
        if error.errno in _IS_FULL:
            return _direct_reads_work(where)
        raise DeviceUnavailable(f"{where}: cannot write: {error.strerror}") from error
    os.close(descriptor)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:  # page aligned, as O_DIRECT wants
            descriptor = os.open(name, os.O_RDWR | os.O_DIRECT)
            try:
                written = os.pwrite(descriptor, page, 0)
                return written == os.preadv(descriptor, [page], 0) == PAGE_BYTES
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno in _REFUSES_DIRECT_IO:
            return False
        if error.errno in _IS_FULL:
            return _direct_reads_work(where)
        raise DeviceUnavailable(f"{where}: cannot write: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _direct_reads_work(directory: Path) -> bool:
    """Whether a file that is there already can be read with O_DIRECT; False when there is none."""
    for path in directory.iterdir():
        if path.is_file() and path.stat().st_size >= PAGE_BYTES:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                return False
            try:
                with mmap.mmap(-1, PAGE_BYTES) as page:
                    return os.preadv(descriptor, [page], 0) == PAGE_BYTES
            except OSError:
                return False
            finally:
                os.close(descriptor)
    return False


# --- processors and devices


def cpu_count(root: Path = ROOT) -> int:
    """CPUs this process may use: its affinity, bounded by every cgroup CPU quota (rounded up)."""
    counts = [len(os.sched_getaffinity(0))]
    for directory in _cgroup_directories(root, "cpu"):
        quota = _text(directory / "cpu.max").split() or [
            _text(directory / "cpu.cfs_quota_us").strip(),
            _text(directory / "cpu.cfs_period_us").strip(),
        ]
        if len(quota) == 2 and all(number.isdigit() and int(number) for number in quota):
            counts.append(div_ceil(int(quota[0]), int(quota[1])))
    return min(counts)


def numa_nodes(root: Path = ROOT) -> tuple[NumaNode, ...]:
    """Memory nodes by index; empty on a kernel without NUMA."""
    nodes = []
    directory = root / "sys/devices/system/node"
    for name in _names(directory):
        if re.fullmatch(r"node\d+", name):
            ranges = _text(directory / name / "cpulist").strip().split(",")
            ends = [cpus.partition("-") for cpus in ranges if cpus]
            total = re.search(r"MemTotal:\s+(\d+) kB", _text(directory / name / "meminfo"))
            nodes.append(
                NumaNode(
                    index=int(name.removeprefix("node")),
                    cpu_count=sum(int(last or first) - int(first) + 1 for first, _, last in ends),
                    size_bytes=int(total.group(1)) * KIB if total else 0,
                )
            )
    return tuple(sorted(nodes, key=lambda node: node.index))


def cxl_devices(root: Path = ROOT) -> tuple[str, ...]:
    """Names of CXL memory devices (`mem0`, ...); empty without the CXL bus."""
    names = _names(root / "sys/bus/cxl/devices")
    return tuple(sorted(name for name in names if re.fullmatch(r"mem\d+", name)))


def gpus(root: Path = ROOT) -> tuple[str, ...]:
    """Names of NVIDIA device files (`nvidia0`, ...). Their presence, not that CUDA works."""
    return tuple(sorted(name for name in _names(root / "dev") if re.fullmatch(r"nvidia\d+", name)))


def kernel_version(root: Path = ROOT) -> tuple[int, int]:
    """Major and minor of the running kernel; (0, 0) when it does not say."""
    match = re.match(r"(\d+)\.(\d+)", _text(root / "proc/sys/kernel/osrelease"))
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


# --- reading without surprises: what is absent or refused is empty


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 - names, not paths
    except OSError:
        return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
