"""One operation at a time, and nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from edgeopt.errors import GateError, TrackingError
from edgeopt.machine import process_identity
from edgeopt.release.adopt import adopt
from edgeopt.release.audit import audit
from edgeopt.release.ledger import operation as desks
from edgeopt.release.ledger.hash_chain import Entry
from edgeopt.release.registry import client as registry

from ..conftest import Desk


@pytest.fixture
def opened(desk: Desk) -> Callable[[], desks.Desk]:
    """The desk of a model with two versions and no alias."""
    desk.client.create_registered_model(desk.policy.model)
    for _ in range(2):
        desk.client.create_model_version(desk.policy.model, "made:up")
    return lambda: desks.Desk(desk.client, desk.policy.model)


def kinds(desk: Desk) -> list[str]:
    return [entry.kind for entry in audit(desk.policy.model, tracking_uri=desk.uri).entries]


def begin(known: desks.Desk, **holder: str) -> Entry:
    """An operation that was begun and left by another process."""
    known.settle()
    here = {"host": process_identity.host_id(), "machine": "here", "process": "4194304:1"}
    known.note("begun", action="promotion", holder=here | holder)
    assert known.history.open is not None
    return known.history.open


def test_an_operation_is_entered_from_beginning_to_end(desk: Desk, opened: Callable[[], desks.Desk]) -> None:
    known = opened()
    with known.operation("promotion", "as planned"):
        assert known.move({"champion": "1"}) == {"champion": None}
        assert known.move({"champion": "1"}) == {}
    found = audit(desk.policy.model, tracking_uri=desk.uri)
    assert [e.kind for e in found.entries] == ["adopted", "begun", "moved", "ended"]
    assert found.entries[1].reason == "as planned"
    assert found.entries[3].facts == {"action": "promotion", "outcome": "done"}
    assert (found.faults, found.open) == ((), "")
    assert registry.aliases(desk.client, desk.policy.model) == {"champion": "1"}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(GateError("no"), "refused"), (TrackingError("no"), "failed"), (KeyboardInterrupt(), "failed")],
)
def test_an_operation_that_does_not_succeed_ends_too(
    desk: Desk, opened: Callable[[], desks.Desk], error: BaseException, outcome: str
) -> None:
    known = opened()
    with pytest.raises(type(error)), known.operation("promotion"):
        raise error
    assert audit(desk.policy.model, tracking_uri=desk.uri).entries[-1].facts["outcome"] == outcome
    with opened().operation("promotion"):
        pass


def test_while_somebody_is_at_it_nobody_else_begins(opened: Callable[[], desks.Desk]) -> None:
    with (
        opened().operation("promotion"),
        pytest.raises(GateError, match=r"is at it on .*: promotion, since") as caught,
        opened().operation("rollback"),
    ):
        pytest.fail("two at once")
    assert caught.value.exit_code == 4


def test_of_two_who_begin_at_once_one_is_refused(opened: Callable[[], desks.Desk]) -> None:
    one, other = opened(), opened()
    one.settle()
    settle = other.settle

    def late() -> Any:
        known = settle()
        one.note("begun", action="promotion", holder={})
        return known

    other.settle = late  # type: ignore[method-assign]
    with pytest.raises(GateError, match="somebody else changed this model"), other.operation("rollback"):
        pytest.fail("two at once")


def test_what_a_dead_process_had_written_is_completed(desk: Desk, opened: Callable[[], desks.Desk]) -> None:
    known = opened()
    begin(known)
    known.note("moved", aliases={"champion": [None, "2"]})
    assert opened().settle().aliases == {"champion": "2"}
    assert registry.aliases(desk.client, desk.policy.model) == {"champion": "2"}
    assert audit(desk.policy.model, tracking_uri=desk.uri).entries[-1].facts["outcome"] == "completed"


def test_what_a_dead_process_had_not_written_is_undone(desk: Desk, opened: Callable[[], desks.Desk]) -> None:
    known = opened()
    begun = begin(known)
    desk.client.create_model_version(desk.policy.model, "made:up", tags={desks.OPERATION: begun.digest})
    history = opened().settle()
    assert history.aliases == {}
    assert sorted(history.registered) == ["1", "2", "3"], "what it had registered is entered"
    assert kinds(desk)[-3:] == ["begun", "registered", "ended"]
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == ()


def test_a_process_of_this_host_that_was_killed_is_found_at_once(opened: Callable[[], desks.Desk]) -> None:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    begin(opened(), process=process_identity.identity(started.pid))
    with pytest.raises(GateError, match="is at it"):
        opened().settle()
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert opened().settle().open is None


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_of_another_host_is_watched_for_signs_of_life(
    opened: Callable[[], desks.Desk], monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(desks, "BEAT_S", 0.05)
    monkeypatch.setattr(desks, "SILENCE_S", 0.5)
    known = opened()
    begin(known, host="another")
    if alive:
        with desks._beating(known._ledger, "it"), pytest.raises(GateError, match="is at it"):
            opened().settle()
    else:
        assert opened().settle().open is None


def test_an_alias_that_was_moved_by_hand_stops_everything_until_it_is_adopted(
    desk: Desk, opened: Callable[[], desks.Desk]
) -> None:
    with (known := opened()).operation("promotion"):
        known.move({"champion": "1"})
    desk.client.set_registered_model_alias(desk.policy.model, "champion", "2")
    message = "alias champion points at 2, and the ledger says 1"
    with pytest.raises(GateError, match=message):
        opened().settle()
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == (message,)
    assert adopt(desk.policy.model, "meant so", tracking_uri=desk.uri).faults == ()
    assert opened().settle().aliases == {"champion": "2"}


def test_a_version_that_was_registered_or_deleted_by_hand_is_found(
    desk: Desk, opened: Callable[[], desks.Desk]
) -> None:
    opened().settle()
    desk.client.create_model_version(desk.policy.model, "made:up")
    desk.client.delete_model_version(desk.policy.model, "1")
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == (
        "version 3 was registered behind the ledger's back",
        "version 1 was deleted",
    )


def test_a_ledger_that_was_changed_stops_everything(desk: Desk, opened: Callable[[], desks.Desk]) -> None:
    opened().settle()
    desk.client.set_model_version_tag(f"{desk.policy.model}.ledger", "1", "edgeopt.entry", "{}")
    with pytest.raises(GateError, match="its ledger does not hold: version 1 was changed"):
        opened().settle()
    with pytest.raises(GateError, match="does not hold"):
        adopt(desk.policy.model, "never mind", tracking_uri=desk.uri)
