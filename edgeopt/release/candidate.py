"""What a gate sees: one member of a front with its run, its engine and what would become of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.artifact import Engine
from edgeopt.core.result import Measurement, TrialResult
from edgeopt.core.study_snapshot import LimitSnapshot, TrialSnapshot
from edgeopt.errors import EdgeoptError, first_line
from edgeopt.release.registry import client as registry

Remeasure = Callable[[Engine, Collection[str]], Sequence[Measurement]]
"""Measures an engine on this machine: the figures of those probes that give the named metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial as its MLflow run holds it.

    Attributes:
        run_tags: tags of the run.
        ended_s: when the run ended, in seconds since 1970; 0 where it did not.
        result: what was measured; None where the run holds no result that can be read.
    """

    run_id: str
    run_tags: Mapping[str, str]
    ended_s: float
    result: TrialResult | None

    def measurement(self, metric: str) -> Measurement | None:
        """The figure of `metric` with its interval; None where it was not measured."""
        found = self.result.measurements if self.result is not None else ()
        return next((m for m in found if m.metric == metric), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A member of the front.

    Attributes:
        snapshot: the trial in its study.
        limits: the limits of the study.
        model_id: the logged model that would be registered; empty where the run keeps none.
        folder: that model, downloaded; None where it could not be, for the reason in `missing`.
        aliases: those that would point at it.
        remeasure: None where nothing can be measured.
        champion: the trial behind the version that is champion now; None where there is none, or it is this one.
    """

    snapshot: TrialSnapshot
    limits: tuple[LimitSnapshot, ...]
    trial: Trial
    model_id: str
    folder: Path | None
    missing: str
    aliases: tuple[str, ...] = ()
    champion: Trial | None = None
    remeasure: Remeasure | None = None
    _verified: list[Engine] = field(default_factory=list, repr=False, compare=False)

    @property
    def run_tags(self) -> Mapping[str, str]:
        return self.trial.run_tags

    @property
    def run_id(self) -> str:
        return self.trial.run_id

    def engine(self) -> Engine:
        """The engine that would be registered, every file of it verified once, whichever gate asks first.

        Raises EdgeoptError where it is not whole.
        """
        if self.folder is None:
            raise EdgeoptError(self.missing)
        if not self._verified:
            engine = Engine.read(registry.engine_folder(self.folder))
            engine.verify()
            self._verified.append(engine)
        return self._verified[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    gate: str
    passed: bool
    evidence: str


class Gate(Protocol):
    def check(self, candidate: Candidate) -> GateVerdict: ...


def trial_of(client: MlflowClient, run: Run) -> Trial:
    """The trial of a run."""
    run_id = str(run.info.run_id)
    return Trial(
        run_id=run_id, run_tags=run.data.tags, ended_s=(run.info.end_time or 0) / 1000, result=_result(client, run_id)
    )


def candidate(
    client: MlflowClient, snapshot: TrialSnapshot, limits: tuple[LimitSnapshot, ...], scratch: Path
) -> Candidate:
    """The member with its logged model, which is downloaded into `scratch` unless it lies on this machine."""
    run_id = snapshot.run_id or ""
    if not run_id:
        missing = "the trial has no MLflow run in this store"
        none = Trial(run_id="", run_tags={}, ended_s=0.0, result=None)
        return Candidate(snapshot=snapshot, limits=limits, trial=none, model_id="", folder=None, missing=missing)
    run = client.get_run(run_id)
    model_id, folder, missing = run.data.tags.get(tags.ENGINE_MODEL_ID, ""), None, "its run keeps no engine"
    if model_id:
        try:
            model = client.get_logged_model(model_id)
            local = Path(model.artifact_location.removeprefix("file://"))
            target = None if local.is_dir() else str(scratch / model_id)
            folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=target))
        except (MlflowException, OSError) as error:
            missing = f"its artifacts cannot be fetched ({first_line(error)})"
    return Candidate(
        snapshot=snapshot,
        limits=limits,
        trial=trial_of(client, run),
        model_id=model_id,
        folder=folder,
        missing="" if folder is not None else missing,
    )


def _result(client: MlflowClient, run_id: str) -> TrialResult | None:
    try:
        path = Path(client.download_artifacts(run_id, "result.json"))
        return TrialResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (MlflowException, OSError, ValueError, KeyError, TypeError):
        return None  # a gate that wants it refuses
