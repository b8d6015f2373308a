"""What importing the client costs an engine's process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from daemons import ENVIRONMENT, Daemon

HEAVY = ("torch", "numpy", "cupy", "grpc", "lmdb", "uvloop")


def said(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return answer.stdout.strip()


@pytest.mark.parametrize("name", ["kvtier", "kvtier.client", "kvtier.client.admin"])
def test_import_is_light(name: str) -> None:
    code = f"import sys, {name}; print([m for m in {HEAVY} if m in sys.modules])"
    assert said(code) == "[]"


def test_making_a_client_loads_no_arrays_library() -> None:
    code = (
        "import sys; from kvtier.client import Client; Client('/nowhere'); "
        "print([m for m in ('torch', 'numpy', 'cupy') if m in sys.modules])"
    )
    assert said(code) == "[]"


def test_the_client_works_where_no_arrays_library_is_installed(daemon: Daemon) -> None:
    """As in an image that has only what `pip install kvtier` brings."""
    code = """
import sys
for name in ("torch", "numpy", "cupy", "transformers", "zstandard"):
    sys.modules[name] = None  # importing it raises ImportError
from daemons import FORMAT, holds, keys_of, stored
from kvtier.client import Client
with Client(sys.argv[1], deadline_s=5) as client:
    space = client.open_namespace(model="light", format=FORMAT)
    print(holds(stored(space, keys_of("light", 3)), keys_of("light", 3)))
"""
    assert said(code, daemon.socket) == "True"
