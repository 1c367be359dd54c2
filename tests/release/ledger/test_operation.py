"""Test that operations exclude each other and that interrupted ones are completed or undone."""

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
from edgeopt.release.ledger import operation
from edgeopt.release.ledger.events import Begun, Holder, Moved
from edgeopt.release.ledger.hash_chain import Entry
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.release.registry import client as registry

from ..conftest import FinishedStudy

NewOperation = Callable[[], ReleaseOperation]


@pytest.fixture
def new_operation(study: FinishedStudy) -> NewOperation:
    """Return a function that starts over with a model that has two versions and no alias."""
    study.client.create_registered_model(study.policy.model)
    for _ in range(2):
        study.client.create_model_version(study.policy.model, "made:up")
    return lambda: ReleaseOperation(study.client, study.policy.model)


def kinds(study: FinishedStudy) -> list[str]:
    return [entry.kind for entry in audit(study.policy.model, tracking_uri=study.uri).entries]


def begin_and_abandon(release: ReleaseOperation, **holder: str) -> Entry:
    """Begin an operation as a process that died, and return its entry."""
    release.recover()
    defaults = {"host": process_identity.host_id(), "machine": "here", "process": "4194304:1"}
    release.append(Begun(action="promotion", holder=Holder(**defaults | holder)))
    assert release.history.open_operation is not None
    return release.history.open_operation.entry


def test_operation_is_recorded_from_begin_to_end(study: FinishedStudy, new_operation: NewOperation) -> None:
    release = new_operation()
    with release.run("promotion", "as planned"):
        assert release.move({"champion": "1"}) == {"champion": None}
        assert release.move({"champion": "1"}) == {}
    result = audit(study.policy.model, tracking_uri=study.uri)
    assert [e.kind for e in result.entries] == ["adopted", "begun", "moved", "ended"]
    assert result.entries[1].reason == "as planned"
    assert result.entries[3].facts == {"action": "promotion", "outcome": "done"}
    assert (result.problems, result.open_operation) == ((), "")
    assert registry.aliases(study.client, study.policy.model) == {"champion": "1"}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(GateError("no"), "refused"), (TrackingError("no"), "failed"), (KeyboardInterrupt(), "failed")],
)
def test_failed_operation_is_ended(
    study: FinishedStudy, new_operation: NewOperation, error: BaseException, outcome: str
) -> None:
    release = new_operation()
    with pytest.raises(type(error)), release.run("promotion"):
        raise error
    assert audit(study.policy.model, tracking_uri=study.uri).entries[-1].facts["outcome"] == outcome
    with new_operation().run("promotion"):
        pass


def test_open_operation_excludes_another(new_operation: NewOperation) -> None:
    with (
        new_operation().run("promotion"),
        pytest.raises(GateError, match=r"is running a promotion on .* since") as caught,
        new_operation().run("rollback"),
    ):
        pytest.fail("two operations are open")
    assert caught.value.exit_code == 4


def test_one_of_two_concurrent_operations_is_refused(new_operation: NewOperation) -> None:
    first, second = new_operation(), new_operation()
    first.recover()
    recover = second.recover

    def recover_before_first_begins() -> Any:
        history = recover()
        first.append(Begun(action="promotion", holder=Holder(host="", machine="", process="")))
        return history

    second.recover = recover_before_first_begins  # type: ignore[method-assign]
    with pytest.raises(GateError, match="another user changed this model"), second.run("rollback"):
        pytest.fail("two operations are open")


def test_recorded_moves_of_dead_process_are_completed(study: FinishedStudy, new_operation: NewOperation) -> None:
    release = new_operation()
    begin_and_abandon(release)
    release.append(Moved(aliases={"champion": (None, "2")}))
    assert new_operation().recover().aliases == {"champion": "2"}
    assert registry.aliases(study.client, study.policy.model) == {"champion": "2"}
    assert audit(study.policy.model, tracking_uri=study.uri).entries[-1].facts["outcome"] == "completed"


def test_operation_without_moves_is_undone(study: FinishedStudy, new_operation: NewOperation) -> None:
    release = new_operation()
    begun = begin_and_abandon(release)
    study.client.create_model_version(study.policy.model, "made:up", tags={operation.OPERATION_TAG: begun.digest})
    history = new_operation().recover()
    assert history.aliases == {}
    assert sorted(history.registrations) == ["1", "2", "3"], "its registration is recorded"
    assert kinds(study)[-3:] == ["begun", "registered", "ended"]
    assert audit(study.policy.model, tracking_uri=study.uri).problems == ()


def test_killed_local_process_is_detected_at_once(
    new_operation: NewOperation,
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    begin_and_abandon(new_operation(), process=process_identity.identity(process.pid))
    with pytest.raises(GateError, match="is running a promotion"):
        new_operation().recover()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert new_operation().recover().open_operation is None


@pytest.mark.parametrize("alive", [True, False])
def test_remote_process_is_detected_by_heartbeat(
    new_operation: NewOperation, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(operation, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(operation, "HEARTBEAT_TIMEOUT_S", 0.5)
    release = new_operation()
    begin_and_abandon(release, host="other")
    if alive:
        with operation._heartbeat(release._ledger, "digest"), pytest.raises(GateError, match="is running a promotion"):
            new_operation().recover()
    else:
        assert new_operation().recover().open_operation is None


def test_manually_moved_alias_blocks_until_adopted(study: FinishedStudy, new_operation: NewOperation) -> None:
    with (release := new_operation()).run("promotion"):
        release.move({"champion": "1"})
    study.client.set_registered_model_alias(study.policy.model, "champion", "2")
    message = "alias champion points at 2, but the ledger says 1"
    with pytest.raises(GateError, match=message):
        new_operation().recover()
    assert audit(study.policy.model, tracking_uri=study.uri).problems == (message,)
    assert adopt(study.policy.model, "intended", tracking_uri=study.uri).problems == ()
    assert new_operation().recover().aliases == {"champion": "2"}


def test_manual_registration_and_deletion_are_detected(study: FinishedStudy, new_operation: NewOperation) -> None:
    new_operation().recover()
    study.client.create_model_version(study.policy.model, "made:up")
    study.client.delete_model_version(study.policy.model, "1")
    assert audit(study.policy.model, tracking_uri=study.uri).problems == (
        "version 3 was registered without the ledger",
        "version 1 was deleted",
    )


def test_manipulated_ledger_blocks_operations(study: FinishedStudy, new_operation: NewOperation) -> None:
    new_operation().recover()
    study.client.set_model_version_tag(f"{study.policy.model}.ledger", "1", "edgeopt.entry", "{}")
    with pytest.raises(GateError, match="the ledger was manipulated: version 1 was changed"):
        new_operation().recover()
    with pytest.raises(GateError, match="was manipulated"):
        adopt(study.policy.model, "never mind", tracking_uri=study.uri)
