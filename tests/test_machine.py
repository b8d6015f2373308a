"""What the machine offers, on fake /proc and /sys trees, and findings about it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kvtier import findings as doctor
from kvtier import machine
from kvtier.config import (
    Config,
    DramConfig,
    ServerConfig,
    SsdConfig,
    StateConfig,
    TiersConfig,
)
from kvtier.errors import DeviceUnavailable
from kvtier.findings import findings
from kvtier.units import GIB, KIB, MIB

MEMINFO = """MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
HugePages_Total:      10
HugePages_Free:        4
Hugepagesize:       2048 kB
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "root", {"proc/meminfo": MEMINFO})


def test_memory_of_a_plain_machine(root: Path) -> None:
    assert machine.memory_limit_bytes(root) == 16 * GIB
    assert machine.memory_available_bytes(root) == 8 * GIB
    pages = machine.huge_pages(root)
    assert (pages.total, pages.free, pages.free_bytes, pages.shmem) == (10, 4, 8 * MIB, "")


def test_memory_without_proc(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="is /proc mounted"):
        machine.memory_limit_bytes(tmp_path)


def test_memory_limit_of_cgroup_v2_is_the_least_of_all_levels(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/kubepods/pod1/c1\n",
            "sys/fs/cgroup/kubepods/pod1/c1/memory.max": "max\n",
            "sys/fs/cgroup/kubepods/pod1/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/kubepods/memory.max": f"{8 * GIB}\n",
        },
    )
    assert machine.memory_limit_bytes(root) == 2 * GIB


