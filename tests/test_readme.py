"""The README says what is so: its snippet runs as printed, its commands and its files exist."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", ".github/CONTRIBUTING.md", ".github/REVIEW.md", ".github/SECURITY.md")
BLOCK_BYTES = 2 * 2 * 2 * 64 * 2 * 16  # layers, K and V, heads, head_dim, bfloat16, tokens
START_S = 30.0
CONFIG = """\
[server]
runtime_dir = "{folder}"
[state]
dir = "{folder}/state"
[tiers.dram]
size_bytes = "16MiB"
[tiers.ssd]
size_bytes = "64MiB"
min_free_bytes = 0
"""


def fenced(language: str) -> list[str]:
    """The blocks of README in this language, as printed."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def kvtier(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    command = [sys.executable, "-m", "kvtier", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def daemon_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a real `kvtier serve` in a process of its own; it must stop cleanly."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "kvtier.toml").write_text(CONFIG.format(folder=folder))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVTIER_")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvtier", "serve", "--config", str(folder / "kvtier.toml")],
            cwd=ROOT, env=environ, stderr=log,
        )  # fmt: skip
    try:
        until_s = time.monotonic() + START_S
        while b"daemon.ready" not in (folder / "log").read_bytes():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until_s, (folder / "log").read_text()
            time.sleep(0.02)
        yield folder / "kvtier.sock"
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0, (folder / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_the_snippet_runs_as_printed(
    daemon_socket: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    snippet = next(code for code in fenced("python") if "space.reserve(" in code)
    monkeypatch.setenv("KVTIER_SOCKET", str(daemon_socket))
    keys = [bytes([index]) * 32 for index in range(1, 9)]
    payload = {key: key[:1] * BLOCK_BYTES for key in keys}
    scope: dict[str, Any] = {"keys": keys, "payload": payload}

    exec(compile(snippet, "README.md", "exec"), scope)  # noqa: S102 - what we print, we run

    assert scope["found"].block_count == len(keys)
    assert scope["payloads"] == [payload[key] for key in keys]
    assert not capfd.readouterr().err


def test_the_connector_of_the_snippet_exists() -> None:
    snippet = next(code for code in fenced("python") if "kvtier.connectors" in code)
    line = next(line for line in snippet.splitlines() if line.startswith("from kvtier"))
    exec(line, {})  # noqa: S102
    assert "cache.generate(" in snippet


def test_commands_exist() -> None:
    named = set(re.findall(r"(?:`|bin/|^)kvtier ([a-z]+)(?: ([a-z]+))?", README, re.MULTILINE))
    commands = {first for first, _ in named}
    assert {"serve", "stat", "demo", "doctor", "config"} <= commands
    offered = kvtier("--help")
    for command in commands:
        assert re.search(rf"\b{command}\b", offered), f"README names `kvtier {command}`"
    of_config = kvtier("config", "--help")
    for first, second in named:
        if first == "config" and second:
            assert re.search(rf"\b{second}\b", of_config), f"README names `kvtier config {second}`"


def test_every_command_is_named() -> None:
    from kvtier.cli.main import app

    missing = {
        name for name in map(name_of, app.registered_commands) if f"kvtier {name}" not in README
    }
    assert not missing


def name_of(command: Any) -> str:
    """What a person types."""
    return str(command.name or command.callback.__name__.rpartition("_")[2])


def test_all_but_two_commands_print_json() -> None:
    from kvtier.cli.main import app, config_app

    commands = {f"kvtier {name_of(c)}": c for c in app.registered_commands}
    commands |= {f"kvtier config {name_of(c)}": c for c in config_app.registered_commands}
    without = {
        name
        for name, command in commands.items()
        if "as_json" not in inspect.signature(command.callback or name_of).parameters
    }
    assert without == {"kvtier serve", "kvtier config example"}
    assert "All but `kvtier serve` and `kvtier config example` take `--json`." in README


def test_the_two_commands_are_one_line_each() -> None:
    install, tests = fenced("sh")[:2]
    assert install.count("\n") == tests.count("\n") == 1
    assert "'torch==2.13.0' '.[demo]'" in install
    assert install.endswith("kvtier demo\n")
    assert os.access(ROOT / tests.strip(), os.X_OK)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in links:
        assert "://" not in link, f"{document} leads out of the repository: {link}"
        target, _, anchor = link.partition("#")
        if target:
            assert (path.parent / target).exists(), f"{document} links to {link}"
        else:
            assert anchor in headings, f"{document} links to #{anchor}"


def test_versions_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("grpcio", "protobuf"):
        wanted = next(d for d in project["dependencies"] if re.match(rf"{name}[<>=]", d))
        assert f"{name} (`{wanted.removeprefix(name)}`)" in README


def test_the_demo_takes_any_torch_that_is_there() -> None:
    """An exact pin beside `.[demo]` must be enough: an extra that wants another brings a second."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    (torch,) = (d for d in extras["demo"] if d.startswith("torch"))
    assert ">=" in torch
    assert "<" not in torch


def test_the_picture_is_whole() -> None:
    import xml.etree.ElementTree as ET

    (picture,) = re.findall(r"!\[[^\]]{40,}\]\(([^)]+\.svg)\)", README)
    root = ET.fromstring((ROOT / picture).read_text(encoding="utf-8"))  # noqa: S314 - our own file
    assert root.get("role") == "img"
    assert "prefers-color-scheme: dark" in (ROOT / picture).read_text(encoding="utf-8")
