"""Load a release candidate: a trial on the front with its run, its engine and its future aliases."""

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
"""Measure an engine on this machine with the probes that give the named metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTrial:
    """A trial as recorded in its MLflow run.

    Attributes:
        run_tags: tags of the run.
        ended_s: end of the run in seconds since 1970; 0 if it did not end.
        result: the trial's result; None if the run contains no readable one.
    """

    run_id: str
    run_tags: Mapping[str, str]
    ended_s: float
    result: TrialResult | None

    def measurement(self, metric: str) -> Measurement | None:
        """Return the measurement of `metric`; None if it was not measured."""
        measurements = self.result.measurements if self.result is not None else ()
        return next((m for m in measurements if m.metric == metric), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trial on the front that may be released.

    Attributes:
        snapshot: the trial in its study.
        limits: the limits of the study.
        model_id: id of the logged model to register; empty if the run has none.
        model_folder: the logged model on this machine; None if it cannot be fetched.
        missing_reason: why `model_folder` is None; empty if it is not.
        aliases: aliases that the candidate gets if it is released.
        champion: the trial behind the present champion; None if there is none or it is this trial.
        remeasure: None if this command cannot measure engines.
    """

    snapshot: TrialSnapshot
    limits: tuple[LimitSnapshot, ...]
    trial: RecordedTrial
    model_id: str
    model_folder: Path | None
    missing_reason: str
    aliases: tuple[str, ...] = ()
    champion: RecordedTrial | None = None
    remeasure: Remeasure | None = None
    _verified: list[Engine] = field(default_factory=list, repr=False, compare=False)

    @property
    def run_tags(self) -> Mapping[str, str]:
        """Return the tags of the trial's run."""
        return self.trial.run_tags

    @property
    def run_id(self) -> str:
        """Return the id of the trial's run; empty if it has none."""
        return self.trial.run_id

    def engine(self) -> Engine:
        """Return the engine to register, after verifying its files at the first call.

        Raises EdgeoptError if the engine is missing or damaged.
        """
        if self.model_folder is None:
            raise EdgeoptError(self.missing_reason)
        if not self._verified:
            engine = Engine.read(registry.engine_folder(self.model_folder))
            engine.verify()
            self._verified.append(engine)
        return self._verified[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """Verdict of one gate or check, with the evidence for it as one sentence."""

    gate: str
    passed: bool
    evidence: str


class Gate(Protocol):
    """A condition for the release of a candidate."""

    def check(self, candidate: Candidate) -> GateVerdict:
        """Return the verdict on a candidate. A gate that cannot decide refuses; it does not raise EdgeoptError."""
        ...


def read_trial(client: MlflowClient, run: Run) -> RecordedTrial:
    """Return the trial that a run recorded."""
    run_id = str(run.info.run_id)
    return RecordedTrial(
        run_id=run_id,
        run_tags=run.data.tags,
        ended_s=(run.info.end_time or 0) / 1000,
        result=_read_result(client, run_id),
    )


def load_candidate(
    client: MlflowClient, snapshot: TrialSnapshot, limits: tuple[LimitSnapshot, ...], scratch: Path
) -> Candidate:
    """Return a trial as a candidate. Its logged model is downloaded to `scratch` unless it is on this machine."""
    run_id = snapshot.run_id or ""
    if not run_id:
        return Candidate(
            snapshot=snapshot,
            limits=limits,
            trial=RecordedTrial(run_id="", run_tags={}, ended_s=0.0, result=None),
            model_id="",
            model_folder=None,
            missing_reason="the trial has no MLflow run in this store",
        )
    run = client.get_run(run_id)
    model_id = run.data.tags.get(tags.ENGINE_MODEL_ID, "")
    model_folder, missing_reason = None, "the trial's run contains no engine"
    if model_id:
        try:
            model = client.get_logged_model(model_id)
            local = Path(model.artifact_location.removeprefix("file://"))
            target = None if local.is_dir() else str(scratch / model_id)
            model_folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=target))
        except (MlflowException, OSError) as error:
            missing_reason = f"the engine's artifacts cannot be fetched ({first_line(error)})"
    return Candidate(
        snapshot=snapshot,
        limits=limits,
        trial=read_trial(client, run),
        model_id=model_id,
        model_folder=model_folder,
        missing_reason="" if model_folder is not None else missing_reason,
    )


def _read_result(client: MlflowClient, run_id: str) -> TrialResult | None:
    try:
        path = Path(client.download_artifacts(run_id, "result.json"))
        return TrialResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (MlflowException, OSError, ValueError, KeyError, TypeError):
        return None  # a gate that needs the result refuses
