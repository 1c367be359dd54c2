"""Quantities with units: parsed from configs, checked against a metric's unit, printed for people."""

from __future__ import annotations

import re

from edgeopt.errors import ConfigError

# dimension -> unit -> how many base units it holds; the first unit of a dimension is its base
DIMENSIONS: dict[str, dict[str, float]] = {
    "bytes": {
        "B": 1,
        "kB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
    },
    "time": {"s": 1, "ms": 1e-3, "us": 1e-6, "min": 60, "h": 3600},
    "power": {"W": 1, "mW": 1e-3},
    "energy": {"J": 1, "mJ": 1e-3, "kJ": 1e3, "Wh": 3600, "kWh": 3.6e6},
    "rate": {"tokens/s": 1},
    "temperature": {"°C": 1},
    "ratio": {"": 1, "%": 0.01},
    "nats": {"nats": 1},
    "count": {"count": 1},
}
_DIMENSION_OF = {unit: dimension for dimension, units in DIMENSIONS.items() for unit in units}
_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z%°/]*)\s*")


def dimension_of(unit: str) -> str:
    """The dimension that a unit belongs to; KeyError for a unit that does not exist."""
    return _DIMENSION_OF[unit]


def convert(value: float, unit: str, to: str) -> float:
    """`value` of `unit` in the unit `to`; ConfigError where the two measure different things."""
    if dimension_of(unit) != dimension_of(to):
        raise ConfigError(f"{unit or 'a plain number'} cannot be given in {to or 'a plain number'}")
    units = DIMENSIONS[dimension_of(unit)]
    return value * units[unit] / units[to]


def parse(text: str | float, to: str) -> float:
    """A quantity such as `3 GiB`, `100 ms` or `1.05` as a number of the unit `to`.

    A plain number is accepted for ratios and counts alone: a limit in bytes or seconds names its unit.
    """
    match = _QUANTITY.fullmatch(str(text))
    known = ", ".join(u for u in DIMENSIONS[dimension_of(to)] if u)
    wanted = f"Give it as a number and one of: {known}" if known else "Give a plain number"
    if not match:
        raise ConfigError(f"{text!r} is not a quantity", hint=wanted)
    number, unit = float(match[1]), match[2]
    if unit == "" and dimension_of(to) not in ("ratio", "count", "nats"):
        raise ConfigError(f"{text!r} has no unit", hint=wanted)
    if unit == "":
        return number
    if unit not in _DIMENSION_OF:
        raise ConfigError(f"{text!r} has the unknown unit {unit!r}", hint=wanted)
    if dimension_of(unit) != dimension_of(to):
        raise ConfigError(f"{text!r} is a {dimension_of(unit)}, not a {dimension_of(to)}", hint=wanted)
    return convert(number, unit, to)


def size_bytes(text: str | float, location: str) -> int:
    """A size such as `5 GiB` in whole bytes. ConfigError with `place` for what is no size, or is below zero."""
    try:
        found = parse(text, "B")
    except ConfigError as error:
        raise error.at(location) from error
    if found < 0:
        raise ConfigError(f"{text!r} is below zero", location=location, hint="Give 0 B or more")
    return int(found)


def show(value: float, unit: str) -> str:
    """A figure for people: three or four significant digits and its unit."""
    digits = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {unit}".rstrip()
