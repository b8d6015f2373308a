"""Findings: what this machine offers held against a configuration, for `kvtier doctor`.

Does not: ask the daemon anything, or change anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvtier.config import Config, DramConfig, SsdConfig
from kvtier.errors import DeviceUnavailable
from kvtier.machine import (
    ROOT,
    cpu_count,
    cxl_devices,
    direct_io_works,
    directory_bytes,
    file_system,
    gpus,
    huge_pages,
    kernel_version,
    memlock_bytes,
    memory_limit_bytes,
    numa_nodes,
)
from kvtier.units import HUGE_PAGE_BYTES, div_ceil, format_bytes

_KERNEL_MIN = (5, 3)  # pidfd_open; sealing FUTURE_WRITE came with 5.1
_DRAM_SHARE_MAX = 0.8  # of the memory limit; guessed: engines and page cache need the rest


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `kvtier doctor`. `remedy` is empty where nothing needs doing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def findings(config: Config, *, native_kernel: bool, root: Path = ROOT) -> list[Finding]:
    """What this machine offers against what `config` wants. "fail": the daemon would not start.

    `native_kernel`: whether the compiled library was found. Never raises for what it finds.
    """
    dram, ssd = config.tiers.dram, config.tiers.ssd
    found = [_kernel_finding(root)]
    if native_kernel:
        found.append(Finding("native kernel", "ok", "found"))
    else:
        remedy = "install a wheel, or reinstall with a C++ compiler"
        found.append(Finding("native kernel", "warn", "absent: copies are slower", remedy))
    for question in (_memory_finding, _huge_pages_finding):
        try:
            found.append(question(dram, root))
        except DeviceUnavailable as error:
            found.append(Finding("memory", "fail", str(error), "mount /proc"))
    found.append(_memlock_finding(dram, root))
    if ssd.enabled:
        for ask in (_disk_finding, _direct_io_finding):
            try:
                found.append(ask(ssd, config.state.dir, root))
            except DeviceUnavailable as error:
                remedy = "make state.dir writable for the daemon, or set another"
                found.append(Finding("state directory", "fail", str(error), remedy))
    else:
        remedy = "set tiers.ssd.size_bytes and a state.dir with room"
        found.append(Finding("disk space", "warn", "no SSD tier", remedy))
    nodes = numa_nodes(root)
    bare = ", ".join(f"node {node.index}" for node in nodes if not node.cpu_count) or "none"
    found.append(Finding("NUMA", "ok", f"{len(nodes)} nodes, without CPUs: {bare}"))
    found.append(Finding("CXL", "ok", ", ".join(cxl_devices(root)) or "none"))
    found.append(Finding("GPU", "ok", ", ".join(gpus(root)) or "none"))
    return found


def _kernel_finding(root: Path) -> Finding:
    version = kernel_version(root)
    detail = f"Linux {version[0]}.{version[1]}, {cpu_count(root)} CPUs"
    if version >= _KERNEL_MIN:
        return Finding("kernel", "ok", detail)
    wanted = f"run Linux {_KERNEL_MIN[0]}.{_KERNEL_MIN[1]} or newer"
    return Finding("kernel", "fail", detail, wanted)


def _memory_finding(dram: DramConfig, root: Path) -> Finding:
    limit = memory_limit_bytes(root)
    detail = f"tier of {format_bytes(dram.size_bytes)}, limit {format_bytes(limit)}"
    if dram.size_bytes <= _DRAM_SHARE_MAX * limit:
        return Finding("memory", "ok", detail)
    status: Literal["warn", "fail"] = "fail" if dram.size_bytes > limit else "warn"
    return Finding("memory", status, detail, "lower tiers.dram.size_bytes or raise the limit")


def _huge_pages_finding(dram: DramConfig, root: Path) -> Finding:
    pages = huge_pages(root)
    detail = f"{pages.free} of {pages.total} free, transparent for shmem: {pages.shmem or 'no'}"
    reserved = pages.page_bytes and pages.free_bytes >= dram.size_bytes
    transparent = pages.shmem in ("always", "within_size", "advise", "force")
    if dram.huge_pages == "off" or reserved or (transparent and dram.huge_pages == "auto"):
        return Finding("huge pages", "ok", detail)
    count = div_ceil(dram.size_bytes, pages.page_bytes or HUGE_PAGE_BYTES)
    remedy = f"sysctl vm.nr_hugepages={count}"
    if dram.huge_pages == "require":
        return Finding("huge pages", "fail", detail, remedy)
    enabled = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    return Finding("huge pages", "warn", detail, f"{remedy}, or write advise to {enabled}")


def _memlock_finding(dram: DramConfig, root: Path) -> Finding:
    limit = memlock_bytes(root)
    detail = "unlimited" if limit is None else format_bytes(limit)
    if limit is None or limit >= dram.size_bytes or not gpus(root):
        return Finding("memlock", "ok", detail)
    return Finding("memlock", "warn", f"{detail}: may not pin the tier", "LimitMEMLOCK=infinity")


def _disk_finding(ssd: SsdConfig, state_dir: Path, root: Path) -> Finding:
    disk = file_system(state_dir, root)
    room = disk.free_bytes + directory_bytes(state_dir) - ssd.min_free_bytes
    detail = f"{disk.type} on {disk.mount_point}: room for {format_bytes(max(0, room))}"
    if room < ssd.size_bytes:
        remedy = "lower tiers.ssd.size_bytes, free space, or set another state.dir"
        return Finding("disk space", "fail", f"{detail} of {format_bytes(ssd.size_bytes)}", remedy)
    if disk.type in ("tmpfs", "overlay", "nfs", "9p", "fuse"):
        return Finding("disk space", "warn", detail, "set state.dir to a local ext4 or xfs disk")
    return Finding("disk space", "ok", detail)


def _direct_io_finding(ssd: SsdConfig, state_dir: Path, root: Path) -> Finding:
    if direct_io_works(state_dir):
        return Finding("O_DIRECT", "ok", "works")
    remedy = "set state.dir to a local ext4 or xfs disk"
    if ssd.direct_io == "require":
        return Finding("O_DIRECT", "fail", "refused by the file system", remedy)
    status: Literal["ok", "warn"] = "ok" if ssd.direct_io == "off" else "warn"
    name = file_system(state_dir, root).type
    return Finding("O_DIRECT", status, f"refused by {name}: the page cache is used", remedy)
