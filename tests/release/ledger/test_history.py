"""What entries add up to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.release.ledger.hash_chain import Entry
from edgeopt.release.ledger.history import ROLLBACK, History, told


def written(*events: tuple[str, dict[str, Any]], actor: str = "ada") -> list[Entry]:
    found: list[Entry] = []
    for index, (kind, facts) in enumerate(events, start=1):
        previous = found[-1].digest if found else ""
        found.append(
            Entry(number=index, previous=previous, kind=kind, actor=actor, at=f"t{index}", reason="", facts=facts)
        )
    return found


def moved(action: str, to: str, before: str | None) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("begun", {"action": action}),
        ("moved", {"aliases": {"champion": [before, to]}}),
        ("ended", {"action": action, "outcome": "done"}),
    ]


def run(*steps: str) -> History:
    """Promotions of a version by number, and `back` for a rollback."""
    events: list[tuple[str, dict[str, Any]]] = []
    for step in steps:
        known = History.of(written(*events))
        now, before = known.aliases.get("champion"), known.before("champion")
        if step == "back":
            assert before is not None
            events += moved(ROLLBACK, before, now)
        else:
            events += moved("promotion", step, now)
    return History.of(written(*events))


@pytest.mark.parametrize(
    ("steps", "now", "before"),
    [
        (["1"], "1", None),
        (["1", "2"], "2", "1"),
        (["1", "2", "3", "back"], "2", "1"),
        (["1", "2", "3", "back", "back"], "1", None),
        (["1", "2", "back", "3"], "3", "1"),
        (["1", "2", "1", "back"], "2", None),
        (["1", "2", "back", "2"], "2", "1"),
    ],
)
def test_a_rollback_goes_to_the_last_version_that_was_not_rolled_back(
    steps: list[str], now: str, before: str | None
) -> None:
    history = run(*steps)
    assert (history.aliases["champion"], history.before("champion")) == (now, before)


@given(steps=st.lists(st.sampled_from(["1", "2", "3", "4", "back"]), max_size=12))
def test_rollbacks_end_and_never_return_to_what_was_rolled_back(steps: list[str]) -> None:
    known = run("0", *[s for s in steps if s != "back"])
    seen, done = {known.aliases["champion"]}, ["0", *[s for s in steps if s != "back"]]
    while known.before("champion") is not None:
        done.append("back")
        known = run(*done)
        assert known.aliases["champion"] not in seen
        seen.add(known.aliases["champion"])


def test_an_operation_is_open_until_it_ends_with_its_moves() -> None:
    begun, move, end = moved("promotion", "2", None)
    assert History.of(written(begun)).open is not None
    assert History.of(written(begun)).moves == {}
    assert History.of(written(begun, move)).moves == {"champion": "2"}
    closed = History.of(written(begun, move, end))
    assert (closed.open, closed.moves, closed.aliases) == (None, {}, {"champion": "2"})


def test_registrations_and_approvals_are_known_by_version() -> None:
    entries = written(
        ("registered", {"version": "1", "digest": "d1"}),
        ("approved", {"version": "1", "digest": "d1"}),
        ("approved", {"version": "1", "digest": "other"}),
    )
    history = History.of(entries)
    assert history.registered["1"].digest == "d1"
    assert history.registered["1"].actor == "ada"
    assert [e.facts["digest"] for e in history.approvals["1"]] == ["d1", "other"]


def test_adopting_takes_what_there_is_and_keeps_who_registered_what_is_unchanged() -> None:
    entries = written(
        ("registered", {"version": "1", "digest": "d1"}), ("registered", {"version": "2", "digest": "d2"})
    )
    adopted = written(
        ("adopted", {"aliases": {"champion": "3"}, "versions": {"1": "d1", "2": "x", "3": "d3"}}), actor="eve"
    )
    history = History.of([*entries, *adopted])
    assert {v: (r.actor, r.digest) for v, r in history.registered.items()} == {
        "1": ("ada", "d1"),
        "2": ("eve", "x"),
        "3": ("eve", "d3"),
    }
    assert history.aliases == {"champion": "3"}


def test_every_kind_is_told_in_a_sentence() -> None:
    assert told("moved", {"aliases": {"champion": ["1", "2"], "smallest": [None, "2"]}}, "") == (
        "moved champion from 1 to 2, smallest from nothing to 2"
    )
    assert told("ended", {"action": "rollback", "outcome": "done"}, "why") == "ended rollback, done: why"
    verdicts: dict[str, list[str]] = {"12": [], "3": []}
    assert told("judged", {"verdicts": verdicts, "policy": "edge"}, "") == "judged trials 3, 12 by policy edge"
    assert told("judged", {"verdicts": {"3": []}, "policy": "edge"}, "") == "judged trial 3 by policy edge"
