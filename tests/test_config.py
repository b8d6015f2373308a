"""The configuration: defaults, files, environment, bad input, contradictions, live changes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvtier import config as configuration
from kvtier import machine
from kvtier.config import (
    Config,
    DramConfig,
    ServerConfig,
    SsdConfig,
    StateConfig,
    TenantConfig,
    TiersConfig,
    default_socket,
    describe_changes,
    example_toml,
    load,
    session_socket,
    to_toml,
    with_live_changes,
)
from kvtier.errors import ConfigError
from kvtier.units import GIB, MIB

EXAMPLE = Path(__file__).parents[1] / "deploy" / "kvtier.example.toml"


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 GiB with a disk of which 40 GiB are free."""
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda _: 16 * GIB)
    monkeypatch.setattr(machine, "memory_available_bytes", lambda _: 12 * GIB)
    disk = machine.FileSystem("ext4", "/", 80 * GIB, 40 * GIB)
    monkeypatch.setattr(machine, "file_system", lambda *_: disk)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": str(tmp_path)}


def read(tmp_path: Path, environ: dict[str, str], text: str) -> Config:
    path = tmp_path / "kvtier.toml"
    path.write_text(text)
    return load(path, environ)


def test_defaults(tmp_path: Path, environ: dict[str, str]) -> None:
    config = load(None, environ)

    assert config.server.socket == Path("/run/user/7/kvtier/kvtier.sock")
    assert config.server.admin_socket == Path("/run/user/7/kvtier/admin.sock")
    assert config.state.dir == tmp_path / "kvtier"
    assert config.tiers.dram.size_bytes == 4 * GIB
    assert config.tiers.dram.segment_bytes == 64 * MIB
    assert config.tiers.ssd.size_bytes == 19 * GIB
    assert config.tenants == (TenantConfig("default", uids=(os.getuid(),)),)
    assert not (tmp_path / "kvtier").exists()


def test_default_directories_without_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert load(None, {"HOME": "/root"}).state.dir == Path("/var/lib/kvtier")
    assert default_socket({}) == Path("/run/kvtier/kvtier.sock")

    monkeypatch.setattr(os, "getuid", lambda: 7)
    assert load(None, {"HOME": "/home/u"}).state.dir == Path("/home/u/.local/state/kvtier")
    assert default_socket({"XDG_RUNTIME_DIR": "relative"}) == Path("/tmp/kvtier-7/kvtier.sock")


@pytest.mark.parametrize("given", ["/a/k.sock", "unix:/a/k.sock", "unix:///a/k.sock"])
def test_client_and_daemon_agree_on_the_socket(environ: dict[str, str], given: str) -> None:
    for name in ("KVTIER_SOCKET", "KVTIER_SERVER_SOCKET"):
        assert default_socket({name: given}) == Path("/a/k.sock")
    environ["KVTIER_SOCKET"] = given
    assert load(None, environ).server.socket == default_socket(environ)
    assert session_socket(Path("/a/k.sock")) == Path("/a/k.sock.session")


def test_runtime_dir_moves_all_sockets(environ: dict[str, str]) -> None:
    environ["KVTIER_SERVER_RUNTIME_DIR"] = "/x"
    config = load(None, environ)
    assert (config.server.socket, config.server.admin_socket) == (
        Path("/x/kvtier.sock"),
        Path("/x/admin.sock"),
    )
    assert default_socket(environ) == config.server.socket


