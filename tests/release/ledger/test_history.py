"""Test the state that ledger entries add up to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.release.ledger.events import Adopted, Approved, Begun, Ended, Event, Holder, Moved, Registered
from edgeopt.release.ledger.hash_chain import Entry
from edgeopt.release.ledger.history import ROLLBACK, History

HOLDER = Holder(host="h", machine="m", process="1:1")


def entries_of(*events: Event, actor: str = "ada") -> list[Entry]:
    entries: list[Entry] = []
    for index, event in enumerate(events, start=1):
        previous = entries[-1].digest if entries else ""
        fields = event.to_json()
        entries.append(
            Entry(
                number=index, previous=previous, kind=event.KIND, actor=actor, at=f"t{index}", reason="", facts=fields
            )
        )
    return entries


def move_events(action: str, to: str, before: str | None) -> list[Event]:
    return [
        Begun(action=action, holder=HOLDER),
        Moved(aliases={"champion": (before, to)}),
        Ended(action=action, outcome="done"),
    ]


def history_of(*steps: str) -> History:
    """Return the history of promotions, by version number, and of rollbacks, as `back`."""
    events: list[Event] = []
    for step in steps:
        history = History.from_entries(entries_of(*events))
        present, previous = history.aliases.get("champion"), history.previous_version("champion")
        if step == "back":
            assert previous is not None
            events += move_events(ROLLBACK, previous, present)
        else:
            events += move_events("promotion", step, present)
    return History.from_entries(entries_of(*events))


@pytest.mark.parametrize(
    ("steps", "present", "previous"),
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
def test_rollback_skips_rolled_back_versions(steps: list[str], present: str, previous: str | None) -> None:
    history = history_of(*steps)
    assert (history.aliases["champion"], history.previous_version("champion")) == (present, previous)


@given(steps=st.lists(st.sampled_from(["1", "2", "3", "4", "back"]), max_size=12))
def test_repeated_rollbacks_end_without_repetition(steps: list[str]) -> None:
    events = ["0", *[step for step in steps if step != "back"]]
    history = history_of(*events)
    seen = {history.aliases["champion"]}
    while history.previous_version("champion") is not None:
        events.append("back")
        history = history_of(*events)
        assert history.aliases["champion"] not in seen
        seen.add(history.aliases["champion"])


def test_operation_is_open_until_its_end() -> None:
    begun, move, end = move_events("promotion", "2", None)
    assert History.from_entries(entries_of(begun)).open_operation is not None
    assert History.from_entries(entries_of(begun)).pending_moves == {}
    assert History.from_entries(entries_of(begun, move)).pending_moves == {"champion": "2"}
    closed = History.from_entries(entries_of(begun, move, end))
    assert (closed.open_operation, closed.pending_moves, closed.aliases) == (None, {}, {"champion": "2"})


def test_registrations_and_approvals_by_version() -> None:
    entries = entries_of(
        Registered(version="1", digest="d1"),
        Approved(version="1", digest="d1"),
        Approved(version="1", digest="other"),
    )
    history = History.from_entries(entries)
    assert history.registrations["1"].digest == "d1"
    assert history.registrations["1"].actor == "ada"
    assert [approval.digest for approval in history.approvals["1"]] == ["d1", "other"]


def test_adoption_keeps_registrations_of_unchanged_versions() -> None:
    entries = entries_of(Registered(version="1", digest="d1"), Registered(version="2", digest="d2"))
    adopted = entries_of(Adopted(aliases={"champion": "3"}, versions={"1": "d1", "2": "x", "3": "d3"}), actor="eve")
    history = History.from_entries([*entries, *adopted])
    assert {v: (r.actor, r.digest) for v, r in history.registrations.items()} == {
        "1": ("ada", "d1"),
        "2": ("eve", "x"),
        "3": ("eve", "d3"),
    }
    assert history.aliases == {"champion": "3"}
