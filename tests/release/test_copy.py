"""Test copies of versions to other registries, and pulls of engines to devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.artifact import Engine
from edgeopt.core.corpus import Text
from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.errors import GateError, InputError
from edgeopt.release.audit import audit
from edgeopt.release.copy import copy
from edgeopt.release.promote import promote
from edgeopt.release.pull import pull
from edgeopt.release.registry import client as registry
from edgeopt.release.verify import Verification, verify
from edgeopt.tracking import server

from .conftest import FinishedStudy
from .test_release import reference
from .test_signature import key_pair


@pytest.fixture
def production(tmp_path: Path) -> dict[str, str]:
    """Return the arguments that copy to another store: its URI and an experiment."""
    uri = f"sqlite:///{tmp_path / 'production.db'}"
    server.probe(uri)
    with server.connect(uri) as client:
        return {"destination_uri": uri, "experiment": server.get_or_create_experiment(client, uri, "copies")}


def test_copy_keeps_digest_signature_and_evidence(
    study: FinishedStudy, production: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path)
    promote(**study.arguments(private_key=private))
    copied = copy(
        reference(study, "@champion"), **production, aliases=("champion",), reason="go", tracking_uri=study.uri
    )
    assert (copied.model, copied.version, copied.created) == (study.policy.model, "1", True)
    source = study.versions()[2]
    copied_version = MlflowClient(tracking_uri=production["destination_uri"]).get_model_version(copied.model, "1")
    for tag in (tags.ENGINE_DIGEST, tags.MANIFEST_SHA256, "edgeopt.signature", tags.RECIPE):
        assert copied_version.tags[tag] == source.tags[tag]
    assert copied_version.description == source.description
    verification = verify(reference(study, "@champion"), public_key=public, tracking_uri=production["destination_uri"])
    verification.require()
    assert verification.digest == copied.digest == source.tags[tags.ENGINE_DIGEST]
    evidence = audit(copied.model, tracking_uri=production["destination_uri"]).entries[0].facts["evidence"]
    assert {entry["kind"] for entry in evidence} >= {"judged", "registered"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production["destination_uri"])
    assert mlflow.pyfunc.load_model(f"models:/{copied.model}@champion").predict(["def f ("])[0]


def test_second_copy_changes_nothing(study: FinishedStudy, production: dict[str, str]) -> None:
    promote(**study.arguments())
    first, second = (copy(reference(study, "/2"), **production, name="other", tracking_uri=study.uri) for _ in range(2))
    assert (first.version, second.version) == ("1", "1")
    assert (first.created, second.created) == (True, False)
    assert len(registry.versions(MlflowClient(tracking_uri=production["destination_uri"]), "other")) == 1
    with pytest.raises(InputError, match="must be another registry"):
        copy(reference(study, "/2"), study.uri, "0", tracking_uri=study.uri)


def test_damaged_version_is_neither_copied_nor_pulled(
    study: FinishedStudy, production: dict[str, str], tmp_path: Path, damageable_trial: TrialSnapshot
) -> None:
    promote(**study.arguments(trials=[damageable_trial], study=study.policy.model))
    study.damage(study.versions()[0])
    with pytest.raises(GateError, match="bytes: "):
        copy(reference(study, "/1"), **production, tracking_uri=study.uri)
    with pytest.raises(GateError, match="bytes: "):
        pull(reference(study, "/1"), tmp_path / "pulled", tracking_uri=study.uri)
    assert not (tmp_path / "pulled").exists()
    assert registry.versions(MlflowClient(tracking_uri=production["destination_uri"]), study.policy.model) == []


def test_pulled_engine_has_recorded_measurements(study: FinishedStudy, tmp_path: Path) -> None:
    promote(**study.arguments())
    pulled = pull(reference(study, "@champion"), tmp_path / "device" / "engine", tracking_uri=study.uri)
    engine = Engine.read(tmp_path / "device" / "engine")
    engine.verify()
    assert engine.digest == study.versions()[2].tags[tags.ENGINE_DIGEST] == pulled.engine.digest
    assert {m.metric: m.value for m in pulled.recorded}["latency/decode_p50_ms"] == 0.5
    assert sorted(p.name for p in (tmp_path / "device").iterdir()) == ["engine"]
    with pytest.raises(InputError, match="the folder already exists"):
        pull(reference(study, "@champion"), tmp_path / "device" / "engine", tracking_uri=study.uri)


def test_pulled_copy_is_verified_against_registry(study: FinishedStudy, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    promote(**study.arguments(private_key=private))
    folder = pull(reference(study, "@champion"), tmp_path / "engine", tracking_uri=study.uri).engine.directory

    def verify_copy(version: str) -> Verification:
        return verify(reference(study, version), public_key=public, folder=folder, tracking_uri=study.uri)

    assert verify_copy("@champion").require().directory == folder
    with pytest.raises(GateError, match=r"bytes: .* the engine must be the one that was registered"):
        verify_copy("/1").require()
    (file,) = (folder / record.path for record in Engine.read(folder).files if record.path.endswith(".npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the registry's file may be linked to it
    file.write_bytes(content)
    with pytest.raises(GateError, match=r"bytes: .* the file was modified"):
        verify_copy("@champion").require()


def test_pull_warns_about_different_evaluation_text(study: FinishedStudy, tmp_path: Path) -> None:
    promote(**study.arguments())
    pulled = pull(reference(study, "@champion"), tmp_path / "engine", tracking_uri=study.uri)
    own_text, trial_text = (Text(name=name, documents=(name,)) for name in ("own.txt", "trial.txt"))
    warning = replace(pulled, recorded_text=trial_text.summary()).text_warning(own_text)
    for text in (own_text, trial_text):
        assert f"{text.name} (sha256 {text.digest[:12]}…)" in warning
    assert replace(pulled, recorded_text=own_text.summary()).text_warning(own_text) == ""
    assert "unknown" in replace(pulled, recorded_text=None).text_warning(own_text)
    assert replace(pulled, recorded=()).text_warning(own_text) == ""
