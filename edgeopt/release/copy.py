"""Copy: a version goes from one registry to another with its digest, its signature and the evidence for it."""

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
from edgeopt.release.ledger.ledger import Ledger
from edgeopt.release.ledger.operation import DESCRIPTION, OPERATION, Desk
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.verify import verify

_ORIGIN = "edgeopt.copied_from"
"""Tag of a version: registry, name and number of the one that it is a copy of."""
_KEY = "edgeopt.copy"
"""Tag of a logged model: of what it is a copy, and for which registered model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A version and the one that it was copied from; `created` is false where it was copied before."""

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
    """Register a version in the registry `destination_uri` too, and let `aliases` point at it there.

    It is verified first. Called again, also after a kill, it completes what is missing and copies nothing twice.

    Args:
        experiment: id of the one that holds the copied engine there.
        name: of the registered model there; the same where it is empty.
    """
    with tempfile.TemporaryDirectory() as scratch:
        progress("fetching and verifying")
        with registry.answering(tracking_uri) as client:
            source_uri = mlflow.get_tracking_uri()
            if source_uri == destination_uri:
                raise InputError(
                    "this is the registry that the version is in", location="--to", hint="Name another one"
                )
            version = reference.find(client)
            pinned = Reference(name=version.name, version=str(version.version))
            found = verify(pinned, public_key=public_key, destination=Path(scratch), tracking_uri=tracking_uri)
            engine = found.require()
            evidence = _evidence(client, pinned)
        origin = f"{redact_password(source_uri)} {pinned.name}/{pinned.version}"
        with registry.answering(destination_uri) as client:
            desk = Desk(client, name or pinned.name, progress)
            with desk.operation("copy", reason, origin=origin, evidence=evidence):
                progress("copying")
                made, created = _ensure_version(desk, version, experiment, Path(scratch), origin)
                desk.register(made)
                desk.move({alias: str(made.version) for alias in aliases})
    return Copy(origin=origin, model=desk.model, version=str(made.version), digest=engine.digest, created=created)


def _evidence(client: MlflowClient, pinned: Reference) -> list[dict[str, Any]]:
    """The entries of the ledger that speak of this version, and the verdicts on its trial."""
    entries = Ledger(client, pinned.name).read().entries
    trials = [e.facts["trial"] for e in entries if e.facts.get("version") == pinned.version and "trial" in e.facts]
    trial = trials[0].rpartition("/")[2] if trials else None
    found = []
    for entry in entries:
        if entry.facts.get("version") == pinned.version:
            found.append(entry.to_json())
        elif trial in entry.facts.get("verdicts", {}):
            found.append(entry.to_json() | {"facts": {"verdicts": entry.facts["verdicts"][trial]}})
    return found


def _ensure_version(
    desk: Desk, version: ModelVersion, experiment: str, scratch: Path, origin: str
) -> tuple[ModelVersion, bool]:
    """The copy in the registry of `desk`, and whether it was made now."""
    client = desk.client
    for known in registry.versions(client, desk.model):
        if known.tags.get(_ORIGIN) == origin:
            return known, False
    registry.ensure_model(client, desk.model, DESCRIPTION)
    folder = next(scratch.rglob(MLMODEL_FILE_NAME)).parent
    model_id = _upload(client, experiment, folder, f"{origin} as {desk.model}")
    labels: Mapping[str, str] = {k: v for k, v in version.tags.items() if k != OPERATION}
    made = client.create_model_version(
        desk.model,
        f"models:/{model_id}",
        tags={**labels, _ORIGIN: origin, **desk.mark},
        description=version.description,
        model_id=model_id,
    )
    return made, True


def _upload(client: MlflowClient, experiment: str, folder: Path, key: str) -> str:
    """The id of the logged model `key` in an experiment, which holds the MLflow model in `folder`."""
    query = f"name = '{tags.ENGINE_MODEL_NAME}' AND tags.`{_KEY}` = '{key}'"
    found = client.search_logged_models([experiment], query, max_results=1)
    model = found[0] if found else client.create_logged_model(experiment, name=tags.ENGINE_MODEL_NAME, tags={_KEY: key})
    if str(model.status) != "READY":
        description = Model.load(str(folder))
        description.model_id, description.model_uuid = model.model_id, model.model_id
        description.artifact_path, description.run_id = model.artifact_location, None
        description.save(str(folder / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)
