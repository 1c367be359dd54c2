"""Copy a version to another registry with its digest, its signature and the evidence in its ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.protocols import Progress
from edgeopt.core.redaction import redact_password
from edgeopt.errors import InputError
from edgeopt.release.ledger.events import Approved, Judged, Registered, Revoked
from edgeopt.release.ledger.ledger import Ledger
from edgeopt.release.ledger.operation import MODEL_DESCRIPTION, OPERATION_TAG, ReleaseOperation
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.verify import verify

_ORIGIN_TAG = "edgeopt.copied_from"
"""Tag of a copied version: registry, name and number of the original."""
_COPY_TAG = "edgeopt.copy"
"""Tag of a copied logged model: the original version and the registered model of the copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Result of a copy.

    Attributes:
        origin: registry, name and number of the original version.
        model, version: registered model and version of the copy.
        created: False if the version was copied before.
    """

    origin: str
    model: str
    version: str
    digest: str
    created: bool


def copy(
    reference: Reference,
    destination_uri: str,
    experiment: str,
    *,
    name: str = "",
    aliases: tuple[str, ...] = (),
    reason: str = "",
    public_key: Path | None = None,
    tracking_uri: str | None = None,
    progress: Progress = lambda _: None,
) -> Copy:
    """Verify a version, register it in the registry `destination_uri`, and set `aliases` there.

    A second call, also after a kill, completes what is missing and copies nothing twice.

    Args:
        experiment: id of the destination's experiment for the copied engine.
        name: registered model at the destination. Default: the same name.

    Raises:
        InputError: the version does not exist, or it is already in that registry.
        GateError: a check failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        progress("downloading and verifying")
        with registry.connect(tracking_uri) as client:
            source_uri = mlflow.get_tracking_uri()
            if source_uri == destination_uri:
                raise InputError(
                    "the destination must be another registry than the source", location="--to", hint="Give another URI"
                )
            version = reference.find(client)
            pinned = Reference(name=version.name, version=str(version.version))
            verification = verify(pinned, public_key=public_key, destination=Path(scratch), tracking_uri=tracking_uri)
            engine = verification.require()
            evidence = _evidence(client, pinned)
        origin = f"{redact_password(source_uri)} {pinned.name}/{pinned.version}"
        with registry.connect(destination_uri) as client:
            operation = ReleaseOperation(client, name or pinned.name, progress)
            with operation.run("copy", reason, origin=origin, evidence=evidence):
                progress("copying")
                copied, created = _ensure_version(operation, version, experiment, Path(scratch), origin)
                operation.register(copied)
                operation.move({alias: str(copied.version) for alias in aliases})
    return Copy(
        origin=origin, model=operation.model, version=str(copied.version), digest=engine.digest, created=created
    )


def _evidence(client: MlflowClient, pinned: Reference) -> tuple[dict[str, Any], ...]:
    """Return the ledger entries about this version, and the verdicts on its trial."""
    entries = [(entry, entry.event) for entry in Ledger(client, pinned.name).read().entries]
    registrations = [e for _, e in entries if isinstance(e, Registered) and e.version == pinned.version]
    trial = registrations[0].trial.rpartition("/")[2] if registrations else ""
    evidence = []
    for entry, event in entries:
        if isinstance(event, Registered | Approved | Revoked) and event.version == pinned.version:
            evidence.append(entry.to_json())
        elif isinstance(event, Judged) and trial in event.verdicts:
            evidence.append(entry.to_json() | {"facts": {"verdicts": event.verdicts[trial]}})
    return tuple(evidence)


def _ensure_version(
    operation: ReleaseOperation, version: ModelVersion, experiment: str, scratch: Path, origin: str
) -> tuple[ModelVersion, bool]:
    """Return the copy in the destination registry, and True if it was created."""
    client = operation.client
    for existing in registry.versions(client, operation.model):
        if existing.tags.get(_ORIGIN_TAG) == origin:
            return existing, False
    registry.ensure_model(client, operation.model, MODEL_DESCRIPTION)
    folder = next(scratch.rglob(MLMODEL_FILE_NAME)).parent
    model_id = _upload(client, experiment, folder, f"{origin} as {operation.model}")
    version_tags: Mapping[str, str] = {k: v for k, v in version.tags.items() if k != OPERATION_TAG}
    copied = client.create_model_version(
        operation.model,
        f"models:/{model_id}",
        tags={**version_tags, _ORIGIN_TAG: origin, **operation.version_tags},
        description=version.description,
        model_id=model_id,
    )
    return copied, True


def _upload(client: MlflowClient, experiment: str, folder: Path, key: str) -> str:
    """Upload the MLflow model in `folder` as the logged model `key`, unless it exists, and return its id."""
    query = f"name = '{tags.ENGINE_MODEL_NAME}' AND tags.`{_COPY_TAG}` = '{key}'"
    existing = client.search_logged_models([experiment], query, max_results=1)
    if existing:
        model = existing[0]
    else:
        model = client.create_logged_model(experiment, name=tags.ENGINE_MODEL_NAME, tags={_COPY_TAG: key})
    if str(model.status) != "READY":
        description = Model.load(str(folder))
        description.model_id, description.model_uuid = model.model_id, model.model_id
        description.artifact_path, description.run_id = model.artifact_location, None
        description.save(str(folder / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)
