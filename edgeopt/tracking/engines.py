"""Engines in the artifact store: each is there once, for as long as a run on a front or a registered version needs it.

A run that keeps an engine names the logged model in the tag `tags.ENGINE_MODEL_ID`, and runs with equal engines
share one; the manifest counts too, since it says how an engine is opened. Who keeps and who releases the same model at
the same time each write their own mark before they read the other's, so that one of them gives way.
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
from edgeopt.tracking import flavor, lookup, mlflow_fields

_MODEL_TAGS = (
    tags.RECIPE,
    tags.RECIPE_DIGEST,
    tags.ENGINE_DIGEST,
    tags.MANIFEST_SHA256,
    tags.TARGET,
    tags.EMULATED,
)
_RELEASED = "edgeopt.released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """An engine that a run does not need any more.

    Attributes:
        freed_bytes: of its files; 0 where another run or a registered version still needs them.
    """

    trial: int
    run_id: str
    model_id: str
    freed_bytes: int


def keep(client: MlflowClient, run: Run, result: TrialResult) -> str:
    """The id of the logged model that holds a trial's engine, uploaded where no other run has logged the same."""
    assert result.engine is not None
    for model in _complete(client, run, str(result.engine["manifest_sha256"])):
        _link(client, run, model)
        if _RELEASED not in client.get_logged_model(model.model_id).tags:
            return str(model.model_id)
    model = _own(client, run, result)
    if str(model.status) != "READY":
        flavor.upload(client, model, Path(result.engine["directory"]), run_id=run.info.run_id)
    _link(client, run, model)
    return str(model.model_id)


def release(
    client: MlflowClient, experiment: str, study: str, front: set[int], *, dry_run: bool = False
) -> Iterator[Released]:
    """Release the engines of the study's trials that are not in `front`, unless they are registered; tell each."""
    for run in list(lookup.keeping(client, experiment, study)):
        model_id, trial = run.data.tags[tags.ENGINE_MODEL_ID], lookup.number(run)
        if trial in front:
            continue
        model = _find(client, model_id)
        if model is not None and tags.MODEL_VERSIONS in model.tags:
            continue
        freed = 0 if model is None or _shared(client, experiment, run, model) else _size(model)
        if not dry_run:
            if model is not None and freed:
                freed = _remove(client, experiment, run, model)
            client.set_tag(run.info.run_id, tags.ENGINE_MODEL_ID, "")
        yield Released(trial=trial, run_id=str(run.info.run_id), model_id=model_id, freed_bytes=freed)


def _remove(client: MlflowClient, experiment: str, run: Run, model: LoggedModel) -> int:
    """Remove a logged model with its files, unless another run began to keep it meanwhile; the bytes that it freed."""
    client.set_logged_model_tags(model.model_id, {_RELEASED: str(run.info.run_id)})
    if _shared(client, experiment, run, model):
        client.delete_logged_model_tag(model.model_id, _RELEASED)
        return 0
    get_artifact_repository(model.artifact_location, client.tracking_uri).delete_artifacts()
    client.delete_logged_model(model.model_id)
    return _size(model)


def _shared(client: MlflowClient, experiment: str, run: Run, model: LoggedModel) -> bool:
    """Whether another run keeps this model too."""
    return any(r.info.run_id != run.info.run_id for r in lookup.keepers(client, experiment, str(model.model_id)))


def _complete(client: MlflowClient, run: Run, manifest_sha256: str) -> list[LoggedModel]:
    """Logged models of the experiment that hold the engine of this manifest whole, this run's own first."""
    query = f"tags.`{tags.MANIFEST_SHA256}` = '{manifest_sha256}' AND name = '{tags.ENGINE_MODEL_NAME}'"
    found = client.search_logged_models([run.info.experiment_id], query)
    whole = [model for model in found if str(model.status) == "READY" and _RELEASED not in model.tags]
    return sorted(whole, key=lambda model: model.source_run_id != run.info.run_id)


def _own(client: MlflowClient, run: Run, result: TrialResult) -> LoggedModel:
    """The logged model that this run began, or begins now."""
    query = f"source_run_id = '{run.info.run_id}' AND name = '{tags.ENGINE_MODEL_NAME}'"
    begun = [m for m in client.search_logged_models([run.info.experiment_id], query) if _RELEASED not in m.tags]
    if begun:
        return begun[0]
    assert result.engine is not None
    labels = {key: str(value) for key, value in mlflow_fields.trial_tags(result).items() if key in _MODEL_TAGS}
    return client.create_logged_model(
        run.info.experiment_id,
        name=tags.ENGINE_MODEL_NAME,
        source_run_id=run.info.run_id,
        model_type=tags.FLAVOR,
        params={"recipe": str(result.recipe.get("text", ""))},
        tags=labels | {tags.ENGINE_BYTES: str(result.engine["size_bytes"])},
    )


def _link(client: MlflowClient, run: Run, model: LoggedModel) -> None:
    client.set_tag(run.info.run_id, tags.ENGINE_MODEL_ID, model.model_id)
    known = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    if model.model_id not in known:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])


def _find(client: MlflowClient, model_id: str) -> LoggedModel | None:
    """None where it was deleted."""
    try:
        return client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _size(model: LoggedModel) -> int:
    return int(model.tags.get(tags.ENGINE_BYTES, "0"))
