"""The shape of the code, checked like any other behaviour (after TigerBeetle's src/tidy.zig).

Every rule is a function of a file's path and text that returns what it found, so that the last
tests can show each of them a planted violation.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent / "kvtier"
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
# A ratchet: what is longer today may shrink, never grow. Lower the number when it does.
LONGER_FILES: dict[str, int] = {
    "block.py": 487,
    "keeper.py": 553,
    "ledger/ledger.py": 663,
    "ledger/moves.py": 417,
    "store.py": 783,
}

# A unit may import itself, and only what is listed here. Read it top-down: nothing points down.
LEAVES = {"errors", "units", "machine", "settings", "sections", "config", "findings", "native",
          "block", "counts", "metrics"}  # fmt: skip
LAYERS: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "units": {"errors"},
    "machine": {"errors", "units"},
    "settings": {"errors", "units"},
    "sections": {"errors", "machine", "settings", "units"},
    "config": {"errors", "machine", "sections", "settings", "units"},
    "findings": {"config", "errors", "machine", "units"},
    "native": {"errors"},
    "block": {"errors", "units"},
    "counts": {"block"},
    "metrics": {"counts", "errors", "units"},
    # Named places where a chaos test may stop the daemon: the one part of testing/ that is a leaf.
    "failpoints": set(),
    "v1": set(),
    "wire": {"block", "errors", "v1"},
    # Ledger, tiers and codec do not know each other.
    "ledger": {"block", "errors", "units"},
    "tiers": {"block", "errors", "failpoints", "machine", "native", "units"},
    "codec": {"block", "errors", "native", "units"},
    "transfer": {"block", "codec", "errors", "failpoints", "native", "tiers", "units"},
    "state_findings": {"config", "findings", "machine", "tiers", "units"},
    # The store and what it is made of: where deciding meets doing.
    "session": {"tiers"},
    "progress": {"block", "ledger"},
    "recycling": {"ledger", "session", "tiers"},
    "tally": {"block", "counts", "errors", "ledger", "session", "tiers", "transfer"},
    "rules": {"block", "config", "errors"},
    "ageing": {"config", "ledger", "units"},
    "recovering": {"block", "errors", "failpoints", "ledger", "tally", "tiers", "units"},
    "durability": {"block", "errors", "failpoints", "ledger", "progress", "recovering", "tiers",
                   "transfer", "units"},
    "health": {"block", "errors", "ledger", "tiers", "units"},
    "housekeeping": {"block", "ledger", "sections", "tiers", "units"},
    "scrub_reading": {"block", "errors", "failpoints", "ledger", "native", "tally", "tiers",
                      "units"},
    "scrubbing": {"block", "counts", "errors", "health", "ledger", "recovering", "scrub_reading",
                  "tally", "tiers", "units"},
    "resizing": {"block", "errors", "failpoints", "health", "ledger", "native", "progress",
                 "recovering", "scrub_reading", "scrubbing", "sections", "tiers", "units"},
    "erasing": {"block", "errors", "failpoints", "ledger", "progress", "recovering", "tiers",
                "units"},
    "purging": {"block", "erasing", "errors", "failpoints", "ledger", "progress", "recovering",
                "scrubbing", "session", "tiers", "units"},
    "keeper": {"ageing", "block", "config", "counts", "durability", "erasing", "errors",
               "failpoints", "health", "housekeeping", "ledger", "native", "progress", "purging",
               "recovering", "recycling", "resizing", "rules", "scrubbing", "sections",
               "session", "tally", "tiers", "transfer", "units"},
    "accounts": {"block", "counts", "keeper", "native", "session", "tally", "tiers"},
    "store": {"accounts", "block", "config", "counts", "errors", "failpoints", "keeper", "ledger",
              "purging", "session", "tally", "tiers", "units"},
    "server": LEAVES | {"rules", "session", "store", "tiers", "v1", "wire"},
    # A client maps arenas and reads the configured socket path; it never sees the ledger.
    "client": {"block", "config", "errors", "sections", "tiers", "units", "v1", "wire"},
    "connectors": {"block", "client", "codec", "errors", "transfer", "units"},
    "testing": LEAVES | {"codec", "ledger", "tiers", "transfer"},
    "cli": LEAVES | {"client", "connectors", "server", "state_findings", "testing"},
    "__main__": {"cli"},
}  # fmt: skip
# The ledger decides; it must be able to run inside a property test with no clock and no loop.
LEDGER_BANNED = {"asyncio", "grpc", "lmdb", "os", "threading", "time", "torch"}
# Words that may not reach main.
BANNED_WORDS = ("FIX" + "ME", "XX" + "X", "breakpoint" + "(", "except " + "Exception: pass")
# Names that say nothing (style 7.1, rule 3).
BANNED_FILES = {"manager", "managers", "util", "utils", "common", "helper", "helpers", "misc"}
# What `import kvtier` must not load.
HEAVY = ("torch", "cupy", "numpy", "grpc", "lmdb")

FILES = sorted(path for path in ROOT.rglob("*.py") if "v1" not in path.relative_to(ROOT).parts)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unit_of(name: str) -> str:
    return PurePosixPath(name).parts[0].removesuffix(".py")


def imports_of(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def lines_of(text: str) -> int:
    """How long it is; places where a chaos test may stop the process do not count."""
    failpoint = re.compile(r"^ *(?:reach\(|from kvtier\.testing\.failpoints)", re.MULTILINE)
    return text.count("\n") - len(failpoint.findall(text))


def untidy(name: str, text: str) -> list[str]:
    """What is wrong with the file's size, names and words (an empty file says nothing)."""
    tree, found = ast.parse(text), []
    if text and not ast.get_docstring(tree):
        found.append("no docstring: a module opens with one sentence saying what it is for")
    lines, lines_max = lines_of(text), LONGER_FILES.get(name, FILE_LINES_MAX)
    if lines > lines_max:
        found.append(f"{lines} lines, {lines_max} allowed")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                found.append(f"{node.name} has {length} lines")
    found.extend(f"the word {word!r}" for word in BANNED_WORDS if word in text)
    if PurePosixPath(name).stem in BANNED_FILES:
        found.append("a name that says nothing")
    return found


