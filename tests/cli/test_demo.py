"""The demo's judgement, its parts, and (stress) the whole of it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvtier.cli import demo
from kvtier.cli.demo_parts import environment
from kvtier.cli.main import app


def _row(**changes: Any) -> dict[str, Any]:
    return {
        "identical": True,
        "found_tokens": 32,
        "ttft_ms": 10.0,
        "ttft_baseline_ms": 100.0,
        "after_restart": False,
        **changes,
    }


GOOD = [_row(found_tokens=0, ttft_ms=101.0), _row(), _row(after_restart=True)]


def test_judge() -> None:
    assert demo.judge(GOOD) == []
    assert demo.judge([*GOOD, _row(identical=False)]) != []
    assert demo.judge([*GOOD, _row(ttft_ms=100.0)]) != []
    assert demo.judge([*GOOD, _row(failures={"restore:OSError": 1})]) != []
    assert demo.judge(GOOD[:2]) == ["nothing was found after the restart"]
    assert demo.judge(GOOD[2:]) == ["nothing was found before the restart"]


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else 1)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "kvtier: the demo needs torch: pip install 'kvtier[demo]'"
    ]


def test_a_model_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "config.json" in result.output


def test_other_settings_do_not_reach_the_demo() -> None:
    given = {"KVTIER_SOCKET": "/x", "KVTIER_NATIVE": "off", "PATH": "/bin"}
    kept = environment(given, Path("/tmp/x"))
    assert "KVTIER_SOCKET" not in kept
    assert kept["KVTIER_NATIVE"] == "off"
    assert kept["HF_HUB_OFFLINE"] == "1"
    assert kept["TMPDIR"] == "/tmp/x"


def _of_this_demo(directory: Path) -> list[str]:
    """Command lines of living processes that name the directory."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in line:
            lines.append(line)
    return lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_halfway_it_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base = Path("/tmp") / f"kvd{os.getpid()}-{number}"
    base.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvtier", "demo"],
        env={**os.environ, "TMPDIR": str(base)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline_s = time.monotonic() + 120
    while not list(base.glob("*/run/kvtier.sock")) and time.monotonic() < deadline_s:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert list(base.iterdir()) == []
    assert _of_this_demo(base) == []
    base.rmdir()


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_the_whole_demo() -> None:
    pytest.importorskip("transformers")
    result = subprocess.run(
        [sys.executable, "-m", "kvtier", "demo", "--json"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    answer = json.loads(result.stdout)
    assert answer["ok"], answer["problems"]
    assert result.returncode == 0
    assert {"dram"} < {request["tier"] for request in answer["requests"]}
    assert answer["stat"]["state"] == "serving"