def test_memory_in_use_leaves_headroom(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_available_bytes", lambda _: 3 * GIB)
    assert load(None, environ).tiers.dram.size_bytes == GIB
    monkeypatch.setattr(machine, "memory_available_bytes", lambda _: 0)
    assert load(None, environ).tiers.dram.size_bytes == 64 * MIB


def test_ssd_default_is_bounded_and_counts_what_it_holds(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "directory_bytes", lambda _: 4 * GIB)
    assert load(None, environ).tiers.ssd.size_bytes == 21 * GIB
    monkeypatch.setattr(machine, "directory_bytes", lambda _: 900 * GIB)
    assert load(None, environ).tiers.ssd.size_bytes == 64 * GIB


def test_full_disk_means_no_ssd_tier_unless_asked_for(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = machine.FileSystem("ext4", "/", 80 * GIB, 2 * GIB)
    monkeypatch.setattr(machine, "file_system", lambda *_: disk)
    config = load(None, environ)
    assert (config.tiers.ssd.enabled, config.tiers.ssd.size_bytes) == (False, 0)
    assert read(tmp_path, environ, to_toml(config)) == config
    with pytest.raises(ConfigError, match=r"tiers\.ssd\.enabled = True: no room"):
        read(tmp_path, environ, "[tiers.ssd]\nenabled = true")


FULL = """
[server]
runtime_dir = "/r"
allowed_uids = [1, 2]
grace_s = 3
[state]
dir = "/s"
[tiers.dram]
size_bytes = "1.5GiB"
[tiers.ssd]
size_bytes = 268435456
[metrics]
port = 9470
[[tenants]]
name = "a"
uids = [1]
dram_guaranteed_bytes = "1GiB"
[[tenants]]
name = "b"
socket = "/b/k\\u00e9.sock"
"""


def test_a_file(tmp_path: Path, environ: dict[str, str]) -> None:
    config = read(tmp_path, environ, FULL)
    assert config.server.grace_s == 3.0
    assert isinstance(config.server.grace_s, float)
    assert config.tiers.dram.size_bytes == 3 * GIB // 2
    assert config.tiers.ssd.segment_bytes == 16 * MIB
    assert config.metrics.port == 9470
    assert config.tenants[0] == TenantConfig("a", uids=(1,), dram_guaranteed_bytes=GIB)
    assert config.tenants[1].socket == Path("/b/k\u00e9.sock")
    environ["KVTIER_CONFIG"] = str(tmp_path / "kvtier.toml")
    assert load(None, environ) == config


@pytest.mark.parametrize("text", ["", FULL])
def test_round_trip(tmp_path: Path, environ: dict[str, str], text: str) -> None:
    config = read(tmp_path, environ, text)
    assert read(tmp_path, {}, to_toml(config)) == config


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("KVTIER_SERVER_SOCKET", "/e.sock", "server.socket", Path("/e.sock")),
        ("KVTIER_SERVER_GRACE_S", "0.5", "server.grace_s", 0.5),
        ("KVTIER_SERVER_BYPASS", "true", "server.bypass", True),
        ("KVTIER_SERVER_BYPASS", "0", "server.bypass", False),
        ("KVTIER_SERVER_ALLOWED_UIDS", "0, 5", "server.allowed_uids", (0, 5)),
        ("KVTIER_TIERS_DRAM_SIZE_BYTES", "128MiB", "tiers.dram.size_bytes", 128 * MIB),
        ("KVTIER_TIERS_DRAM_SIZE_BYTES", "134217728", "tiers.dram.size_bytes", 128 * MIB),
        ("KVTIER_METRICS_PORT", "9000", "metrics.port", 9000),
    ],
)
def test_environment_overrides_the_file(
    tmp_path: Path, environ: dict[str, str], name: str, text: str, key: str, value: object
) -> None:
    environ[name] = text
    config = read(tmp_path, environ, FULL.replace('"1GiB"', "0"))
    section, _, last = key.rpartition(".")
    assert to_toml(config)  # prints
    found: object = config
    for part in (*section.split("."), last):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("KVTIER_SERVER_SOKET", "/x", "KVTIER_SERVER_SOKET.*KVTIER_SERVER_SOCKET"),
        ("KVTIER_TIERS_DRAM_SIZE", "1", "nearest known is KVTIER_TIERS_DRAM_SIZE_BYTES"),
        ("KVTIER_NATVE", "0", "nearest known is KVTIER_NATIVE"),
        ("KVTIER_SERVER_GRACE_S", "soon", "KVTIER_SERVER_GRACE_S = 'soon': must be a number"),
        ("KVTIER_SERVER_BYPASS", "maybe", "must be true or false"),
        ("KVTIER_SERVER_IO_THREADS", "four", "must be an integer from 1 to 256"),
        ("KVTIER_SERVER_ALLOWED_UIDS", "root", "must be a list of"),
        ("KVTIER_SERVER_SOCKET", "", "must be an absolute path"),
        ("KVTIER_METRICS_PORT", "", "must be an integer"),
    ],
)
def test_bad_environment(environ: dict[str, str], name: str, text: str, message: str) -> None:
    environ[name] = text
    with pytest.raises(ConfigError, match=message):
        load(None, environ)


