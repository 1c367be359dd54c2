"""Parse quantities with units from configs, convert them and format them for people."""

from __future__ import annotations

import re

from edgeopt.errors import ConfigError

DIMENSIONS: dict[str, dict[str, float]] = {
    "size": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "time": {"s": 1, "ms": 1e-3, "us": 1e-6, "min": 60, "h": 3600},
    "power": {"W": 1, "mW": 1e-3},
    "energy": {"J": 1, "mJ": 1e-3, "kJ": 1e3, "Wh": 3600, "kWh": 3.6e6},
    "rate": {"tokens/s": 1},
    "temperature": {"°C": 1},
    "ratio": {"": 1, "%": 0.01},
    "nats": {"nats": 1},
    "count": {"count": 1},
}
"""Value of each unit in base units, by dimension. The first unit of a dimension is its base unit."""
_DIMENSION_OF = {unit: dimension for dimension, units in DIMENSIONS.items() for unit in units}
_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z%°/]*)\s*")
_UNIT_IS_OPTIONAL = ("ratio", "count", "nats")


def dimension_of(unit: str) -> str:
    """Return the dimension of a unit. Raises KeyError for an unknown unit."""
    return _DIMENSION_OF[unit]


def convert(value: float, unit: str, to: str) -> float:
    """Convert `value` from `unit` to the unit `to`. Raises ConfigError if the dimensions differ."""
    if dimension_of(unit) != dimension_of(to):
        raise ConfigError(f"cannot convert {unit or 'a plain number'} to {to or 'a plain number'}")
    units = DIMENSIONS[dimension_of(unit)]
    return value * units[unit] / units[to]


def parse(text: str | float, to: str) -> float:
    """Parse a quantity such as `3 GiB`, `100 ms` or `1.05` and return its value in the unit `to`.

    Only ratios, counts and nats may omit the unit.

    Raises:
        ConfigError: the text is not a quantity, or its unit is missing, unknown or of another dimension.
    """
    dimension = dimension_of(to)
    units = [unit for unit in DIMENSIONS[dimension] if unit]
    optional = dimension in _UNIT_IS_OPTIONAL
    example = "0.5" if optional else f"3 {to}"
    unit_list = f"one of the units {', '.join(units)}" if len(units) > 1 else f"the unit {units[0]}"
    hint = f"Use a number {'alone or ' if optional else ''}with {unit_list}, for example {example}"
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise ConfigError(f"the value must be a quantity, got {text!r}", hint=hint)
    number, unit = float(match[1]), match[2]
    if unit == "":
        if not optional:
            raise ConfigError(f"the value must have a unit, got {text!r}", hint=hint)
        return number
    if unit not in _DIMENSION_OF:
        similar = next((known for known in units if known.lower() == unit.lower()), None)
        suggestion = f"Did you mean {match[1]} {similar}? " if similar else ""
        raise ConfigError(f"the value must have a known unit, got {text!r}", hint=suggestion + hint)
    if dimension_of(unit) != dimension:
        raise ConfigError(
            f"the value must have a unit of {dimension}, got {text!r} with a unit of {dimension_of(unit)}", hint=hint
        )
    return convert(number, unit, to)


def size_bytes(text: str | float, location: str) -> int:
    """Parse a size such as `5 GiB` and return whole bytes.

    Raises:
        ConfigError: the text is not a size or the size is negative. The error has this `location`.
    """
    try:
        size = parse(text, "B")
    except ConfigError as error:
        raise error.at(location) from error
    if size < 0:
        raise ConfigError(f"the size must not be negative, got {text!r}", location=location, hint="Use 0 B or more")
    return int(size)


def format_quantity(value: float, unit: str) -> str:
    """Format a value with its unit: four significant digits, no decimals from 1000 on, and no unit for counts."""
    if unit == "count":
        return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    digits = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {unit}".rstrip()
