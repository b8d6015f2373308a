"""What importing the client costs an engine's process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "cupy", "grpc", "lmdb", "uvloop")


def said(code: str) -> str:
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
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
