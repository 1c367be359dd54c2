"""Test the events that ledger entries record."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from edgeopt.release.ledger import events
from edgeopt.release.ledger.events import (
    Adopted,
    Approved,
    Begun,
    Ended,
    Event,
    Holder,
    Judged,
    Moved,
    Posted,
    Registered,
    Retired,
    Revoked,
)

HOLDER = Holder(host="h", machine="m", process="1:1")


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (Adopted(aliases={"champion": "2"}, versions={"2": "d"}), "adopted champion = 2"),
        (Adopted(aliases={}, versions={}), "adopted no alias"),
        (Begun(action="promotion", holder=HOLDER, webhooks=("https://x",), study="s", policy="p"), "began promotion"),
        (Judged(policy="edge", verdicts={"12": (), "3": ()}), "checked trials 3, 12 by policy edge"),
        (Judged(policy="edge", verdicts={"3": (("size", True, "fits"),)}), "checked trial 3 by policy edge"),
        (Registered(version="1", digest="0123456789abcdef"), "registered version 1, engine 0123456789ab…"),
        (Approved(version="1", digest="0123456789abcdef"), "approved version 1, engine 0123456789ab…"),
        (Revoked(version="1", digest="0"), "revoked the approval of version 1"),
        (Retired(versions=("1", "2")), "retired versions 1, 2"),
        (
            Moved(aliases={"champion": ("1", "2"), "smallest": (None, "2")}),
            "moved champion from 1 to 2, smallest from nothing to 2",
        ),
        (Posted(entry="d", url="https://user:secret@x/hook", delivered=True), "notified https://user:***@x/hook"),
        (Posted(entry="d", url="https://x", delivered=False), "failed to notify a webhook"),
        (Ended(action="rollback", outcome="done"), "ended rollback, done"),
    ],
)
def test_event_round_trips_and_describes_itself(event: Event, sentence: str) -> None:
    stored = json.loads(json.dumps(event.to_json()))
    restored = events.parse(event.KIND, stored)
    assert type(restored) is type(event)
    assert restored.to_json() == event.to_json() == stored
    assert restored.describe() == sentence


def test_description_ends_with_reason() -> None:
    assert events.describe(Ended(action="rollback", outcome="done"), "why") == "ended rollback, done: why"


def test_parsed_events_hold_tuples() -> None:
    assert events.parse("retired", {"versions": ["1"]}) == Retired(versions=("1",))
    begun = Begun(action="promotion", holder=HOLDER, webhooks=("https://x",))
    assert events.parse("begun", begun.to_json()) == begun


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("deleted", {}, "the kind must be one of adopted, begun, judged"),
        ("moved", {}, "invalid fields of a moved entry"),
        ("begun", {"action": "promotion", "holder": None}, "invalid fields of a begun entry"),
        ("begun", {"action": "promotion"}, "invalid fields of a begun entry"),
        ("moved", None, "invalid fields of a moved entry"),
    ],
)
def test_invalid_event_is_rejected(kind: str, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        events.parse(kind, fields)
