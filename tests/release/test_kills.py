"""kill -9 before every single write: the next command leaves registry and ledger whole and at one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from mlflow import MlflowClient

from edgeopt.release.approve import approve
from edgeopt.release.audit import audit
from edgeopt.release.copy import copy
from edgeopt.release.ledger.operation import Desk as ReleaseDesk
from edgeopt.release.promote import promote
from edgeopt.release.registry import client as registry
from edgeopt.release.rollback import rollback

from .conftest import Desk
from .test_copy import production
from .test_release import BEST, aliases, at

__all__ = ["production"]

WRITES = (
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_registered_model_alias",
    "set_registered_model_tag",
    "update_model_version",
    "set_model_version_tag",
    "create_experiment",
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "delete_model_version",
    "delete_logged_model_tag",
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["edgeopt.release.promote", "release.test_kills"])


def dying(writes: int, action: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Do `action`, and be killed before the write after `writes`."""
    left = [writes]

    class Dying(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            if name in WRITES:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().__getattribute__(name)

    registry.MlflowClient = Dying  # type: ignore[misc]
    os.environ["MLFLOW_TRACKING_USERNAME"] = arguments.pop("user", "ada")
    action(**arguments)


def killed(writes: int, action: Callable[..., Any], **arguments: Any) -> bool:
    """Whether the process died before it was done."""
    process = PROCESSES.Process(target=dying, args=(writes, action, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def agrees(desk: Desk) -> None:
    found = audit(desk.policy.model, tracking_uri=desk.uri)
    assert (found.faults, found.open) == ((), "")


def test_a_promotion_is_completed_or_undone(desk: Desk) -> None:
    writes = 0
    while killed(writes, promote, **desk.arguments(policy=named(desk, writes))):
        policy = named(desk, writes)
        there = replace(desk, policy=policy)
        promote(**there.arguments())
        assert [v.tags["edgeopt.trial"] for v in there.versions()] == ["s/0", "s/1", "s/2"]
        assert aliases(there) == {"champion": "3"}
        agrees(there)
        writes += 1
    assert writes >= 16, "every write of a first promotion"


def named(desk: Desk, writes: int) -> Any:
    return replace(desk.policy, model=f"{desk.policy.model}-{writes}")


def test_a_rollback_and_an_approval_are_completed_or_undone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    promote(**desk.arguments())
    promote(**desk.arguments(policy=replace(desk.policy, aliases=BEST)))
    writes = 0
    champion = at(desk, "@champion")
    while killed(writes, rollback, reference=champion, reason="bad", tracking_uri=desk.uri):
        ReleaseDesk(desk.client, desk.policy.model).settle()
        agrees(desk)
        if aliases(desk) == {"champion": "3"}:  # completed: forward again
            promote(**desk.arguments(policy=replace(desk.policy, aliases=BEST)))
        writes += 1
    assert writes >= 4, "begun, moved, the alias, ended"
    assert aliases(desk) == {"champion": "3"}
    agrees(desk)
    writes = 0
    while killed(writes, approve, reference=at(desk, "/3"), reason="fine", tracking_uri=desk.uri, user="eve"):
        agrees(desk)
        writes += 1
    assert writes == 1


def test_retiring_versions_is_completed_or_undone(desk: Desk) -> None:
    writes = 0
    while True:
        there = replace(desk, policy=replace(named(desk, writes), versions_kept=1))
        promote(**there.arguments())
        if not killed(writes, promote, **there.arguments(rows=[desk.rows[2]])):
            break
        ReleaseDesk(desk.client, there.policy.model).settle()
        agrees(there)
        promote(**there.arguments(rows=[desk.rows[2]]))
        assert [v.version for v in there.versions()] == [2, 3]
        agrees(there)
        writes += 1
    assert writes >= 5, "begun, judged, retired, the version, ended"


def test_a_copy_is_completed_or_undone(desk: Desk, production: dict[str, str]) -> None:
    promote(**desk.arguments())
    there, writes = replace(desk, uri=production["destination_uri"]), 0
    arguments = {"reference": at(desk, "/3"), **production, "aliases": ("champion",)}
    while killed(writes, copy, **arguments, name=f"copy{writes}", tracking_uri=desk.uri):
        done = copy(**arguments, name=f"copy{writes}", tracking_uri=desk.uri)
        named = replace(there, policy=replace(desk.policy, model=done.model))
        assert [v.version for v in named.versions()] == [1]
        assert aliases(named) == {"champion": "1"}
        assert named.client.get_model_version(done.model, "1").tags["edgeopt.engine_digest"] == done.digest
        agrees(named)
        writes += 1
    assert writes >= 8
