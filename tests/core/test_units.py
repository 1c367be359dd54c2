from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core import units
from edgeopt.errors import ConfigError

SAME = [(a, b) for group in units.DIMENSIONS.values() for a in group for b in group]
DIFFERENT = [
    (a, b)
    for a in (u for group in units.DIMENSIONS.values() for u in group)
    for b in (u for group in units.DIMENSIONS.values() for u in group)
    if (a, b) not in SAME
]


@pytest.mark.parametrize(
    ("text", "to", "expected"),
    [
        ("3 GiB", "MiB", 3072.0),
        ("3GiB", "B", 3 * 1024**3),
        ("1 GB", "B", 10**9),
        ("100 ms", "s", 0.1),
        ("1.5 s", "ms", 1500.0),
        ("250 us", "ms", 0.25),
        ("5000 mW", "W", 5.0),
        ("1.05", "", 1.05),
        (1.05, "", 1.05),
        ("5 %", "", 0.05),
        (".5", "", 0.5),
        ("1e3 B", "kB", 1.0),
        ("0.02", "nats", 0.02),
        ("  7  count ", "count", 7.0),
    ],
)
def test_quantity_is_converted_to_requested_unit(text: str | float, to: str, expected: float) -> None:
    assert units.parse(text, to) == pytest.approx(expected, rel=1e-12)


@given(value=st.floats(1e-6, 1e6), pair=st.sampled_from(SAME))
def test_conversion_round_trip_preserves_value(value: float, pair: tuple[str, str]) -> None:
    there = units.convert(value, pair[0], pair[1])
    assert units.convert(there, pair[1], pair[0]) == pytest.approx(value, rel=1e-12)


@given(value=st.floats(1e-6, 1e6), pair=st.sampled_from([p for p in SAME if p[0]]))
def test_written_quantity_is_parsed(value: float, pair: tuple[str, str]) -> None:
    assert units.parse(f"{value!r} {pair[0]}", pair[1]) == pytest.approx(units.convert(value, *pair), rel=1e-12)


@given(pair=st.sampled_from(DIFFERENT))
def test_dimensions_are_never_mixed(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError):
        units.convert(1.0, *pair)


@pytest.mark.parametrize("to", ["MiB", "s", "W", "J", "tokens/s", "°C"])
def test_plain_number_without_unit_is_rejected(to: str) -> None:
    with pytest.raises(ConfigError, match=r"must have a unit, got '100'\. Use a number with "):
        units.parse("100", to)


@pytest.mark.parametrize("text", ["", "many", "3 GiB 2", "1,5 GiB", "nan", "inf s", "None", "--3 s", "3 s s"])
def test_invalid_quantity_is_shown_in_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        units.parse(text, "s")
    assert repr(text) in str(caught.value)
    assert caught.value.hint


def test_unknown_unit_differs_from_wrong_dimension() -> None:
    with pytest.raises(ConfigError, match=r"must have a known unit, got '3 gib'\. Did you mean 3 GiB\?"):
        units.parse("3 gib", "MiB")
    with pytest.raises(ConfigError, match="must have a unit of size, got '3 ms' with a unit of time"):
        units.parse("3 ms", "MiB")


@given(text=st.text(max_size=20), to=st.sampled_from(["MiB", "s", "", "count"]))
def test_any_text_parses_or_raises_config_error(text: str, to: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(units.parse(text, to), float)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234.56, "MiB", "1235 MiB"),
        (0.123456, "s", "0.1235 s"),
        (1.05, "", "1.05"),
        (0.0, "W", "0 W"),
        (-2.5, "°C", "-2.5 °C"),
    ],
)
def test_quantity_is_formatted_with_few_digits(value: float, unit: str, text: str) -> None:
    assert units.format_quantity(value, unit) == text
