"""`kvtier doctor` on what lies on disk: each state is explained, with what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from daemons import FORMAT, Daemon, eventually, keys_of, stored
from typer.testing import CliRunner

from kvtier import native
from kvtier.block import TierId
from kvtier.cli.main import app
from kvtier.client import Client
from kvtier.config import Config, load
from kvtier.findings import Finding
from kvtier.state_findings import state_findings
from kvtier.tiers.files import Files
from kvtier.tiers.scrub_notes import ScrubNotes, write_notes
from kvtier.tiers.starts import Start, Verdict, _pack

SSD = {"size_bytes": "8MiB", "segment_bytes": "1MiB"}
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def left() -> Iterator[Daemon]:
    """What a daemon left that ended in order, with blocks in two slabs."""
    with closing(Daemon(ssd=SSD)) as daemon:
        daemon.start()
        with Client(daemon.socket, deadline_s=30) as client:
            space = client.open_namespace(model="m", format=FORMAT, weights="w")
            stored(space, keys_of("doctor", 80), durable=True)
        daemon.stop()
        yield daemon


@pytest.fixture
def config(left: Daemon, tmp_path: Path) -> Config:
    """The configuration of a copy of it."""
    shutil.copytree(left.folder / "state", tmp_path / "state")
    made = load(left.config_path, {})
    return replace(made, state=replace(made.state, dir=tmp_path / "state"))


def found(config: Config, name: str) -> Finding:
    """The worst finding of that name."""
    order = ("ok", "warn", "fail")
    mine = [finding for finding in state_findings(config) if finding.name == name]
    assert all(finding.remedy for finding in mine if finding.status != "ok")
    return max(mine, key=lambda finding: order.index(finding.status))


def disk(config: Config) -> Path:
    return config.state.dir / "ssd"


def test_a_clean_end(config: Config) -> None:
    findings = state_findings(config)
    assert {finding.status for finding in findings} == {"ok"}
    assert found(config, "clean marker").detail == "there: the last daemon ended in order"
    assert "start 1" in found(config, "identity").detail
    assert "2 of 8 made, each 1.0 MiB" in found(config, "slabs").detail
    assert "sound" in found(config, "catalogue").detail
    assert found(config, "namespaces").detail == "1 known"
    assert "1 known, 0 of them crashed" in found(config, "starts").detail


def test_nothing_there(tmp_path: Path, config: Config) -> None:
    [one] = state_findings(replace(config, state=replace(config.state, dir=tmp_path / "none")))
    assert (one.status, "first start" in one.detail) == ("ok", True)
    without = replace(config.tiers, ssd=replace(config.tiers.ssd, enabled=False))
    assert state_findings(replace(config, tiers=without)) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def version(text: bytes) -> Damage:
    line = b"%s %016x\n" % (text, native.checksum_bytes(text))
    return lambda ssd: (ssd / "VERSION").write_bytes(line)


def make(name: str, content: bytes = b"x") -> Damage:
    def act(ssd: Path) -> None:
        path = ssd / name
        path.parent.mkdir(exist_ok=True, parents=True, mode=0o700)
        path.write_bytes(content)
        path.chmod(0o600)

    return act


def tear_catalogue(ssd: Path) -> None:
    with (ssd / "catalogue" / "data.mdb").open("r+b") as file:
        file.truncate(3 * 4096)


def other_state_id(ssd: Path) -> None:
    path = ssd / "slabs" / "00000.slab"
    with path.open("r+b") as file:
        head = bytearray(file.read(48))
        head[32:48] = b"another one's id"
        file.seek(0)
        file.write(head + struct.pack("<Q", native.checksum_bytes(bytes(head))))


CASES: dict[str, tuple[Damage, str, str]] = {
    "killed": (lambda ssd: (ssd / "clean").unlink(), "clean marker", "was killed, or the power"),
    "newer major": (version(b"2.0"), "state version", "2.0, of another kvtier; this one has 1.0"),
    "bad version": (make("VERSION"), "state version", "VERSION is damaged"),
    "no version": (lambda ssd: (ssd / "VERSION").unlink(), "state version", "there is no VERSION"),
    "identity": (lambda ssd: flip(ssd / "identity"), "identity", "is damaged"),
    "no identity": (lambda ssd: (ssd / "identity").unlink(), "identity", "no identity beside"),
    "namespaces": (lambda ssd: flip(ssd / "namespaces"), "namespaces", "damaged"),
    "no namespaces": (lambda ssd: (ssd / "namespaces").unlink(), "namespaces", "is lost"),
    "torn catalogue": (tear_catalogue, "catalogue", "damaged:"),
    "no catalogue": (lambda ssd: shutil.rmtree(ssd / "catalogue"), "catalogue", "lost"),
    "evidence": (
        make("catalogue.damaged-20260102T030405Z/data.mdb"),
        "set aside",
        "the catalogue was damaged at 2026-01-02 03:04:05 UTC",
    ),
    "names aside": (make("namespaces.damaged-20260102T030405Z"), "set aside", "the namespaces was"),
    "version aside": (make("set-aside/v2/VERSION"), "set aside", "state of version 2, "),
    "stray slab": (make("slabs/00012.slab"), "slabs", "00012.slab (1 B) beyond the size"),
    "foreign file": (make("slabs/notes.txt"), "slabs", "notes.txt among the slabs"),
    "short slab": (
        lambda ssd: os.truncate(ssd / "slabs" / "00001.slab", 500_000),
        "slabs",
        "00001.slab not of the segments' size",
    ),
    "headless slab": (
        lambda ssd: (ssd / "slabs" / "00001.slab").write_bytes(bytes(1 << 20)),
        "slabs",
        "00001.slab has no readable header",
    ),
    "moved slab": (
        lambda ssd: shutil.copy(ssd / "slabs" / "00000.slab", ssd / "slabs" / "00003.slab"),
        "slabs",
        "00003.slab was slab 0",
    ),
    "foreign slab": (other_state_id, "slabs", "00000.slab is of another state directory"),
    "open to others": (
        lambda ssd: (ssd / "slabs" / "00000.slab").chmod(0o644),
        "permissions",
        "others may use 00000.slab",
    ),
    "damage found": (
        lambda ssd: write_notes(
            Files(), ssd / "scrub", ScrubNotes(ended_s=time.time(), damaged={"payload": 2})
        ),
        "scrub",
        "2 damaged copies",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_state_is_explained(case: str, config: Config) -> None:
    damage, name, detail = CASES[case]
    damage(disk(config))
    before = sorted(disk(config).rglob("*"))

    finding = found(config, name)

    assert finding.status == "warn"
    assert detail in finding.detail
    assert sorted(disk(config).rglob("*")) == before, "the doctor only looks"


def crash(verdict: Verdict, recovered: bool = True) -> Start:
    now = int(time.time())
    return Start(now - 20, verdict, True, recovered, False, signal.SIGBUS, now - 10)


@pytest.mark.parametrize(
    ("starts", "status", "said"),
    [
        ([crash(Verdict.CATALOGUE)], "warn", "the last one by SIGBUS"),
        ([crash(Verdict.CATALOGUE)] * 2, "warn", "two in a row"),
        ([crash(Verdict.SLABS, recovered=False)], "warn", "reading slabs alone"),
        (
            [
                crash(Verdict.CATALOGUE),
                Start(int(time.time()), Verdict.CATALOGUE, True, True, True, 0, 0),
            ],
            "ok",
            "2 known, 1 of them crashed",
        ),
    ],
)
def test_crashes_are_told(config: Config, starts: list[Start], status: str, said: str) -> None:
    (disk(config) / "starts").write_bytes(b"".join(map(_pack, starts)))
    finding = found(config, "starts")
    assert finding.status == status
    assert said in finding.detail


def test_a_disk_that_is_nearly_full(config: Config) -> None:
    ssd = replace(config.tiers.ssd, min_free_bytes=1 << 60)
    finding = found(replace(config, tiers=replace(config.tiers, ssd=ssd)), "free space")
    assert (finding.status, "6.0 MiB of slabs not made yet" in finding.detail) == ("warn", True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("what", ["state", "state/ssd", "state/ssd/slabs", "state/ssd/namespaces"])
def test_what_is_somebody_elses(config: Config, what: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name) / "state"
        shutil.copytree(config.state.dir, place)
        for path in (Path(name), place, *place.rglob("*")):
            os.chown(path, 65534, 65534)
        os.chown(Path(name) / what, 0, 0)
        os.seteuid(65534)
        try:
            finding = found(replace(config, state=replace(config.state, dir=place)), "permissions")
        finally:
            os.seteuid(0)
    assert finding.status == "fail"
    assert Path(what).name in finding.detail
    assert "chown" in finding.remedy


def doctor(daemon: Daemon) -> tuple[int, dict[str, list[dict[str, str]]]]:
    arguments = ["doctor", "--json", "--socket", str(daemon.socket)]
    result = CliRunner().invoke(app, [*arguments, "--config", str(daemon.config_path)])
    named: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(result.output)["findings"]:
        named.setdefault(finding["name"], []).append(finding)
    return result.exit_code, named


def test_with_a_daemon_that_runs_and_one_that_was_killed() -> None:
    with closing(Daemon(ssd=SSD)) as daemon:
        daemon.start()
        with Client(daemon.socket, deadline_s=30) as client:
            space = client.open_namespace(model="m", format=FORMAT, weights="w")
            stored(space, keys_of("doctor", 40), durable=True)
        eventually(lambda: daemon.admin.stat().tiers[1].state == "serving")
        status, named = doctor(daemon)
        assert status == 0
        assert named["clean marker"][0]["detail"] == "absent, as always while a daemon runs"
        assert "in use" in named["catalogue"][0]["detail"]
        assert "tier ssd" not in named

        daemon.admin.resize(TierId.SSD, 4 << 20)
        status, named = doctor(daemon)
        assert status == 0
        assert "4 segments now, the configuration says 8" in named["tier ssd"][0]["detail"]

        daemon.kill()
        status, named = doctor(daemon)
        assert status == 0
        assert named["clean marker"][0]["status"] == "warn"
        assert named["daemon"][0]["status"] == "warn"
        assert named["catalogue"][0]["status"] == "ok"
        assert "0 of them crashed" in named["starts"][0]["detail"]
