"""Documents of commands as they stand on stdout."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.cli.commands.outcome import written

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(document=st.dictionaries(st.text(), VALUES))
def test_it_is_read_back_as_it_was(document: dict[str, Any]) -> None:
    assert json.loads(written(document)) == document


def test_entries_of_a_list_stand_in_a_line_each() -> None:
    assert written({"study": "s", "trials": [{"number": 0}, {"number": 1}], "front": []}).splitlines() == [
        "{",
        ' "study": "s",',
        ' "trials": [',
        '  {"number": 0},',
        '  {"number": 1}',
        " ],",
        ' "front": []',
        "}",
    ]


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        written({"value": float("nan")})
