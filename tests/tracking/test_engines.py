"""Test which engines the artifact store keeps."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from support import samples

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.artifact import Engine
from edgeopt.core.result import TrialResult
from edgeopt.release.ledger.operation import link_model_version
from edgeopt.release.registry import client as registry
from edgeopt.tracking import engines
from edgeopt.tracking.recorder import MlflowRecorder


def client(recorder: MlflowRecorder) -> MlflowClient:
    return MlflowClient(tracking_uri=recorder.uri)


def models(recorder: MlflowRecorder, digest: str) -> list[LoggedModel]:
    api = client(recorder)
    experiment = api.get_experiment_by_name(recorder.experiment)
    found = api.search_logged_models([experiment.experiment_id], f"tags.`{tags.ENGINE_DIGEST}` = '{digest}'")
    return list(found)


def built(folder: Path, seed: int) -> TrialResult:
    """Return a feasible trial with its own engine."""
    return samples.result(samples.engine(folder / f"engine-{seed}-{folder.name}", seed=seed))


def digest_of(result: TrialResult) -> str:
    assert result.engine is not None
    return str(result.engine.digest)


def files_of(model: LoggedModel) -> list[str]:
    folder = Path(model.artifact_location.removeprefix("file://"))
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return a different seed for each test, so that tests do not share engines."""
    return zlib.crc32(request.node.name.encode())


def test_dominated_trial_keeps_recipe_not_engine(
    recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int
) -> None:
    result = built(tmp_path, seed)
    run_id = recorder.record(study, 0, {}, {"model": "m"}, result, keep_engine=False)
    assert models(recorder, digest_of(result)) == []
    run = client(recorder).get_run(run_id)
    assert run.data.tags[tags.ENGINE_DIGEST] == digest_of(result)
    assert tags.ENGINE_MODEL_ID not in run.data.tags
    assert "config.yaml" in {file.path for file in client(recorder).list_artifacts(run_id)}


def test_equal_engines_share_one_upload(recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int) -> None:
    result = built(tmp_path, seed)
    runs = [recorder.record(study, number, {"n": number}, {}, result) for number in range(2)]
    (model,) = models(recorder, digest_of(result))
    for run_id in runs:
        run = client(recorder).get_run(run_id)
        assert run.data.tags[tags.ENGINE_MODEL_ID] == model.model_id
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    (first,) = recorder.release(study, {1})
    assert (first.trial, first.freed_bytes) == (0, 0), "the other run needs it"
    assert models(recorder, digest_of(result))
    (second,) = recorder.release(study, set())
    assert result.engine is not None
    assert second.freed_bytes == result.engine.size_bytes
    assert models(recorder, digest_of(result)) == []
    assert recorder.release(study, set()) == [], "an engine is released once"


def test_engine_off_the_front_is_deleted(recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int) -> None:
    on_front, dropped = built(tmp_path, seed), built(tmp_path, seed + 1)
    for number, result in enumerate((on_front, dropped)):
        recorder.record(study, number, {"n": number}, {}, result)
    (removed,) = models(recorder, digest_of(dropped))
    released = recorder.release(study, {0}, dry_run=True)
    assert [(engine.trial, engine.model_id) for engine in released] == [(1, removed.model_id)]
    assert models(recorder, digest_of(dropped)), "a dry run changes nothing"
    assert recorder.release(study, {0}) == released
    assert models(recorder, digest_of(dropped)) == []
    if recorder.uri.startswith("sqlite"):
        assert files_of(removed) == []
    (remaining,) = models(recorder, digest_of(on_front))
    assert str(remaining.status) == "READY"


def test_registered_engine_is_never_released(recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int) -> None:
    result = built(tmp_path, seed)
    run_id = recorder.record(study, 0, {}, {}, result)
    (model,) = models(recorder, digest_of(result))
    name = f"registered-{seed}"
    with registry.connect(recorder.uri) as api:
        api.create_registered_model(name)
        version = api.create_model_version(name, f"models:/{model.model_id}", run_id, model_id=model.model_id)
        link_model_version(api, version, str(model.model_id))
    assert recorder.release(study, set()) == []
    assert models(recorder, digest_of(result))


@pytest.mark.parametrize("moment", ["delete_artifacts", "delete_logged_model", "set_tag"])
def test_interrupted_release_is_completed_later(
    recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Simulated SIGKILL."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    result = built(tmp_path, seed)
    recorder.record(study, 0, {}, {}, result)
    with monkeypatch.context() as patched:
        if moment == "delete_artifacts":
            patched.setattr(engines, "get_artifact_repository", die)
        else:
            patched.setattr(MlflowClient, moment, die)
        with pytest.raises(Killed):
            recorder.release(study, set())
    recorder.release(study, set())
    assert models(recorder, digest_of(result)) == []
    assert recorder.release(study, set()) == []


def test_engines_with_different_manifests_are_separate(
    recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int
) -> None:
    plain, other = (built(tmp_path / name, seed) for name in ("plain", "other"))
    assert other.engine is not None
    engine = Engine.read(Path(other.engine.directory))
    made_by = {**engine.made_by, "opened": "in another way"}
    other = replace(
        other, engine=Engine.seal(engine.directory, format=engine.format, spec=engine.spec, made_by=made_by).summary()
    )
    assert digest_of(plain) == digest_of(other)
    runs = [recorder.record(study, number, {"n": number}, {}, result) for number, result in enumerate((plain, other))]
    kept = [client(recorder).get_run(run_id).data.tags[tags.ENGINE_MODEL_ID] for run_id in runs]
    assert [client(recorder).get_logged_model(model).source_run_id for model in kept] == runs


def test_engine_under_release_is_uploaded_again(
    recorder: MlflowRecorder, study: str, tmp_path: Path, seed: int
) -> None:
    result = built(tmp_path, seed)
    recorder.record(study, 0, {"n": 0}, {}, result)
    (removed,) = models(recorder, digest_of(result))
    client(recorder).set_logged_model_tags(removed.model_id, {"edgeopt.released": "by another process"})
    run_id = recorder.record(study, 1, {"n": 1}, {}, replace(result, notes=("the same engine",)))
    kept = client(recorder).get_run(run_id).data.tags[tags.ENGINE_MODEL_ID]
    assert kept != removed.model_id
    assert str(client(recorder).get_logged_model(kept).status) == "READY"
