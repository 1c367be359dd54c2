"""Store each engine once in the artifact store, and remove engines that no run needs any more.

A run that stores an engine names the logged model in the tag `tags.ENGINE_MODEL_ID`. Runs with equal engines share one
logged model. Two engines are equal if their manifests are equal, because the manifest also says how to open the engine.

Storing and removing may run at the same time in two processes. Each writes its own mark before it reads the other's, so
at least one of the two sees the conflict and gives way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import TrialResult
from edgeopt.tracking import flavor, mlflow_fields, run_search

_MODEL_TAGS = (
    tags.RECIPE,
    tags.RECIPE_DIGEST,
    tags.ENGINE_DIGEST,
    tags.MANIFEST_SHA256,
    tags.TARGET,
    tags.EMULATED,
)
_RELEASED_TAG = "edgeopt.released"
"""Tag of a logged model that a process is removing; the value is the run that releases it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedEngine:
    """An engine that a run does not need any more.

    Attributes:
        freed_bytes: size of the removed files; 0 if another run or a registered version still needs them.
    """

    trial: int
    run_id: str
    model_id: str
    freed_bytes: int


def log_engine(client: MlflowClient, run: Run, result: TrialResult) -> str:
    """Store a trial's engine as a logged model and return its id.

    The files are uploaded only if no other run has logged an equal engine.
    """
    assert result.engine is not None
    for model in _complete_models(client, run, result.engine.manifest_sha256):
        _link(client, run, model)
        if _RELEASED_TAG not in client.get_logged_model(model.model_id).tags:
            return str(model.model_id)
    model = _own_model(client, run, result)
    if str(model.status) != "READY":
        flavor.upload(client, model, Path(result.engine.directory), run_id=run.info.run_id)
    _link(client, run, model)
    return str(model.model_id)


def release_engines(
    client: MlflowClient, experiment: str, study: str, front: set[int], *, dry_run: bool = False
) -> Iterator[ReleasedEngine]:
    """Release the engines of trials that are not in `front`, and yield each; registered engines stay."""
    for run in list(run_search.runs_with_engine(client, experiment, study)):
        model_id, trial = run.data.tags[tags.ENGINE_MODEL_ID], run_search.trial_number(run)
        if trial in front:
            continue
        model = _find_model(client, model_id)
        if model is not None and tags.MODEL_VERSIONS in model.tags:
            continue
        freed = 0 if model is None or _is_shared(client, experiment, run, model) else _size_bytes(model)
        if not dry_run:
            if model is not None and freed:
                freed = _remove(client, experiment, run, model)
            client.set_tag(run.info.run_id, tags.ENGINE_MODEL_ID, "")
        yield ReleasedEngine(trial=trial, run_id=str(run.info.run_id), model_id=model_id, freed_bytes=freed)


def _remove(client: MlflowClient, experiment: str, run: Run, model: LoggedModel) -> int:
    """Delete a logged model and its files, and return the freed bytes; do nothing if another run began to use it."""
    client.set_logged_model_tags(model.model_id, {_RELEASED_TAG: str(run.info.run_id)})
    if _is_shared(client, experiment, run, model):
        client.delete_logged_model_tag(model.model_id, _RELEASED_TAG)
        return 0
    get_artifact_repository(model.artifact_location, client.tracking_uri).delete_artifacts()
    client.delete_logged_model(model.model_id)
    return _size_bytes(model)


def _is_shared(client: MlflowClient, experiment: str, run: Run, model: LoggedModel) -> bool:
    users = run_search.runs_sharing_engine(client, experiment, str(model.model_id))
    return any(user.info.run_id != run.info.run_id for user in users)


def _complete_models(client: MlflowClient, run: Run, manifest_sha256: str) -> list[LoggedModel]:
    """Return the completely uploaded logged models with this manifest, those of the run itself first."""
    query = f"tags.`{tags.MANIFEST_SHA256}` = '{manifest_sha256}' AND name = '{tags.ENGINE_MODEL_NAME}'"
    models = client.search_logged_models([run.info.experiment_id], query)
    complete = [model for model in models if str(model.status) == "READY" and _RELEASED_TAG not in model.tags]
    return sorted(complete, key=lambda model: model.source_run_id != run.info.run_id)


def _own_model(client: MlflowClient, run: Run, result: TrialResult) -> LoggedModel:
    """Return the logged model that an earlier attempt of this run created, or create it."""
    query = f"source_run_id = '{run.info.run_id}' AND name = '{tags.ENGINE_MODEL_NAME}'"
    models = client.search_logged_models([run.info.experiment_id], query)
    existing = [model for model in models if _RELEASED_TAG not in model.tags]
    if existing:
        return existing[0]
    assert result.engine is not None
    model_tags = {key: str(value) for key, value in mlflow_fields.trial_tags(result).items() if key in _MODEL_TAGS}
    return client.create_logged_model(
        run.info.experiment_id,
        name=tags.ENGINE_MODEL_NAME,
        source_run_id=run.info.run_id,
        model_type=tags.FLAVOR,
        params={"recipe": result.recipe_text},
        tags=model_tags | {tags.ENGINE_BYTES: str(result.engine.size_bytes)},
    )


def _link(client: MlflowClient, run: Run, model: LoggedModel) -> None:
    client.set_tag(run.info.run_id, tags.ENGINE_MODEL_ID, model.model_id)
    linked = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    if model.model_id not in linked:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])


def _find_model(client: MlflowClient, model_id: str) -> LoggedModel | None:
    """Return a logged model; None if it was deleted."""
    try:
        return client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _size_bytes(model: LoggedModel) -> int:
    return int(model.tags.get(tags.ENGINE_BYTES, "0"))
