"""A quick run of two benches makes rows as promised; nothing here judges a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.row import FIELDS, Row, table


@pytest.mark.parametrize("name", ["idle", "lease"])
def test_quick_run_makes_valid_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([name, "--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows
    for row in rows:
        assert tuple(row) == FIELDS
        assert row["bench"] == name
        assert row["case"]
        assert row["value"] >= 0
        assert row["unit"]
        assert (row["ratio"] is None) == (row["limit"] is None)
        assert (row["ok"] is None) == (row["bar"] is None)
    assert len({row["case"] for row in rows}) == len(rows)


def test_nothing_given_lists_every_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    listed = [line.split(" ", 1)[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(command.BENCHES)


def test_bars_judge_value_or_ratio() -> None:
    assert Row.of("b", "c", 2.0, "s", bar="value <= 2").ok is True
    assert Row.of("b", "c", 9.0, "GB/s", limit=10.0, bar="ratio >= 0.9").ok is True
    assert Row.of("b", "c", 8.0, "GB/s", limit=10.0, bar="ratio >= 0.9").ok is False
    assert Row.of("b", "c", 8.0, "GB/s").ok is None
    with pytest.raises(ValueError, match="not measured"):
        Row.of("b", "c", 8.0, "GB/s", bar="ratio >= 0.9")


def test_results_are_written_with_their_machine(tmp_path: Path) -> None:
    rows = [Row.of("b", "c", 2.0, "s", limit=1.0, bar="value <= 1")]
    path = command.write(rows, {"cores": 2, "cpu": "some"}, tmp_path)
    content = json.loads(path.read_text())
    assert content["machine"]["cpu"] == "some"
    assert content["rows"] == [rows[0].plain()]
    assert table(rows) in path.with_suffix(".md").read_text()
    assert "NO" in table(rows)