def test_foreign_names_in_the_environment_are_not_ours(environ: dict[str, str]) -> None:
    plain = load(None, environ)
    environ |= {"KVTIER_NATIVE": "0", "KVTIER_FAILPOINT": "x", "KVTIER": "x", "PATH": "/bin"}
    # Kubernetes, for services called kvtier and kvtier-metrics.
    environ |= {
        "KVTIER_SERVICE_HOST": "10.0.0.1",
        "KVTIER_SERVICE_PORT_METRICS": "9470",
        "KVTIER_PORT": "tcp://10.0.0.1:9470",
        "KVTIER_PORT_9470_TCP_ADDR": "10.0.0.1",
        "KVTIER_METRICS_PORT": "tcp://10.0.0.1:9470",
    }
    assert load(None, environ) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[server]\nsokcet = 1",
            r"unknown key server\.sokcet; the nearest known is server\.socket",
        ),
        ("grace_s = 1", r"unknown key grace_s; the nearest known is server\.grace_s"),
        ("[tiers.hbm]\nsize_bytes = 1", r"unknown key tiers\.hbm; the nearest known is tiers"),
        ("[limit]\nx = 1", "unknown key limit; the nearest known is limits"),
        ("[[tenants]]\nname = 'a'\nuid = 1", r"unknown key tenants\.uid; .* tenants\.uids"),
        ("[[tenants]]\nuids = [1]", r"tenants\.name: every"),
        ("[tenants]\nname = 'a'", r"write each tenant as a table of its own, \[\[tenants\]\]"),
        ("tenants = [1]", r"\[\[tenants\]\]"),
        ("[namespaces]\nmodel = 'a'", r"write each namespace as a table of its own"),
        ("[[namespaces]]\nmodels = 'a'", r"unknown key namespaces\.models; .* namespaces\.model"),
        ("[[namespaces]]\nmodel = 3", r"namespaces\.model = 3: must be text"),
        ("[[namespaces]]\nmax_age_s = -1", r"namespaces\.max_age_s = -1: must be a number"),
        ("[[namespaces]]\nencrypt = 1", r"namespaces\.encrypt = 1: must be true or false"),
        ("[[namespaces]]\nencrypt = true", r"set encryption\.key_file or encryption\.credential"),
        ("[encryption]\nkey_file = 'key'", r"encryption\.key_file = 'key': must be an absolute"),
        ("[encryption]\nkey_file = '/k'\ncredential = 'k'", "set one of them"),
        ("[encryption]\ncredential = '../k'", "must be a name, no path"),
        ("[encryption]\nkey_file_previous = '/k'", r"needs the key of now"),
        ("server = 3", r"server = 3: must be a table, \[server\]"),
        ("[server", "kvtier.toml: "),
        ("[tiers.dram]\nsize_bytes = '10 apples'", r"tiers\.dram\.size_bytes = '10 apples'.*64MiB"),
        ("[tiers.dram]\nsize_bytes = '-1GiB'", "is not a size"),
        ("[tiers.dram]\nsize_bytes = -1", r"size_bytes = -1: must be an integer of at least 0"),
        ("[tiers.dram]\nsize_bytes = true", "size_bytes = True: must be an integer"),
        ("[tiers.dram]\nsize_bytes = 1.5", "must be an integer"),
        ("[tiers.dram]\nsize_bytes = 99999999999999999999", "must be an integer"),
        ("[tiers.dram]\nsize_bytes = '99999999999T'", "must be an integer"),
        ("[server]\nio_threads = '4'", "must be an integer"),
        ("[server]\nio_threads = 0", "from 1 to 256"),
        ("[server]\nio_threads = true", "io_threads = True: must be an integer"),
        ("[server]\nsessions_max = 0", "of at least 1"),
        ("[server]\nbypass = 1", "must be true or false"),
        ("[server]\ngrace_s = '20s'", "must be a number"),
        ("[server]\ngrace_s = true", "must be a number"),
        ("[server]\ngrace_s = nan", "must be a number"),
        ("[server]\ngrace_s = inf", "must be a number"),
        ("[server]\ngrace_s = -1", "of at least 0"),
        ("[server]\ntrust = 'open'", "must be one of isolated, single-tenant"),
        ("[server]\nlog_level = 3", "must be one of debug, info"),
        ("[server]\nallowed_uids = 3", "must be a list"),
        ("[server]\nallowed_uids = [true]", "must be a list"),
        ("[server]\nallowed_uids = [-1]", "must be a list"),
        ("[server]\nallowed_uids = []", "tenant default: has neither uids nor a socket"),
        ("[server]\nsocket = 'here.sock'", "must be an absolute path"),
        ("[server]\nsocket = '/'", "must be an absolute path"),
        ('[server]\nsocket = "/a\\u0000b"', "must be an absolute path"),
        ("[server]\nsocket = '~nobody-here/x'", r"server\.socket"),
        ("[tiers.dram]\nhigh_water = 1.1", "from 0 to 1"),
        ("[policy]\nname = 'belady'", "must be one of lru"),
        ("[metrics]\nport = 65536", "from 0 to 65535"),
        ("[metrics]\nhost = ''", "must be text"),
    ],
)
def test_bad_file(tmp_path: Path, environ: dict[str, str], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path, environ, text)
    assert raised.value.exit_status == 2


