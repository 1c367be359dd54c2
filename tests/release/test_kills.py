"""Test recovery after SIGKILL before every single write: the next command makes registry and ledger agree."""

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
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.release.promote import promote
from edgeopt.release.registry import client as registry
from edgeopt.release.rollback import rollback

from .conftest import FinishedStudy
from .test_copy import production
from .test_release import BEST, aliases, reference

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


def run_until_kill(writes: int, action: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Run `action` and kill this process after `writes` writes."""
    remaining = [writes]

    class KillingClient(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            if name in WRITES:
                remaining[0] -= 1
                if remaining[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().__getattribute__(name)

    registry.MlflowClient = KillingClient  # type: ignore[misc]
    os.environ["MLFLOW_TRACKING_USERNAME"] = arguments.pop("user", "ada")
    action(**arguments)


def run_and_kill(writes: int, action: Callable[..., Any], **arguments: Any) -> bool:
    """Run `action` in a process that dies after `writes` writes. Return False if the action ended before."""
    process = PROCESSES.Process(target=run_until_kill, args=(writes, action, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def assert_consistent(study: FinishedStudy) -> None:
    result = audit(study.policy.model, tracking_uri=study.uri)
    assert (result.problems, result.open_operation) == ((), "")


def test_killed_promotion_is_completed_or_undone(study: FinishedStudy) -> None:
    writes = 0
    while run_and_kill(writes, promote, **study.arguments(policy=policy_for(study, writes))):
        policy = policy_for(study, writes)
        renamed = replace(study, policy=policy)
        promote(**renamed.arguments())
        assert [v.tags["edgeopt.trial"] for v in renamed.versions()] == ["s/0", "s/1", "s/2"]
        assert aliases(renamed) == {"champion": "3"}
        assert_consistent(renamed)
        writes += 1
    assert writes >= 16, "every write of a first promotion"


def policy_for(study: FinishedStudy, writes: int) -> Any:
    return replace(study.policy, model=f"{study.policy.model}-{writes}")


def test_killed_rollback_and_approval_are_recovered(study: FinishedStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    promote(**study.arguments())
    promote(**study.arguments(policy=replace(study.policy, aliases=BEST)))
    writes = 0
    champion = reference(study, "@champion")
    while run_and_kill(writes, rollback, reference=champion, reason="bad", tracking_uri=study.uri):
        ReleaseOperation(study.client, study.policy.model).recover()
        assert_consistent(study)
        if aliases(study) == {"champion": "3"}:  # completed: promote again
            promote(**study.arguments(policy=replace(study.policy, aliases=BEST)))
        writes += 1
    assert writes >= 4, "begun, moved, the alias, ended"
    assert aliases(study) == {"champion": "3"}
    assert_consistent(study)
    writes = 0
    while run_and_kill(
        writes, approve, reference=reference(study, "/3"), reason="fine", tracking_uri=study.uri, user="eve"
    ):
        assert_consistent(study)
        writes += 1
    assert writes == 1


def test_killed_retirement_is_completed_or_undone(study: FinishedStudy) -> None:
    writes = 0
    while True:
        renamed = replace(study, policy=replace(policy_for(study, writes), versions_kept=1))
        promote(**renamed.arguments())
        if not run_and_kill(writes, promote, **renamed.arguments(trials=[study.trials[2]])):
            break
        ReleaseOperation(study.client, renamed.policy.model).recover()
        assert_consistent(renamed)
        promote(**renamed.arguments(trials=[study.trials[2]]))
        assert [v.version for v in renamed.versions()] == [2, 3]
        assert_consistent(renamed)
        writes += 1
    assert writes >= 5, "begun, judged, retired, the version, ended"


def test_killed_copy_is_completed_or_undone(study: FinishedStudy, production: dict[str, str]) -> None:
    promote(**study.arguments())
    renamed, writes = replace(study, uri=production["destination_uri"]), 0
    arguments = {"reference": reference(study, "/3"), **production, "aliases": ("champion",)}
    while run_and_kill(writes, copy, **arguments, name=f"copy{writes}", tracking_uri=study.uri):
        done = copy(**arguments, name=f"copy{writes}", tracking_uri=study.uri)
        named = replace(renamed, policy=replace(study.policy, model=done.model))
        assert [v.version for v in named.versions()] == [1]
        assert aliases(named) == {"champion": "1"}
        assert named.client.get_model_version(done.model, "1").tags["edgeopt.engine_digest"] == done.digest
        assert_consistent(named)
        writes += 1
    assert writes >= 8
