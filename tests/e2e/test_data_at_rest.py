"""What of clients' blocks lies on disk: of encrypted namespaces, aged ones, and after a purge."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import FORMAT, LARGE, START_S, Daemon, content, eventually, holds, keys_of, stored
from typer.testing import CliRunner

from kvtier.cli.main import app
from kvtier.client import Client
from kvtier.errors import BlocksHeld, KvTierError

ENCRYPT = """
[encryption]
key_file = "FOLDER/key"
[[namespaces]]
model = "secret*"
encrypt = true
"""
KEYS, SHORT = keys_of("kept", 40), keys_of("other", 8)
Start = Callable[..., Daemon]


@pytest.fixture
def start() -> Iterator[Start]:
    daemons: list[Daemon] = []

    def run(more: str = "", **options: Any) -> Daemon:
        daemon = Daemon(more=more, **options)
        daemons.append(daemon)
        (daemon.folder / "key").touch(mode=0o600)
        (daemon.folder / "key").write_bytes(b"k" * 32)
        return daemon

    yield run
    for daemon in daemons:
        daemon.close()


def store(daemon: Daemon, model: str, keys: list[bytes] = KEYS, form: Any = FORMAT) -> None:
    with Client(daemon.socket, deadline_s=10) as client:
        stored(client.open_namespace(model=model, format=form), keys, durable=True)


def has(daemon: Daemon, model: str, keys: list[bytes] = KEYS, form: Any = FORMAT) -> bool:
    with Client(daemon.socket, deadline_s=10) as client:
        return holds(client.open_namespace(model=model, format=form), keys)


def plaintext(daemon: Daemon, keys: list[bytes] = KEYS) -> int:
    """Of how many blocks some bytes lie below the state directory. Keys themselves may."""
    files = (path for path in (daemon.folder / "state").rglob("*") if path.is_file())
    on_disk = b"".join(path.read_bytes() for path in files)
    return sum(content(key)[:96] in on_disk for key in keys)


def back(daemon: Daemon) -> Daemon:
    """Started, and with all that its SSD tier has."""
    daemon.start()
    eventually(lambda: daemon.stat().tiers[-1].state == "serving", START_S)
    return daemon


def again(daemon: Daemon) -> None:
    assert daemon.stop() == 0, daemon.log
    back(daemon)


def digest_of(daemon: Daemon, model: str) -> str:
    entries = daemon.admin.namespaces().namespaces
    [digest] = [entry.digest for entry in entries if entry.stat.model == model]
    return str(digest)


def purge(daemon: Daemon, model: str) -> dict[str, Any]:
    arguments = ["purge", digest_of(daemon, model), "--yes", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--socket", str(daemon.socket)])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.output)
    return answer


def test_an_encrypted_namespace_leaves_no_plaintext(start: Start) -> None:
    pytest.importorskip("cryptography")
    daemon = start(ENCRYPT).start()
    store(daemon, "secret-1")
    store(daemon, "open", SHORT)
    assert plaintext(daemon) == 0
    assert plaintext(daemon, SHORT) == len(SHORT), "else this test would see nothing"
    daemon.kill()
    assert plaintext(daemon) == 0
    back(daemon)
    assert has(daemon, "secret-1")
    assert has(daemon, "open", SHORT)
    again(daemon)
    assert has(daemon, "secret-1")
    [entry] = [e for e in daemon.admin.namespaces().namespaces if e.stat.model == "secret-1"]
    assert entry.stat.encrypted
    assert not entry.stat.locked

    (daemon.folder / "key").write_bytes(b"x" * 32)
    again(daemon)
    assert not has(daemon, "secret-1")
    assert has(daemon, "open", SHORT)
    assert "encrypted under another key" in daemon.log
    assert any("encrypted under another key" in tier.detail for tier in daemon.stat().tiers)
    (daemon.folder / "key").write_text((b"k" * 32).hex())
    again(daemon)
    assert has(daemon, "secret-1")
    assert daemon.stat().corrupt_count == 0

    assert purge(daemon, "secret-1")["key_destroyed"]
    assert not has(daemon, "secret-1")
    daemon.kill()
    back(daemon)
    assert not has(daemon, "secret-1")
    assert has(daemon, "open", SHORT)
    store(daemon, "secret-1")
    assert has(daemon, "secret-1")
    assert plaintext(daemon) == 0
    assert daemon.stat().corrupt_count == 0


@pytest.mark.parametrize("form", [FORMAT, LARGE], ids=["small", "large"])
def test_a_purge_leaves_no_plaintext(start: Start, form: Any) -> None:
    daemon = start().start()
    store(daemon, "secret", KEYS, form)
    store(daemon, "open", SHORT, form)
    assert plaintext(daemon) == len(KEYS)
    done = purge(daemon, "secret")
    assert done["purged_blocks"] == len(KEYS)
    assert not done["key_destroyed"]
    assert done["wiped_bytes"] >= len(KEYS) * form.size_bytes
    daemon.kill()
    assert plaintext(daemon) == 0
    back(daemon)
    assert not has(daemon, "secret", KEYS, form)
    assert has(daemon, "open", SHORT, form)
    daemon.assert_sound()


@pytest.mark.parametrize("point", ["begin", "keyless", "wiped"])
@pytest.mark.parametrize("more", ["", ENCRYPT], ids=["plain", "encrypted"])
def test_a_purge_that_is_killed_is_repeated(start: Start, point: str, more: str) -> None:
    if more:
        pytest.importorskip("cryptography")
    daemon = start(more).launch(KVTIER_FAILPOINT=f"purge.{point}")
    eventually(daemon.stat, START_S)
    store(daemon, "secret")
    store(daemon, "open", SHORT)
    space = next(e.stat for e in daemon.admin.namespaces().namespaces if e.stat.model == "secret")
    with pytest.raises(KvTierError):
        daemon.admin.purge(space.namespace_id)
    assert daemon.process.wait(START_S) == -signal.SIGKILL
    back(daemon)
    assert has(daemon, "secret") is (point == "begin")
    if point == "wiped":
        assert plaintext(daemon) == 0
    purge(daemon, "secret")
    assert plaintext(daemon) == 0
    assert not has(daemon, "secret")
    assert has(daemon, "open", SHORT)
    daemon.assert_sound()


def test_a_purge_asks_and_waits(start: Start) -> None:
    daemon = start().start()
    with Client(daemon.socket, deadline_s=10) as client:
        space = stored(client.open_namespace(model="m", format=FORMAT), SHORT, durable=True)
        [entry] = daemon.admin.namespaces().namespaces
        asked = CliRunner().invoke(app, ["purge", "1", "--socket", str(daemon.socket)])
        assert asked.exit_code == 2
        assert "model m, 8 blocks" in asked.output
        assert "--yes" in asked.output
        with space.lease(SHORT), pytest.raises(BlocksHeld, match=r"held by .*\(pid \d+\)"):
            daemon.admin.purge(entry.stat.namespace_id, 0.2)
        assert holds(space, SHORT)
        assert daemon.admin.purge(entry.stat.namespace_id).block_count == len(SHORT)
        assert not holds(space, SHORT)
        stored(space, SHORT, durable=True)
        assert holds(space, SHORT)
    daemon.assert_sound()


def test_old_blocks_go_and_leave_no_plaintext(start: Start) -> None:
    daemon = start('[[namespaces]]\nmodel = "m"\nmax_age_s = 600').start()
    store(daemon, "m")
    assert has(daemon, "m")
    daemon.configure(more='[[namespaces]]\nmodel = "m"\nmax_age_s = 0.5')
    daemon.signal(signal.SIGHUP)
    eventually(lambda: daemon.stat().tiers[-1].block_count == 0, 30)
    eventually(lambda: plaintext(daemon) == 0, 30)
    daemon.assert_sound()


def test_files_are_nobody_elses(start: Start) -> None:
    pytest.importorskip("cryptography")
    daemon = start(ENCRYPT).start()
    store(daemon, "secret")
    store(daemon, "open", SHORT)
    daemon.kill()
    (daemon.folder / "state" / "ssd" / "catalogue" / "data.mdb").write_bytes(bytes(65536))
    back(daemon)
    assert has(daemon, "secret")
    purge(daemon, "open")
    again(daemon)
    state = daemon.folder / "state"
    paths = [state, *state.rglob("*")]
    assert len(paths) > 8
    for path in paths:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"


def refusal(daemon: Daemon, **variables: str) -> tuple[int, str]:
    daemon.launch(**variables)
    return daemon.process.wait(START_S), daemon.log


def test_keys_that_are_refused(start: Start) -> None:
    pytest.importorskip("cryptography")
    daemon = start(ENCRYPT)
    key = daemon.folder / "key"
    key.chmod(0o644)
    status, log = refusal(daemon)
    assert status == 2
    assert "mode 0644: others may read" in log
    key.chmod(0o600)
    key.write_bytes(b"short")
    assert refusal(daemon)[0] == 2
    assert "openssl rand" in daemon.log
    key.unlink()
    assert refusal(daemon)[0] == 2
    assert "No such file" in daemon.log
    daemon.configure(more="[[namespaces]]\nencrypt = true")
    assert refusal(daemon)[0] == 2
    assert "set encryption.key_file" in daemon.log


def test_the_library_is_asked_for_at_start(start: Start, tmp_path: Path) -> None:
    from daemons import ENVIRONMENT

    (tmp_path / "cryptography.py").write_text("raise ImportError('none here')")
    daemon = start(ENCRYPT)
    status, log = refusal(daemon, PYTHONPATH=f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}")
    assert status == 5
    assert "pip install 'kvtier[crypto]'" in log


def test_a_key_from_the_service_manager(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    more = ENCRYPT.replace('key_file = "FOLDER/key"', 'credential = "kvtier-master"')
    daemon = start(more)
    status, log = refusal(daemon)
    assert status == 2
    assert "LoadCredential=" in log
    (tmp_path / "kvtier-master").write_bytes(b"k" * 32)
    (tmp_path / "kvtier-master").chmod(0o440)
    daemon.launch(CREDENTIALS_DIRECTORY=str(tmp_path))
    eventually(daemon.stat, START_S)
    store(daemon, "secret")
    assert plaintext(daemon) == 0