def test_unreadable_file(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml", environ)
    (tmp_path / "latin.toml").write_bytes(b"[server]\n# \xe9")
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        load(tmp_path / "latin.toml", environ)


TENANTS = "[[tenants]]\nname = 'a'\nuids = [1]\n{}\n[[tenants]]\nname = '{}'\nuids = [{}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tiers.dram]\nhigh_water = 0.5", r"tiers\.dram\.high_water = 0\.5: must be above low_"),
        ("[tiers.ssd]\nlow_water = 0.95", r"tiers\.ssd\.high_water"),
        ("[tiers.dram]\nsize_bytes = 100", "must be at least 4096"),
        (
            "[tiers.dram]\nsize_bytes = '64MiB'\nsegment_bytes = '65MiB'",
            r"segment_bytes = 68157440: must be at most tiers\.dram\.size_bytes = 67108864",
        ),
        ("[tiers.ssd]\nsegment_bytes = 5000", "must be a multiple of 4096"),
        (
            "[tiers.dram]\nsegment_bytes = 4096\nhuge_pages = 'require'",
            "must be a multiple of 2097152",
        ),
        ("[limits]\nwrite_arena_bytes = '1MiB'", r"hold one block of limits\.block_bytes_max"),
        ("[server]\nsocket = '/a'\nadmin_socket = '/a'", r"server\.socket uses /a already"),
        ("[server]\nsocket = '/a'\nadmin_socket = '/a.session'", r"uses /a\.session already"),
        (TENANTS.format("", "a", 2), "tenants.name = 'a': used twice"),
        (TENANTS.format("", "b", 1), "1 is in a and in b; give one of them a socket"),
        (TENANTS.format("", "b/c", 2), "must be 1 to 64 of"),
        ("[server]\ntrust = 'single-tenant'\n" + TENANTS.format("", "b", 2), "there are 2 tenants"),
        ("[[tenants]]\nname = 'a'", "tenant a: has neither uids nor a socket"),
        (TENANTS.format("socket = '/run/user/7/kvtier/kvtier.sock'", "b", 2), "already"),
        (TENANTS.format("dram_guaranteed_bytes = '5GiB'", "b", 2), r"tiers\.dram has 4294967296"),
        (TENANTS.format("ssd_guaranteed_bytes = '20GiB'", "b", 2), r"but tiers\.ssd has"),
        (
            "[tiers.ssd]\nenabled = false\n" + TENANTS.format("ssd_guaranteed_bytes = 1", "b", 2),
            r"all together 1, but tiers\.ssd has 0",
        ),
    ],
)
def test_contradictions(tmp_path: Path, environ: dict[str, str], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, environ, text)


