from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.tracking import fields


@pytest.mark.parametrize(
    ("config", "flat"),
    [
        ({"a": {"b": 1, "c": {"d": None}}}, {"a.b": "1", "a.c.d": "null"}),
        ({"a": [1, 2.5, "x"]}, {"a": '[1, 2.5, "x"]'}),
        ({"a": [{"b": True}, {"b": False}]}, {"a.0.b": "true", "a.1.b": "false"}),
        ({}, {}),
        ({"a": {}, "b": []}, {"a": "{}", "b": "[]"}),
        ({"a": "plain", "b": "µ"}, {"a": "plain", "b": "µ"}),
    ],
)
def test_flatten(config: dict[str, Any], flat: dict[str, str]) -> None:
    assert fields.flatten(config) == flat


@given(st.dictionaries(st.text(string.printable, min_size=1, max_size=400), st.text(max_size=50), max_size=4))
def test_params_fit_into_mlflow(values: dict[str, str]) -> None:
    from mlflow.utils.validation import _validate_param

    kept, _ = fields.params(values)
    for key, value in kept.items():
        _validate_param(key, value)


def test_long_names_stay_apart() -> None:
    kept, _ = fields.params({"a" * 300 + "1": "x", "a" * 300 + "2": "y"})
    assert len(kept) == 2
    assert all(len(name) <= fields.KEY_LENGTH for name in kept)


def test_plain_is_strict_json() -> None:
    assert fields.plain({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": ["nan", 1.0, ["inf"]]}
