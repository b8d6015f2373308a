"""Says with every failure how to have it again."""

from __future__ import annotations

import faulthandler
from collections.abc import Generator
from typing import Any

import pytest
from chaos_plan import command_of


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        part = item.path.stem.removeprefix("test_")
        report.sections.append(("to have it again", f"{command_of(part)} -- -k {item.name!r}"))
    return report


@pytest.fixture(autouse=True)
def _may_be_long() -> None:
    """No stacks after two minutes: these tests watch over their own children."""
    faulthandler.cancel_dump_traceback_later()
