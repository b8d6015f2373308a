"""Row: one measured figure, its limit of the same run, and the bar it is held to.

A bar is text, `value <= 150` or `ratio >= 0.9`: which of the row's two numbers is judged, and how.
Does not: measure.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

FIELDS: Final = ("bench", "case", "value", "unit", "limit", "ratio", "bar", "ok")
_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {"<=": operator.le, ">=": operator.ge}
_DIGITS: Final = 4


@dataclass(frozen=True, slots=True)
class Row:
    """`value` and `limit` are in `unit`; `ratio` is value / limit; None where there is none."""

    bench: str
    case: str
    value: float
    unit: str
    limit: float | None = None
    ratio: float | None = None
    bar: str | None = None
    ok: bool | None = None

    @classmethod
    def of(
        cls,
        bench: str,
        case: str,
        value: float,
        unit: str,
        *,
        limit: float | None = None,
        bar: str | None = None,
    ) -> Row:
        """The row, with ratio and verdict. Raises ValueError for a bar not so written."""
        ratio = value / limit if limit else None
        ok = None if bar is None else _holds(bar, {"value": value, "ratio": ratio})
        return cls(bench, case, _short(value), unit, _shorter(limit), _shorter(ratio), bar, ok)

    def plain(self) -> dict[str, Any]:
        """As JSON wants it, in the order of `FIELDS`."""
        return asdict(self)


def _holds(bar: str, numbers: dict[str, float | None]) -> bool:
    name, sign, bound = bar.split()
    judged = numbers[name]
    if judged is None:
        raise ValueError(f"the bar {bar!r} judges a number that was not measured")
    return _COMPARE[sign](judged, float(bound))


def _short(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}") if abs(number) < 10**_DIGITS else round(number)


def _shorter(number: float | None) -> float | None:
    return None if number is None else _short(number)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, which is readable in a terminal too."""
    head = ("bench", "case", "value", "unit", "limit", "ratio", "bar", "ok")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "" if row.ok is None else "yes" if row.ok else "NO"
    numbers = ["" if n is None else f"{n:g}" for n in (row.value, row.limit, row.ratio)]
    return (
        row.bench, row.case, numbers[0], row.unit, numbers[1], numbers[2], row.bar or "", verdict,
    )  # fmt: skip
