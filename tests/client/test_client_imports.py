"""What importing the client costs an engine's process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "cupy", "grpc", "lmdb", "uvloop")


@pytest.mark.parametrize("name", ["kvtier", "kvtier.client", "kvtier.client.admin"])
def test_import_is_light(name: str) -> None:
    code = f"import sys, {name}; print([m for m in {HEAVY} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_making_a_client_loads_no_arrays_library() -> None:
    code = (
        "import sys; from kvtier.client import Client; Client('/nowhere'); "
        "print([m for m in ('torch', 'numpy', 'cupy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
