"""Keys of a configuration: their documentation, their rules, and text or TOML values into Python.

Does not: know any key of kvtier. `config.py` declares them with `key` and `about`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError
from kvtier.units import format_bytes, parse_bytes

_INTEGER_MAX = 2**63 - 1
_BOOLEANS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


def about(doc: str, **rules: Any) -> dict[str, Any]:
    """A field's metadata. Rules: live, low, high, choices, shown (what the example shows).

    Without `low`, a key that ends in `_max` is at least 1 and every other number at least 0.
    """
    return {"doc": doc, **rules}


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A field with this default, or with what this function returns."""
    if callable(default):
        return field(default_factory=default, metadata=about(doc, **rules))
    return field(default=default, metadata=about(doc, **rules))


def flatten(table: Mapping[str, Any], tables: set[str], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; only the names in `tables` are entered."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        dotted = prefix + name
        if isinstance(value, dict) and dotted in tables:
            flat.update(flatten(value, tables, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def part(flat: Mapping[str, Any], section: str) -> dict[str, Any]:
    """What lies under `section.` in dotted keys, by its own name."""
    start = f"{section}."
    return {name.removeprefix(start): flat[name] for name in flat if name.startswith(start)}


def unknown(name: str, known: list[str]) -> ConfigError:
    """The error for a name that is no key, with the nearest that is."""
    import difflib

    same_end = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(name, same_end or known, n=1, cutoff=0)
    return ConfigError(f"unknown key {name}; the nearest known is {nearest[0]}")


def from_text(declared: dataclasses.Field[Any], text: str) -> Any:
    """An environment value as TOML would have given it; what does not fit stays text."""
    kind = str(declared.type)
    try:
        if kind == "bool":
            return _BOOLEANS.get(text.strip().lower(), text)
        if kind.startswith("tuple"):
            return [int(number) for number in text.split(",") if number.strip()]
        if kind.startswith("int"):
            return int(text)
        return float(text) if kind == "float" else text
    except ValueError:
        return text


def parse(declared: dataclasses.Field[Any], value: Any, name: str) -> Any:
    """`value` as this field's type and within its rules.

    Raises:
        ConfigError: names `name`, the value and what is accepted.
    """
    kind = str(declared.type).removesuffix(" | None")
    accepted, convert = _KINDS[kind]
    accepted = f"{accepted} {_bounds(declared)}" if kind in ("int", "float") else accepted
    choices = declared.metadata.get("choices")
    try:
        result = convert(declared, value)
    except (ValueError, OverflowError) as error:
        accepted = "one of " + ", ".join(choices) if choices else accepted
        raise ConfigError(f"{name} = {value!r}: {str(error) or f'must be {accepted}'}") from None
    return result


def is_bytes(declared: dataclasses.Field[Any]) -> bool:
    """Whether the key is a size, and so may be written like "64MiB"."""
    return "bytes" in declared.name.split("_")


def toml_value(value: Any) -> str:
    """A value in TOML's notation."""
    import json  # not for clients, which only ask for a socket

    plain = list(value) if isinstance(value, tuple) else value
    plain = str(plain) if isinstance(plain, Path) else plain
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_lines(section: Any) -> Iterator[str]:
    """One `key = value` per key of the dataclass instance that has a value."""
    for declared in dataclasses.fields(section):
        value = getattr(section, declared.name)
        if value is not None:
            note = f"  # {format_bytes(value)}" if is_bytes(declared) and value >= 1024 else ""
            yield f"{declared.name} = {toml_value(value)}{note}"


def example_lines(section: type) -> Iterator[str]:
    """One commented line per key of the dataclass: default or `shown`, documentation, rules."""
    for declared in dataclasses.fields(section):
        rules = declared.metadata
        value = rules.get("shown", declared.default)
        notes = [rules["doc"], " | ".join(rules.get("choices", ())), "(live)" * ("live" in rules)]
        size = f'"{format_bytes(value)}"' if is_bytes(declared) and value else toml_value(value)
        yield f"# {declared.name} = {size}  # {' '.join(filter(None, notes))}"


def _bounds(declared: dataclasses.Field[Any]) -> str:
    low, high = _low_high(declared)
    return f"from {low} to {high}" if high not in (math.inf, _INTEGER_MAX) else f"of at least {low}"


def _low_high(declared: dataclasses.Field[Any]) -> tuple[float, float]:
    least = 1 if declared.name.endswith("_max") else 0
    most = math.inf if declared.type == "float" else _INTEGER_MAX
    return declared.metadata.get("low", least), declared.metadata.get("high", most)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _bool(_: dataclasses.Field[Any], value: Any) -> bool:
    _require(isinstance(value, bool))
    return bool(value)


def _int(declared: dataclasses.Field[Any], value: Any) -> int:
    number = parse_bytes(value) if isinstance(value, str) and is_bytes(declared) else value
    _require(isinstance(number, int) and not isinstance(number, bool))
    low, high = _low_high(declared)
    _require(low <= number <= high)
    return int(number)


def _float(declared: dataclasses.Field[Any], value: Any) -> float:
    _require(isinstance(value, int | float) and not isinstance(value, bool))
    low, high = _low_high(declared)
    _require(low <= value <= high and math.isfinite(value))
    return float(value)


def _str(declared: dataclasses.Field[Any], value: Any) -> str:
    _require(isinstance(value, str) and value != "")
    _require(value in (declared.metadata.get("choices") or (value,)))
    return str(value)


def _path(_: dataclasses.Field[Any], value: Any) -> Path:
    _require(isinstance(value, str) and "\0" not in value)
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise ValueError(str(error)) from error
    _require(path.is_absolute())
    return path


def _ints(declared: dataclasses.Field[Any], value: Any) -> tuple[int, ...]:
    _require(isinstance(value, list))
    return tuple(_int(declared, number) for number in value)


_Converter = Callable[[dataclasses.Field[Any], Any], Any]
_KINDS: dict[str, tuple[str, _Converter]] = {
    "bool": ("true or false", _bool),
    "int": ("an integer", _int),
    "float": ("a number", _float),
    "str": ("text", _str),
    "Path": ("an absolute path", _path),
    "tuple[int, ...]": ("a list of non-negative integers (user ids)", _ints),
}
