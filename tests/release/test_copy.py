"""Versions that go to other registries and to devices."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.artifact import Engine
from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.errors import GateError, InputError
from edgeopt.release.audit import audit
from edgeopt.release.copy import copy
from edgeopt.release.promote import promote
from edgeopt.release.pull import pull
from edgeopt.release.registry import client as registry
from edgeopt.release.verify import verify
from edgeopt.tracking import server

from .conftest import Desk
from .test_release import at
from .test_signature import key_pair


@pytest.fixture
def production(tmp_path: Path) -> dict[str, str]:
    """Another store: its URI, and an experiment for copies."""
    uri = f"sqlite:///{tmp_path / 'production.db'}"
    server.probe(uri)
    with server.connect(uri) as client:
        return {"destination_uri": uri, "experiment": server.get_or_create_experiment(client, uri, "copies")}


def test_a_copy_keeps_digest_signature_evidence_and_works_by_itself(
    desk: Desk, production: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path)
    promote(**desk.arguments(private_key=private))
    done = copy(at(desk, "@champion"), **production, aliases=("champion",), reason="go", tracking_uri=desk.uri)
    assert (done.model, done.version, done.created) == (desk.policy.model, "1", True)
    source = desk.versions()[2]
    there = MlflowClient(tracking_uri=production["destination_uri"]).get_model_version(done.model, "1")
    for tag in (tags.ENGINE_DIGEST, tags.MANIFEST_SHA256, "edgeopt.signature", tags.RECIPE):
        assert there.tags[tag] == source.tags[tag]
    assert there.description == source.description
    found = verify(at(desk, "@champion"), public_key=public, tracking_uri=production["destination_uri"])
    found.require()
    assert found.digest == done.digest == source.tags[tags.ENGINE_DIGEST]
    evidence = audit(done.model, tracking_uri=production["destination_uri"]).entries[0].facts["evidence"]
    assert {entry["kind"] for entry in evidence} >= {"judged", "registered"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production["destination_uri"])
    assert mlflow.pyfunc.load_model(f"models:/{done.model}@champion").predict(["def f ("])[0]


def test_a_version_is_copied_once(desk: Desk, production: dict[str, str]) -> None:
    promote(**desk.arguments())
    first, again = (copy(at(desk, "/2"), **production, name="other", tracking_uri=desk.uri) for _ in range(2))
    assert (first.version, again.version) == ("1", "1")
    assert (first.created, again.created) == (True, False)
    assert len(registry.versions(MlflowClient(tracking_uri=production["destination_uri"]), "other")) == 1
    with pytest.raises(InputError, match="this is the registry"):
        copy(at(desk, "/2"), desk.uri, "0", tracking_uri=desk.uri)


def test_a_version_that_was_damaged_is_neither_copied_nor_pulled(
    desk: Desk, production: dict[str, str], tmp_path: Path, spare: TrialSnapshot
) -> None:
    promote(**desk.arguments(rows=[spare], study=desk.policy.model))
    desk.damage(desk.versions()[0])
    with pytest.raises(GateError, match="bytes: "):
        copy(at(desk, "/1"), **production, tracking_uri=desk.uri)
    with pytest.raises(GateError, match="bytes: "):
        pull(at(desk, "/1"), tmp_path / "here", tracking_uri=desk.uri)
    assert not (tmp_path / "here").exists()
    assert registry.versions(MlflowClient(tracking_uri=production["destination_uri"]), desk.policy.model) == []


def test_an_engine_is_pulled_with_what_was_promised(desk: Desk, tmp_path: Path) -> None:
    promote(**desk.arguments())
    found = pull(at(desk, "@champion"), tmp_path / "far" / "engine", tracking_uri=desk.uri)
    engine = Engine.read(tmp_path / "far" / "engine")
    engine.verify()
    assert engine.digest == desk.versions()[2].tags[tags.ENGINE_DIGEST] == found.engine.digest
    assert {m.metric: m.value for m in found.promised}["latency/decode_p50_ms"] == 0.5
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["engine"]
    with pytest.raises(InputError, match="the folder is there already"):
        pull(at(desk, "@champion"), tmp_path / "far" / "engine", tracking_uri=desk.uri)
