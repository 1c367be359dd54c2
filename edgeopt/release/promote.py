"""Promotion: the front of a study becomes versions of one registered model, and aliases follow the policy."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from edgeopt import tags
from edgeopt.errors import GateError, InfeasibleError
from edgeopt.ports import Progress
from edgeopt.release import card, registry
from edgeopt.release.gates import ALWAYS, Candidate, GateVerdict, RequiredMetrics
from edgeopt.release.policy import Policy, find
from edgeopt.release.ranking import first

_LINK = "mlflow.modelVersions"  # by this tag the UI shows a logged model's versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One member of the front as a version; `created` is false where it was registered before."""

    number: int
    run_id: str
    version: str
    created: bool
    gates: tuple[GateVerdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What a promotion has left in the registry.

    Attributes:
        aliases: alias → version, of the policy's aliases.
        moved: those of them that pointed elsewhere before → the version before, None where it is new.
    """

    model: str
    releases: tuple[Release, ...]
    aliases: Mapping[str, str]
    moved: Mapping[str, str | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promote(
    *,
    study: str,
    rows: Sequence[Mapping[str, Any]],
    objectives: Sequence[Mapping[str, Any]],
    limits: Sequence[Mapping[str, Any]],
    policy: Policy,
    tracking_uri: str | None = None,
    folders: Sequence[Path] = (),
    progress: Progress = lambda _: None,
) -> Promotion:
    """Register every member of the front once and set the policy's aliases.

    Nothing is written unless every gate passes for every member. Called again, also after a kill, it
    completes what is missing and changes nothing else.

    Args:
        rows, objectives, limits: as `edgeopt front --json` gives them.
        folders: the user's registry folders, which may hold a model card of their own.

    Raises InfeasibleError where no trial keeps every limit, GateError with every refusal, TrackingError
    where MLflow refuses.
    """
    front = [row for row in rows if row["feasible"] and row["pareto_rank"] == 1]
    if not front:
        raise InfeasibleError(
            f"no trial of study {study!r} keeps every limit, so nothing is promoted",
            place="limits",
            mend="`edgeopt front` shows how far each trial is off: search longer, or set wider limits",
        )
    with registry.answering(tracking_uri) as client, tempfile.TemporaryDirectory() as scratch:
        candidates = []
        for row in front:
            progress(f"checking trial {row['number']}")
            candidates.append(_candidate(client, row, limits, Path(scratch)))
        verdicts = _pass_gates(candidates, policy)
        template = find("model_card.md.j2", folders)
        cards = [card.render(template, c, study=study, model=policy.model, objectives=objectives) for c in candidates]
        _ensure_model(client, policy.model)
        releases = []
        for candidate, text, seen in zip(candidates, cards, verdicts, strict=True):
            progress(f"registering trial {candidate.row['number']}")
            labels = _labels(candidate, study, policy)
            version, created = _ensure_version(client, policy.model, candidate, text, labels)
            number, run_id = candidate.row["number"], candidate.run_id
            releases.append(Release(number=number, run_id=run_id, version=version, created=created, gates=seen))
        aliases, moved = _set_aliases(client, policy, front, releases)
    return Promotion(model=policy.model, releases=tuple(releases), aliases=aliases, moved=moved)


def _candidate(
    client: MlflowClient, row: Mapping[str, Any], limits: Sequence[Mapping[str, Any]], scratch: Path
) -> Candidate:
    """The member with its logged model, which is downloaded into `scratch` unless it lies on this machine."""
    run_id = row["run_id"] or ""
    bare = Candidate(
        row=row,
        limits=limits,
        run_id=run_id,
        run_tags={},
        model_id="",
        folder=None,
        missing="the trial has no MLflow run in this store",
    )
    if not run_id:
        return bare
    run = client.get_run(run_id)
    query = f"source_run_id = '{run_id}' AND name = '{tags.ENGINE}'"
    models = [m for m in client.search_logged_models([run.info.experiment_id], query) if str(m.status) == "READY"]
    found = replace(bare, run_tags=run.data.tags)
    if not models:
        return replace(found, missing="its run holds no engine that was logged completely")
    model_id = str(models[0].model_id)
    local = Path(models[0].artifact_location.removeprefix("file://"))
    try:
        target = None if local.is_dir() else str(scratch / model_id)
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=target))
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        return replace(found, model_id=model_id, missing=f"its artifacts cannot be fetched ({reason})")
    return replace(found, model_id=model_id, folder=folder, missing="")


def _pass_gates(candidates: Sequence[Candidate], policy: Policy) -> list[tuple[GateVerdict, ...]]:
    """The verdicts of all gates by candidate; GateError lists every refusal."""
    ranked = sorted({criterion.metric for criteria in policy.aliases.values() for criterion in criteria})
    gates = (*ALWAYS, RequiredMetrics(metrics=tuple(ranked)), *policy.gates)
    verdicts = [tuple(gate.check(candidate) for gate in gates) for candidate in candidates]
    refusals = [
        f"trial {candidate.row['number']}, {verdict.gate}: {verdict.evidence}"
        for candidate, seen in zip(candidates, verdicts, strict=True)
        for verdict in dict.fromkeys(seen)
        if not verdict.passed
    ]
    if refusals:
        what = f"nothing was promoted, {len(refusals)} refused: {'; '.join(refusals)}"
        raise GateError(what, place=f"registry policy {policy.name}")
    return verdicts


def _labels(candidate: Candidate, study: str, policy: Policy) -> dict[str, str]:
    inherited = (tags.RECIPE, tags.RECIPE_DIGEST, tags.ENGINE_DIGEST, tags.TARGET, tags.DEVICE, tags.EMULATED)
    found = {key: candidate.run_tags[key] for key in inherited if key in candidate.run_tags}
    return {
        **policy.tags,
        **found,
        tags.STUDY: study,
        tags.TRIAL: f"{study}/{candidate.row['number']}",
        "edgeopt.policy": policy.name,
    }


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description="Engines that edgeopt compressed, measured and promoted.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _ensure_version(
    client: MlflowClient, model: str, candidate: Candidate, text: str, labels: Mapping[str, str]
) -> tuple[str, bool]:
    """The version of this run and engine, with tags and description up to date; and whether it was made now."""
    digest = labels[tags.ENGINE_DIGEST]
    known = client.search_model_versions(f"name = '{model}' and run_id = '{candidate.run_id}'")
    version = next((v for v in known if v.tags.get(tags.ENGINE_DIGEST) == digest), None)
    created = version is None
    if version is None:
        version = client.create_model_version(
            model,
            f"models:/{candidate.model_id}",
            candidate.run_id,
            tags=dict(labels),
            description=text,
            model_id=candidate.model_id,
        )
    else:
        if version.description != text:
            client.update_model_version(model, version.version, text)
        for key, value in labels.items():
            if version.tags.get(key) != value:
                client.set_model_version_tag(model, version.version, key, value)
    _link(client, candidate.model_id, model, str(version.version))
    return str(version.version), created


def _link(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Let the UI show on the logged model that it is registered, as MLflow's own register_model does."""
    linked = json.loads(client.get_logged_model(model_id).tags.get(_LINK, "[]"))
    if not any(entry["name"] == name and str(entry["version"]) == version for entry in linked):
        client.set_logged_model_tags(model_id, {_LINK: json.dumps([*linked, {"name": name, "version": version}])})


def _set_aliases(
    client: MlflowClient, policy: Policy, front: Sequence[Mapping[str, Any]], releases: Sequence[Release]
) -> tuple[dict[str, str], dict[str, str | None]]:
    versions = {release.number: release.version for release in releases}
    before = registry.aliases(client, policy.model)
    wanted = {alias: versions[first(front, criteria)] for alias, criteria in policy.aliases.items()}
    moved: dict[str, str | None] = {}
    for alias, version in wanted.items():
        if before.get(alias) != version:
            client.set_registered_model_alias(policy.model, alias, version)
            moved[alias] = before.get(alias)
    return wanted, moved