def test_memory_limit_inside_a_container(root: Path) -> None:
    # Its own path is not visible (v1 without namespace, v2 with one): the mounted root counts.
    write(root, {"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/memory.max": f"{3 * GIB}\n"})
    assert machine.memory_limit_bytes(root) == 3 * GIB
    write(
        root,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        },
    )
    assert machine.memory_limit_bytes(root) == GIB
    write(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert machine.memory_limit_bytes(root) == 16 * GIB


def test_cpu_count_is_bounded_by_quotas(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.cpu_count(root) == 8
    write(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert machine.cpu_count(root) == 8
    write(root, {"sys/fs/cgroup/cpu.max": "250000 100000\n"})
    assert machine.cpu_count(root) == 3
    write(
        root,
        {
            "proc/self/cgroup": "5:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert machine.cpu_count(root) == 8
    write(root, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n"})
    assert machine.cpu_count(root) == 1


def test_devices(root: Path) -> None:
    assert machine.numa_nodes(root) == ()
    assert machine.cxl_devices(root) == ()
    assert machine.gpus(root) == ()
    assert machine.kernel_version(root) == (0, 0)
    assert machine.memlock_bytes(root) is None
    node = "sys/devices/system/node"
    write(
        root,
        {
            f"{node}/node0/cpulist": "0-3,8-11,16\n",
            f"{node}/node0/meminfo": "Node 0 MemTotal:       4 kB\n",
            f"{node}/node10/cpulist": "\n",
            f"{node}/node10/meminfo": "Node 10 MemTotal:       8 kB\n",
            f"{node}/possible": "0-10\n",
            "sys/bus/cxl/devices/mem0/x": "",
            "sys/bus/cxl/devices/root0/x": "",
            "dev/nvidia0": "",
            "dev/nvidiactl": "",
            "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
            "proc/self/limits": "Max locked memory         8388608     unlimited   bytes\n",
        },
    )
    assert machine.numa_nodes(root) == (
        machine.NumaNode(index=0, cpu_count=9, size_bytes=4 * KIB),
        machine.NumaNode(index=10, cpu_count=0, size_bytes=8 * KIB),
    )
    assert machine.cxl_devices(root) == ("mem0",)
    assert machine.gpus(root) == ("nvidia0",)
    assert machine.kernel_version(root) == (6, 8)
    assert machine.memlock_bytes(root) == 8 * MIB


@pytest.mark.parametrize(
    ("kernel_name", "name"),
    [("ext4", "ext4"), ("xfs", "xfs"), ("tmpfs", "tmpfs"), ("overlay", "overlay"), ("9p", "9p"),
     ("nfs4", "nfs"), ("fuse.sshfs", "fuse")],
)  # fmt: skip
def test_file_system_of_the_nearest_mount(
    root: Path, tmp_path: Path, kernel_name: str, name: str
) -> None:
    space = tmp_path / "with space"
    space.mkdir()
    mount = str(space).replace(" ", r"\040")
    write(
        root,
        {
            "proc/self/mountinfo": "1 0 8:1 / / rw - btrfs /dev/sda rw\n"
            f"2 1 8:2 / {mount} rw shared:1 - ext2 /dev/sdb rw\n"
            f"3 2 8:3 / {mount} rw - {kernel_name} /dev/sdc rw\n"
            f"4 1 8:4 / {str(space)[:-2]} rw - proc proc rw\n"
        },
    )
    found = machine.file_system(space / "not" / "yet", root)
    assert (found.type, found.mount_point) == (name, str(space))
    assert 0 < found.free_bytes <= found.total_bytes
    assert not (space / "not").exists()


def test_file_system_without_a_mount_table(root: Path, tmp_path: Path) -> None:
    assert machine.file_system(tmp_path, root).type == "unknown"


def test_directory_bytes(tmp_path: Path) -> None:
    assert machine.directory_bytes(tmp_path / "absent") == 0
    write(tmp_path, {"a/b": "x" * 10_000, "c": "y"})
    assert machine.directory_bytes(tmp_path) >= 10_000


def test_direct_io_leaves_nothing_behind(tmp_path: Path) -> None:
    assert machine.direct_io_works(tmp_path / "absent") in (True, False)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)
    assert not machine.direct_io_works(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DeviceUnavailable, match="Input/output"):
        machine.direct_io_works(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = machine.direct_io_works(tmp_path)

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert not machine.direct_io_works(tmp_path), "there is nothing to tell by"
    (tmp_path / "a file").write_bytes(bytes(8192))
    assert machine.direct_io_works(tmp_path) == works
    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert machine.direct_io_works(tmp_path) == works


def maps_line(start: int, size: int, offset: int, inode: int, name: str) -> str:
    return f"{start:x}-{start + size:x} r--s {offset:08x} 00:01 {inode}   /memfd:{name} (deleted)\n"


def test_arenas_held_by_others_count_once(root: Path) -> None:
    write(
        root,
        {
            "proc/7/maps": maps_line(0x10000, 4096, 0, 1, "kvtier-x-0")
            + maps_line(0x20000, 8192, 4096, 1, "kvtier-x-0")
            + "7f00-7f01 rw-p 00000000 00:00 0\n"
            + maps_line(0x40000, 4096, 0, 9, "chrome"),
            "proc/30/maps": maps_line(0x10000, 12288, 0, 1, "kvtier-x-0")
            + maps_line(0x20000, 4096, 0, 2, "kvtier-x-1"),
            "proc/100/maps": maps_line(0x20000, 4096, 0, 3, "kvtier-mine"),
            "proc/101/maps": maps_line(0x20000, 4096, 0, 3, "kvtier-mine"),
            "proc/102/status": "no maps readable",
        },
    )
    assert machine.memfd_bytes_held_by_others("kvtier-", 100, root) == [(7, 12288), (30, 4096)]
    assert machine.memfd_bytes_held_by_others("kvtier-x-1", 100, root) == [(30, 4096)]
    assert machine.memfd_bytes_held_by_others("kvtier-", 7, root) == [(30, 4096), (100, 4096)]


def test_an_open_descriptor_of_a_live_process_is_found() -> None:
    name = f"kvtier-test-{os.getpid()}"
    code = (
        "import os, sys; d = os.memfd_create(sys.argv[1]); os.ftruncate(d, 65536); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        assert machine.memfd_bytes_held_by_others(name, os.getpid()) == [(child.pid, 65536)]
        assert machine.memfd_bytes_held_by_others(name, child.pid) == []
        child.stdin.close()
    assert machine.memfd_bytes_held_by_others(name, os.getpid()) == []


def configured(
    state_dir: Path, *, dram: DramConfig | None = None, ssd: SsdConfig | None = None
) -> Config:
    tiers = TiersConfig(dram or DramConfig(2 * GIB), ssd or SsdConfig(MIB, min_free_bytes=0))
    return Config(ServerConfig(Path("/r")), StateConfig(state_dir), tiers)


def status_of(config: Config, root: Path, *, native_kernel: bool = True) -> dict[str, str]:
    found = findings(config, native_kernel=native_kernel, root=root)
    assert all(line.remedy for line in found if line.status != "ok")
    return {line.name: line.status for line in found}


@pytest.fixture
def good(root: Path) -> Path:
    return write(
        root,
        {
            "proc/sys/kernel/osrelease": "6.8.0\n",
            "proc/self/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda rw\n",
            "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always [advise] never\n",
        },
    )


def test_a_good_machine_needs_nothing(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "direct_io_works", lambda _: True)
    assert set(status_of(configured(tmp_path), good).values()) == {"ok"}


def test_what_falls_short(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "direct_io_works", lambda _: False)
    write(
        good,
        {
            "proc/sys/kernel/osrelease": "4.18.0\n",
            "proc/self/limits": "Max locked memory         65536         65536         bytes\n",
            "proc/self/mountinfo": "1 0 8:1 / / rw - tmpfs tmpfs rw\n",
            "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always advise [never]\n",
            "dev/nvidia0": "",
        },
    )
    status = status_of(configured(tmp_path), good, native_kernel=False)
    assert status == {
        "kernel": "fail",
        "native kernel": "warn",
        "memory": "ok",
        "huge pages": "warn",
        "memlock": "warn",
        "disk space": "warn",
        "O_DIRECT": "warn",
        "NUMA": "ok",
        "CXL": "ok",
        "GPU": "ok",
    }
    strict = configured(
        tmp_path,
        dram=DramConfig(17 * GIB, huge_pages="require"),
        ssd=SsdConfig(1 << 60, min_free_bytes=0, direct_io="require"),
    )
    status = status_of(strict, good)
    assert [name for name, value in status.items() if value == "fail"] == [
        "kernel",
        "memory",
        "huge pages",
        "disk space",
        "O_DIRECT",
    ]
    tight = configured(tmp_path, dram=DramConfig(15 * GIB, huge_pages="off"))
    assert status_of(tight, good)["memory"] == "warn"
    assert status_of(tight, good)["huge pages"] == "ok"


def test_what_cannot_be_asked_is_a_finding(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path) -> bool:
        raise DeviceUnavailable(f"{directory}: cannot write: Permission denied")

    monkeypatch.setattr(doctor, "direct_io_works", refuse)
    (good / "proc/meminfo").unlink()
    status = status_of(configured(tmp_path), good)
    assert status["memory"] == "fail"
    assert status["state directory"] == "fail"
    off = configured(tmp_path, ssd=SsdConfig(0, enabled=False))
    assert status_of(off, good)["disk space"] == "warn"
