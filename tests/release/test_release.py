"""What a release manager does after a promotion: approve, roll back, verify, audit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.errors import ApprovalPendingError, GateError, InputError
from edgeopt.release.approve import approve, revoke
from edgeopt.release.audit import audit
from edgeopt.release.overview import overview
from edgeopt.release.promote import promote
from edgeopt.release.ranking import Criterion
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.rollback import rollback
from edgeopt.release.verify import verify

from .conftest import Desk
from .test_signature import key_pair

FASTEST = {"champion": (Criterion(metric="latency/decode_p50_ms", direction="minimize", weight=1.0),)}
BEST = {"champion": (Criterion(metric="quality/perplexity_ratio", direction="minimize", weight=1.0),)}


def be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)


def at(desk: Desk, what: str) -> Reference:
    return Reference.parse(f"{desk.policy.model}{what}")


def aliases(desk: Desk) -> dict[str, str]:
    return registry.aliases(desk.client, desk.policy.model)


def test_a_dry_run_tells_every_verdict_and_changes_nothing(desk: Desk) -> None:
    plan = promote(**desk.arguments(dry_run=True))
    assert plan.dry_run
    assert [r.version for r in plan.releases] == ["", "", ""]
    assert plan.releases[2].aliases == ("champion",)
    assert plan.moved == {"champion": None}
    assert {v.gate for v in plan.releases[0].gates} == {"engine", "limits", "metrics", "signature"}
    assert desk.versions() == []
    assert audit(desk.policy.model, tracking_uri=desk.uri).entries == ()
    promote(**desk.arguments())
    again = promote(**desk.arguments(dry_run=True))
    assert [r.version for r in again.releases] == ["1", "2", "3"]
    assert again.moved == {}


def test_a_dry_run_tells_refusals_and_does_not_raise_them(desk: Desk) -> None:
    plan = promote(**desk.arguments(dry_run=True, rows=[replace(desk.rows[0], run_id=None)]))
    assert {v.gate for v in plan.releases[0].gates if not v.passed} == {"engine", "metrics"}


def test_the_ledger_says_who_did_what_and_why(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, "ada")
    promote(**desk.arguments(reason="first release"))
    entries = audit(desk.policy.model, tracking_uri=desk.uri).entries
    assert [e.kind for e in entries] == ["begun", "judged", *["registered"] * 3, "moved", "ended"]
    assert {e.actor for e in entries} == {"ada"}
    assert (entries[0].reason, entries[0].facts["study"]) == ("first release", "s")
    assert entries[1].facts["verdicts"]["0"][0][:2] == ["engine", True]
    assert entries[4].facts["digest"] == desk.versions()[2].tags[tags.ENGINE_DIGEST]
    assert entries[5].facts == {"aliases": {"champion": [None, "3"]}}


def test_a_refusal_is_in_the_ledger_with_its_evidence(desk: Desk) -> None:
    with pytest.raises(GateError):
        promote(**desk.arguments(rows=[replace(desk.rows[0], run_id=None)]))
    entries = audit(desk.policy.model, tracking_uri=desk.uri).entries
    assert [e.kind for e in entries] == ["begun", "judged", "ended"]
    assert entries[1].facts["verdicts"]["0"][0] == ["engine", False, "the trial has no MLflow run in this store"]
    assert entries[2].facts["outcome"] == "refused"


def test_an_alias_waits_for_the_approval_of_somebody_else(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(desk.policy, approvals=1)
    be(monkeypatch, "ada")
    with pytest.raises(GateError, match=r"/3 has 0 of 1 approvals by others than ada.*edgeopt approve") as caught:
        promote(**desk.arguments(policy=strict))
    assert caught.value.exit_code == 4
    assert aliases(desk) == {}
    with pytest.raises(GateError, match=r"ada registered version .*/3, so somebody else must approve it"):
        approve(at(desk, "/3"), "trust me", tracking_uri=desk.uri)
    be(monkeypatch, "eve")
    approve(at(desk, "/3"), "ran for a week", tracking_uri=desk.uri)
    approve(at(desk, "/3"), "twice by one person", tracking_uri=desk.uri)
    be(monkeypatch, "ada")
    with pytest.raises(GateError, match=r"has 1 of 2 approvals"):
        promote(**desk.arguments(policy=replace(strict, approvals=2)))
    assert promote(**desk.arguments(policy=strict)).moved == {"champion": None}
    assert aliases(desk) == {"champion": "3"}


def test_an_approval_is_void_when_the_bytes_change(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, "ada")
    with pytest.raises(GateError, match="approvals"):
        promote(**desk.arguments(policy=replace(desk.policy, approvals=1)))
    desk.client.set_model_version_tag(desk.policy.model, "3", tags.ENGINE_DIGEST, "f" * 64)
    be(monkeypatch, "eve")
    with pytest.raises(GateError, match="differs from what the ledger says was registered"):
        approve(at(desk, "/3"), "whatever it is", tracking_uri=desk.uri)
    assert (
        "version 3 names another engine than was registered" in audit(desk.policy.model, tracking_uri=desk.uri).faults
    )


def test_a_rollback_goes_back_verified_and_within_seconds(desk: Desk) -> None:
    promote(**desk.arguments())
    promote(**desk.arguments(policy=replace(desk.policy, aliases=BEST)))
    assert aliases(desk) == {"champion": "1"}
    begun = time.monotonic()
    done = rollback(at(desk, "@champion"), "it crashes", tracking_uri=desk.uri)
    assert (done.before, done.after) == ("1", "3")
    assert time.monotonic() - begun < 60, "a benchmark holds the five seconds"
    assert aliases(desk) == {"champion": "3"}
    with pytest.raises(GateError, match=r"no earlier version is left; rolled back since: 1.*--to 1"):
        rollback(at(desk, "@champion"), "again", tracking_uri=desk.uri)
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == ()


def test_a_rollback_to_an_engine_that_was_damaged_is_refused(desk: Desk, spare: TrialSnapshot) -> None:
    promote(**desk.arguments(rows=[spare], study=desk.policy.model))
    promote(**desk.arguments())
    desk.damage(desk.versions()[0])
    with pytest.raises(InputError, match="the file was modified"):
        rollback(at(desk, "@champion"), "it crashes", tracking_uri=desk.uri)
    assert aliases(desk) == {"champion": "4"}
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == ()


def test_only_an_alias_is_rolled_back(desk: Desk) -> None:
    promote(**desk.arguments())
    with pytest.raises(InputError, match="a rollback needs an alias"):
        rollback(at(desk, "/3"), "why not", tracking_uri=desk.uri)
    with pytest.raises(InputError, match="no alias 'smallest'"):
        rollback(at(desk, "@smallest"), "why not", tracking_uri=desk.uri)


def test_versions_are_signed_and_verified_with_the_key_of_the_policy(desk: Desk, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    forger, other = key_pair(tmp_path, "other")
    signed = replace(desk.policy, public_key=public)
    with pytest.raises(GateError, match="the policy wants a signature, and no key is given"):
        promote(**desk.arguments(policy=signed))
    with pytest.raises(GateError, match="the signature is not that of this engine"):
        promote(**desk.arguments(policy=signed, private_key=forger))
    assert desk.versions() == []
    promote(**desk.arguments(policy=signed, private_key=private))
    verify(at(desk, "@champion"), public_key=public, tracking_uri=desk.uri).require()
    with pytest.raises(GateError, match=r"signature: .*is not that of this engine by the key"):
        verify(at(desk, "@champion"), public_key=other, tracking_uri=desk.uri).require()
    promote(**desk.arguments(policy=signed, private_key=private))
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == ()


def test_a_swapped_signature_is_named(desk: Desk, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    promote(**desk.arguments(private_key=private))
    other = desk.versions()[0].tags["edgeopt.signature"]
    desk.client.set_model_version_tag(desk.policy.model, "3", "edgeopt.signature", other)
    with pytest.raises(GateError, match="signature: "):
        verify(at(desk, "/3"), public_key=public, tracking_uri=desk.uri).require()
    verify(at(desk, "/1"), public_key=public, tracking_uri=desk.uri).require()


def test_verification_names_a_damaged_file_a_moved_alias_and_a_swapped_version(
    desk: Desk, spare: TrialSnapshot
) -> None:
    promote(**desk.arguments(rows=[spare], study=desk.policy.model))
    found = verify(at(desk, "@champion"), tracking_uri=desk.uri)
    assert [(c.gate, c.passed) for c in found.checks] == [("ledger", True), ("bytes", True), ("signature", True)]
    desk.damage(desk.versions()[0])
    with pytest.raises(GateError, match=r"bytes: .*table\.npy: the file was modified"):
        verify(at(desk, "@champion"), tracking_uri=desk.uri).require()
    promote(**desk.arguments())
    desk.client.set_registered_model_alias(desk.policy.model, "champion", "2")
    with pytest.raises(GateError, match="ledger: alias champion points at 2, and the ledger says 4"):
        verify(at(desk, "/2"), tracking_uri=desk.uri).require()
    desk.client.set_registered_model_alias(desk.policy.model, "champion", "4")
    swapped = desk.versions()[2].tags[tags.ENGINE_DIGEST]
    desk.client.set_model_version_tag(desk.policy.model, "4", tags.ENGINE_DIGEST, swapped)
    with pytest.raises(GateError, match=r"version 4 names another engine.*bytes: .*not the one that was registered"):
        verify(at(desk, "/4"), tracking_uri=desk.uri).require()


def test_the_overview_shows_versions_people_and_the_ledger(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, "ada")
    promote(**desk.arguments())
    be(monkeypatch, "eve")
    approve(at(desk, "/3"), "fine", tracking_uri=desk.uri)
    found = overview(desk.policy.model, tracking_uri=desk.uri)
    newest = found["versions"][0]
    assert (newest["version"], newest["aliases"], newest["registered_by"]) == ("3", ["champion"], "ada")
    assert (newest["approved_by"], newest["signed"]) == (["eve"], False)
    assert found["ledger"][-1]["told"].endswith(": fine")
    with pytest.raises(InputError, match="no model 'nothing' is registered"):
        overview("nothing", tracking_uri=desk.uri)


def test_versions_beyond_those_that_are_kept_are_retired_and_the_ledger_knows(desk: Desk) -> None:
    promote(**desk.arguments())
    keeping = replace(desk.policy, versions_kept=1)
    promote(**desk.arguments(policy=keeping, rows=[desk.rows[2]]))
    assert [v.version for v in desk.versions()] == [2, 3]
    found = audit(desk.policy.model, tracking_uri=desk.uri)
    assert found.faults == ()
    (retired,) = [entry for entry in found.entries if entry.kind == "retired"]
    assert retired.facts == {"versions": ["1"]}
    assert "retired version 1" in overview(desk.policy.model, tracking_uri=desk.uri)["ledger"][-2]["told"]
    before = len(found.entries)
    promote(**desk.arguments(policy=keeping, rows=[desk.rows[2]]))
    kinds = [e.kind for e in audit(desk.policy.model, tracking_uri=desk.uri).entries[before:]]
    assert kinds == ["begun", "judged", "ended"], "nothing is left to retire"


def test_what_was_retired_is_no_version_to_roll_back_to(desk: Desk) -> None:
    promote(**desk.arguments(policy=replace(desk.policy, aliases=BEST)))
    assert aliases(desk) == {"champion": "1"}
    promote(**desk.arguments(policy=replace(desk.policy, versions_kept=1), rows=[desk.rows[2]]))
    assert aliases(desk) == {"champion": "3"}
    with pytest.raises(GateError, match="no earlier version is left"):
        rollback(at(desk, "@champion"), "bad", tracking_uri=desk.uri)


def test_rollback_goes_to_a_chosen_earlier_version(desk: Desk) -> None:
    for criteria in ("quality/perplexity_ratio", "latency/decode_p50_ms"):
        best = (Criterion(metric=criteria, direction="minimize", weight=1.0),)
        promote(**desk.arguments(policy=replace(desk.policy, aliases={"champion": best})))
    assert aliases(desk) == {"champion": "3"}
    rollback(at(desk, "@champion"), "slow", tracking_uri=desk.uri)
    assert aliases(desk) == {"champion": "1"}
    with pytest.raises(GateError, match=r"`--to` must be a version to which champion pointed earlier, got '2'.*3"):
        rollback(at(desk, "@champion"), "wrong", to="2", tracking_uri=desk.uri)
    done = rollback(at(desk, "@champion"), "fixed on the device", to="3", tracking_uri=desk.uri)
    assert (done.before, done.after) == ("1", "3")
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == ()


def test_approval_is_revoked_by_its_author(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(desk.policy, approvals=1)
    be(monkeypatch, "ada")
    with pytest.raises(ApprovalPendingError, match="registered and waiting for approval"):
        promote(**desk.arguments(policy=strict))
    ended = audit(desk.policy.model, tracking_uri=desk.uri).entries[-1]
    assert (ended.kind, ended.facts["outcome"]) == ("ended", "waiting for approval")
    be(monkeypatch, "eve")
    assert approve(at(desk, "/3"), "fine", tracking_uri=desk.uri).changed
    assert not approve(at(desk, "/3"), "fine again", tracking_uri=desk.uri).changed
    be(monkeypatch, "bob")
    with pytest.raises(GateError, match="bob has not approved version"):
        revoke(at(desk, "/3"), "mine", tracking_uri=desk.uri)
    be(monkeypatch, "eve")
    revoke(at(desk, "/3"), "it crashed", tracking_uri=desk.uri)
    be(monkeypatch, "ada")
    with pytest.raises(ApprovalPendingError, match="0 of 1 approvals"):
        promote(**desk.arguments(policy=strict))
