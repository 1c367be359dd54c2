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
def test_a_quantity_is_given_in_the_unit_asked_for(text: str | float, to: str, expected: float) -> None:
    assert units.parse(text, to) == pytest.approx(expected, rel=1e-12)


@given(value=st.floats(1e-6, 1e6), pair=st.sampled_from(SAME))
def test_converting_there_and_back_changes_nothing(value: float, pair: tuple[str, str]) -> None:
    there = units.convert(value, pair[0], pair[1])
    assert units.convert(there, pair[1], pair[0]) == pytest.approx(value, rel=1e-12)


@given(value=st.floats(1e-6, 1e6), pair=st.sampled_from([p for p in SAME if p[0]]))
def test_what_is_written_with_a_unit_is_read_with_it(value: float, pair: tuple[str, str]) -> None:
    assert units.parse(f"{value!r} {pair[0]}", pair[1]) == pytest.approx(units.convert(value, *pair), rel=1e-12)


@given(pair=st.sampled_from(DIFFERENT))
def test_different_dimensions_are_never_mixed(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError):
        units.convert(1.0, *pair)


@pytest.mark.parametrize("to", ["MiB", "s", "W", "J", "tokens/s", "°C"])
def test_a_plain_number_is_refused_where_a_unit_matters(to: str) -> None:
    with pytest.raises(ConfigError, match=r"'100' has no unit.*one of"):
        units.parse("100", to)


@pytest.mark.parametrize("text", ["", "many", "3 GiB 2", "1,5 GiB", "nan", "inf s", "None", "--3 s", "3 s s"])
def test_what_is_no_quantity_is_refused_with_the_value_received(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        units.parse(text, "s")
    assert repr(text) in str(caught.value)
    assert caught.value.hint


def test_an_unknown_unit_and_another_dimension_are_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"unknown unit 'gib'.*GiB"):
        units.parse("3 gib", "MiB")
    with pytest.raises(ConfigError, match="is a time, not a bytes"):
        units.parse("3 ms", "MiB")


@given(text=st.text(max_size=20), to=st.sampled_from(["MiB", "s", "", "count"]))
def test_any_text_is_a_number_or_a_config_error(text: str, to: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(units.parse(text, to), float)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1234.56, "MiB", "1235 MiB"),
        (0.123456, "s", "0.1235 s"),
        (1.05, "", "1.05"),
        (0.0, "W", "0 W"),
        (-2.5, "°C", "-2.5 °C"),
    ],
)
def test_figures_are_shown_with_few_digits_and_their_unit(value: float, unit: str, shown: str) -> None:
    assert units.show(value, unit) == shown
