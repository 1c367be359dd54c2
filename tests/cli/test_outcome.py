"""Check the JSON documents that commands print on stdout."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.cli.commands.outcome import format_json

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(document=st.dictionaries(st.text(), VALUES))
def test_document_survives_json(document: dict[str, Any]) -> None:
    assert json.loads(format_json(document)) == document


def test_list_entries_take_one_line_each() -> None:
    assert format_json({"study": "s", "trials": [{"number": 0}, {"number": 1}], "front": []}).splitlines() == [
        "{",
        ' "study": "s",',
        ' "trials": [',
        '  {"number": 0},',
        '  {"number": 1}',
        " ],",
        ' "front": []',
        "}",
    ]


def test_nan_is_rejected() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        format_json({"value": float("nan")})