def test_one_uid_in_two_tenants_is_fine_when_one_has_its_own_socket(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    config = read(tmp_path, environ, TENANTS.format("socket = '/a/k.sock'", "b", 1))
    assert [tenant.name for tenant in config.tenants] == ["a", "b"]


def test_socket_path_length_is_that_of_the_session_socket(environ: dict[str, str]) -> None:
    environ["KVTIER_SERVER_SOCKET"] = "/" + "x" * (106 - len(".session"))
    assert load(None, environ).server.socket.name.endswith("x")
    environ["KVTIER_SERVER_SOCKET"] += "y"
    with pytest.raises(ConfigError, match=r"108 bytes long with \.session, at most 107.*shorter"):
        load(None, environ)
    environ["KVTIER_SERVER_SOCKET"] = "/" + "é" * 50  # 101 bytes, 51 characters
    with pytest.raises(ConfigError, match="109 bytes"):
        load(None, environ)


def test_small_tiers_built_directly() -> None:
    tiers = TiersConfig(DramConfig(MIB), SsdConfig(8 * MIB))
    config = Config(ServerConfig(Path("/r")), StateConfig(Path("/s")), tiers)
    assert config.tiers.dram.segment_bytes == MIB
    assert config.tiers.ssd.segment_bytes == 8 * MIB
    assert config.server.socket == Path("/r/kvtier.sock")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.server.grace_s = 1.0  # type: ignore[misc]
    big = TiersConfig(DramConfig(1024 * GIB), SsdConfig(1024 * GIB))
    assert (big.dram.segment_bytes, big.ssd.segment_bytes) == (GIB, GIB)
    assert DramConfig(200 * MIB).segment_bytes == 4 * MIB


def test_changes_say_what_needs_a_restart(tmp_path: Path, environ: dict[str, str]) -> None:
    old = load(None, environ)
    assert describe_changes(old, old) == []
    new = read(
        tmp_path,
        environ,
        "[server]\ngrace_s = 1\nio_threads = 8\n[tiers.dram]\nlow_water = 0.5\n"
        "[limits]\nleases_per_session_max = 9\n[[tenants]]\nname = 'a'\nuids = [1]",
    )
    assert describe_changes(old, new) == [
        ("server.grace_s", True),
        ("server.io_threads", False),
        ("tiers.dram.low_water", True),
        ("limits.leases_per_session_max", True),
        ("tenants", False),
    ]
    mixed = with_live_changes(old, new)
    assert describe_changes(old, mixed) == [
        ("server.grace_s", True),
        ("tiers.dram.low_water", True),
        ("limits.leases_per_session_max", True),
    ]
    assert mixed.tenants == old.tenants


def test_live_keys_are_exactly_these(tmp_path: Path) -> None:
    del tmp_path
    live = {name for name, key in configuration._KEYS.items() if key.metadata.get("live")}
    assert {name for name in live if not name.startswith("limits.")} == {
        *("server.grace_s", "server.log_level", "server.bypass"),
        *("tiers.dram.high_water", "tiers.dram.low_water"),
        *("tiers.ssd.high_water", "tiers.ssd.low_water", "tiers.ssd.errors_max"),
        *("tiers.ssd.scrub_bytes_per_s", "tiers.ssd.scrub_every_s"),
        *("tiers.ssd.group_commit_s", "tiers.ssd.group_commit_bytes_max"),
        *("tiers.ssd.sync_every_s", "tiers.ssd.write_bytes_per_day_max"),
    }
    assert {n for n in configuration._KEYS if n.startswith("limits.")} <= live


def test_a_reload_does_not_follow_the_free_space(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = load(None, environ)
    monkeypatch.setattr(machine, "memory_available_bytes", lambda _: 3 * GIB)
    disk = machine.FileSystem("ext4", "/", 80 * GIB, 10 * GIB)
    monkeypatch.setattr(machine, "file_system", lambda *_: disk)
    assert describe_changes(running, load(None, environ)) != []
    assert load(None, environ, running=running) == running
    environ["KVTIER_TIERS_DRAM_SIZE_BYTES"] = "1GiB"
    assert load(None, environ, running=running).tiers.dram.size_bytes == GIB


def test_the_committed_example_is_generated_and_complete(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    text = EXAMPLE.read_text()
    assert text == example_toml(), "write it anew: kvtier.config.example_toml()"
    assert read(tmp_path, environ, text) == load(None, environ)

    every_key = tomllib.loads(re.sub(r"^# (\[\[|\w+ = )", r"\1", text, flags=re.MULTILINE))
    single = ("server", "state", "limits", "policy", "metrics", "encryption")
    expected = {f"{s}.{f.name}" for s in configuration.SECTIONS for f in _fields(s)}
    flat = {f"{s}.{k}" for s in single for k in every_key[s]}
    flat |= {f"tiers.{t}.{k}" for t in ("dram", "ssd") for k in every_key["tiers"][t]}
    assert flat == expected
    assert every_key["tenants"][0].keys() == {f.name for f in dataclasses.fields(TenantConfig)}
    assert every_key["server"]["grace_s"] == ServerConfig(Path("/r")).grace_s


def _fields(section: str) -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(configuration.SECTIONS[section])


def test_import_is_light() -> None:
    code = (
        "import sys; import kvtier.config as c; c.default_socket({}); "
        "print(sorted({'tomllib','json','tempfile','difflib','grpc','asyncio'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(EXAMPLE.parents[1])},
    )  # fmt: skip
    assert run.stdout.strip() == "[]"


def test_rules_of_namespaces(tmp_path: Path, environ: dict[str, str]) -> None:
    text = """
    [encryption]
    key_file = "/etc/key"
    [[namespaces]]
    tenant = "team-?"
    model = "secret*"
    encrypt = true
    [[namespaces]]
    tenant = "team-a"
    max_age_s = 60
    """
    config = read(tmp_path, environ, text)
    assert config.rule("team-a", "secret-1").encrypt
    assert config.rule("team-a", "secret-1").max_age_s == 0, "the first that matches, alone"
    assert not config.rule("team-a", "open").encrypt
    assert config.rule("team-a", "open").max_age_s == 60
    assert config.rule("team-b", "open") == configuration.NamespaceConfig()
    assert not config.rule("team-aa", "secret-1").encrypt
    assert read(tmp_path, environ, to_toml(config)) == config

    new = read(tmp_path, environ, text.replace("60", "30").replace("/etc/key", "/etc/other"))
    changes = dict(describe_changes(config, new))
    assert changes == {"namespaces": True, "encryption.key_file": False}
    taken = with_live_changes(config, new)
    assert taken.rule("team-a", "open").max_age_s == 30
    assert taken.encryption == config.encryption
    plain = read(tmp_path, environ, "")
    with pytest.raises(ConfigError, match="key_file"):
        with_live_changes(plain, new)
