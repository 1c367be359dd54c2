from __future__ import annotations

from typing import Any

import pytest

from edgeopt.search.storage.study_definition import describe_changes

STORED: dict[str, Any] = {
    "objectives": [["quality", "maximize"], ["size", "minimize"]],
    "limits": [["size", "at most 3 MiB"]],
    "parameters": {"bits": {"choices": [4, 8]}, "ratio": {"low": 0.1, "high": 0.5}},
}


def test_equal_definitions_have_no_changes() -> None:
    assert describe_changes(STORED, STORED) == []
    reordered = dict(reversed(STORED["parameters"].items()))
    assert describe_changes(STORED, STORED | {"parameters": reordered}) == [], "the order of parameters may change"
    same_numbers = STORED["parameters"] | {"bits": {"choices": [4.0, 8.0]}}
    assert describe_changes(STORED, STORED | {"parameters": same_numbers}) == [], "4 and 4.0 are equal"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("limits", [["size", "at most 2 MiB"]], ["limit size: stored at most 3 MiB, new at most 2 MiB"]),
        ("limits", [], ["limit size: stored at most 3 MiB, new none"]),
        (
            "limits",
            [["latency", "at most 5 ms"], ["size", "at least 1 MiB"], ["size", "at most 3 MiB"]],
            [
                "limit size: stored at most 3 MiB, new at least 1 MiB and at most 3 MiB",
                "limit latency: stored none, new at most 5 ms",
            ],
        ),
        (
            "objectives",
            [["quality", "minimize"], ["latency", "minimize"]],
            [
                "objective quality: stored maximize, new minimize",
                "objective size: stored minimize, new none",
                "objective latency: stored none, new minimize",
            ],
        ),
        (
            "objectives",
            [["size", "minimize"], ["quality", "maximize"]],
            ["order of objectives: stored quality, size, new size, quality"],
        ),
        (
            "parameters",
            {"bits": {"choices": [4]}},
            [
                'parameter bits: stored {"choices": [4, 8]}, new {"choices": [4]}',
                'parameter ratio: stored {"low": 0.1, "high": 0.5}, new none',
            ],
        ),
    ],
)
def test_changes_name_stored_and_new_values(key: str, value: Any, expected: list[str]) -> None:
    assert describe_changes(STORED, STORED | {key: value}) == expected


def test_changes_of_all_kinds_are_listed() -> None:
    other = {"objectives": [["size", "minimize"]], "limits": [], "parameters": {}}
    assert [change.split()[0] for change in describe_changes(STORED, other)] == [
        "objective",
        "limit",
        "parameter",
        "parameter",
    ]