def against_layers(name: str, text: str) -> list[str]:
    """Imports that point up, sideways, or out of the ledger's pure world."""
    unit, imports = unit_of(name), imports_of(ast.parse(text))
    if unit not in LAYERS:
        return [f"{unit} has no place in LAYERS"]
    inside = {i.removeprefix("kvtier.") for i in imports if i.startswith("kvtier.")}
    inside = {i.removeprefix("testing.") if "failpoints" in i else i for i in inside}
    used = {i.split(".")[0] for i in inside} & LAYERS.keys()
    found = [f"{unit} imports {other}" for other in sorted(used - {unit} - LAYERS[unit])]
    if unit == "ledger":
        banned = {i.split(".")[0] for i in imports} & LEDGER_BANNED
        found.extend(f"the ledger imports {module}" for module in sorted(banned))
    return found


@pytest.mark.parametrize("path", FILES, ids=named)
def test_file_is_tidy(path: Path) -> None:
    assert untidy(named(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_follow_the_layers(path: Path) -> None:
    assert against_layers(named(path), path.read_text()) == []


def test_layers_have_no_cycle() -> None:
    below: set[str] = set()
    for unit, allowed in LAYERS.items():
        assert allowed <= below, f"{unit} is listed above {allowed - below}, which it may import"
        below.add(unit)


def test_longer_files_are_longer() -> None:
    """An exception that is not needed any longer is taken back."""
    for name, lines_max in LONGER_FILES.items():
        assert FILE_LINES_MAX < lines_of((ROOT / name).read_text()) <= lines_max, name


def test_importing_kvtier_loads_nothing_heavy() -> None:
    code = f"import sys, kvtier; print([m for m in {HEAVY!r} if m in sys.modules])"

    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=ROOT.parent,
    )  # fmt: skip

    assert out.stdout.strip() == "[]"


# --- each rule is shown a violation


GOOD = '"""Does one thing."""\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n", "no docstring"),
        (GOOD + "x = 1\n" * FILE_LINES_MAX, "lines, 400 allowed"),
        (GOOD + "def long():\n" + "    x = 1\n" * FUNCTION_LINES_MAX, "long has 71 lines"),
        (GOOD + "# FIX" + "ME later\n", "the word"),
        (GOOD + "break" + "point()\n", "the word"),
    ],
)
def test_untidy_is_caught(text: str, complaint: str) -> None:
    assert any(complaint in found for found in untidy("ledger/planted.py", text))


def test_a_name_that_says_nothing_is_caught() -> None:
    assert untidy("ledger/utils.py", GOOD) == ["a name that says nothing"]


def test_a_longer_file_may_not_grow() -> None:
    for name, lines_max in LONGER_FILES.items():
        assert untidy(name, GOOD + "x = 1\n" * (lines_max - 1)) == []
        assert untidy(name, GOOD + "x = 1\n" * lines_max) == [
            f"{lines_max + 1} lines, {lines_max} allowed"
        ]


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("ledger/planted.py", "from kvtier.tiers.base import Tier", "ledger imports tiers"),
        ("tiers/planted.py", "from kvtier.ledger.ledger import Ledger", "tiers imports ledger"),
        ("tiers/planted.py", "from kvtier import store", "tiers imports store"),
        (
            "tiers/planted.py",
            "from kvtier.testing.faults import FaultyTier",
            "tiers imports testing",
        ),
        ("client/planted.py", "import kvtier.ledger.slots", "client imports ledger"),
        ("ledger/planted.py", "import asyncio", "the ledger imports asyncio"),
        ("ledger/planted.py", "from time import monotonic", "the ledger imports time"),
        ("ledger/planted.py", "def late():\n    import torch", "the ledger imports torch"),
        ("novel/planted.py", "", "novel has no place in LAYERS"),
    ],
)
def test_a_broken_layer_is_caught(name: str, line: str, complaint: str) -> None:
    assert against_layers(name, f"{GOOD}{line}\n") == [complaint]


def test_a_clean_file_is_clean() -> None:
    assert untidy("ledger/planted.py", GOOD) == []
    assert against_layers("ledger/planted.py", GOOD + "from kvtier.block import Keys\n") == []
