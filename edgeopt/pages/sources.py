"""Read the data of the pages from an MLflow server through its public API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import TrialResult
from edgeopt.core.study_snapshot import Champion, ObjectiveSnapshot, StudySnapshot
from edgeopt.errors import InputError
from edgeopt.release.ledger.hash_chain import LEDGER_SUFFIX
from edgeopt.release.overview import ModelOverview, overview_of
from edgeopt.release.registry import client as registry
from edgeopt.tracking import front, run_artifacts, run_search, server

_NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
_STATES = {"RUNNING": "running", "FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}
_ENDED_COUNTS = ("trials/finished", "trials/stopped", "trials/failed", "trials/refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOverview:
    """A study in the list of studies.

    Attributes:
        state: running, finished, failed or interrupted.
        ended: count of trials that ended, with every outcome.
        opened: when the study was opened last, in UTC; empty if that is not known.
    """

    run_id: str
    name: str
    state: str
    ended: int
    feasible: int
    on_front: int
    opened: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study's run with the snapshot that was published last.

    Attributes:
        hypervolumes: hypervolume of the front after each trial, from 0 to 1.
        released: names of registered models whose champion comes from this study.
        files: paths of the artifacts in the folder `front`, which are written when the search ends.
    """

    run: Run
    snapshot: StudySnapshot
    files: frozenset[str] = frozenset()
    hypervolumes: tuple[float, ...] = ()
    released: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return str(self.run.data.tags[tags.STUDY])

    @property
    def live(self) -> bool:
        """Return True while the study runs."""
        return bool(self.run.info.status == "RUNNING")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that was logged with a run.

    Attributes:
        columns: names of the columns.
        rows: one value per column, in the order of `columns`.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial's run with its result.

    Attributes:
        layers, generations: tables of the run; without rows if the run has none.
    """

    run: Run
    result: TrialResult
    layers: Table
    generations: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A registered model with the measurements of its versions.

    Attributes:
        overview: versions, aliases and ledger.
        objectives: objectives of the studies that the versions come from.
        runs: run of the promoted trial by version; without versions whose run is on another server.
        studies: runs of the studies that the versions come from, by name.
        baseline: values of the original model by metric, in the study of the newest version.
    """

    overview: ModelOverview
    objectives: tuple[ObjectiveSnapshot, ...] = ()
    runs: Mapping[str, Run] = field(default_factory=dict)
    studies: Mapping[str, Run] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Reader of the MLflow server at `uri`.

    Methods raise UnreachableError if the server does not answer, InputError if it does not have the requested object.
    """

    uri: str

    def studies(self) -> list[StudyOverview]:
        """Return all studies, newest first."""
        with server.connect(self.uri) as client:
            return [_study_overview(run) for run in run_search.list_studies(client)]

    def study(self, run_id: str) -> Study:
        """Return a study with its last published snapshot."""
        with self._run_reader(run_id) as client:
            run = client.get_run(run_id)
            if run.data.tags.get(tags.ROLE) != "study":
                raise InputError(f"the run {run_id} must be a study", hint="Choose a study from the list")
            name = str(run.data.tags[tags.STUDY])
            history = client.get_metric_history(run_id, "progress/hypervolume")
            champions = _champions(client, name)
            return Study(
                run=run,
                snapshot=replace(_snapshot(client, run), champion=next(iter(champions), None)),
                files=frozenset(file.path for file in client.list_artifacts(run_id, front.FOLDER)),
                hypervolumes=tuple(m.value for m in sorted(history, key=lambda m: m.step)),
                released=tuple(champion.name for champion in champions),
            )

    def trial(self, run_id: str) -> Trial:
        """Return a trial that has ended."""
        with self._run_reader(run_id) as client:
            run = client.get_run(run_id)
            result = _read_json(client, run_id, "result.json", {})
            if not result:
                raise InputError(f"the run {run_id} has no result", hint="Choose trials that have ended")
            return Trial(
                run=run,
                result=TrialResult.from_json(result),
                layers=_read_table(client, run_id, "layers"),
                generations=_read_table(client, run_id, "generations"),
            )

    def models(self) -> dict[str, dict[str, str]]:
        """Return the aliases of every model that edgeopt released, by name."""
        with server.connect(self.uri) as client:
            models = {model.name: model for model in client.search_registered_models(max_results=1000)}
        released = sorted(name for name in models if f"{name}{LEDGER_SUFFIX}" in models)
        return {name: {a: str(v) for a, v in models[name].aliases.items()} for name in released}

    def release(self, name: str) -> Release:
        """Return a released model with its ledger and the measurements of its versions."""
        with server.connect(self.uri) as client:
            overview = overview_of(name, *(registry.read_model(client, n) for n in (name, name + LEDGER_SUFFIX)))
            runs = {v.version: run for v in overview.versions if (run := _find_run(client, v.run_id))}
            studies, snapshots = _studies_of(client, list(runs.values()))
            objectives = {o.metric: o for snapshot in snapshots for o in snapshot.objectives}
            return Release(
                overview=overview,
                objectives=tuple(objectives.values()),
                runs=runs,
                studies=studies,
                baseline=snapshots[0].baseline if snapshots else {},
            )

    @contextmanager
    def _run_reader(self, run_id: str) -> Iterator[MlflowClient]:
        """Yield a client; raise InputError if the run does not exist."""
        if not re.fullmatch(r"[0-9a-f]{32}", run_id):
            raise InputError(
                f"a run id must have 32 hexadecimal digits, got {run_id!r}", hint="Choose a run from the list"
            )
        with server.connect(self.uri) as client:
            try:
                yield client
            except MlflowException as error:
                if error.error_code not in _NOT_FOUND:
                    raise
                raise InputError(f"the run {run_id} does not exist", hint="Choose a run from the list") from error


def _study_overview(run: Run) -> StudyOverview:
    """Describe a study by the totals logged at its end, or else by the progress metrics of a running study."""
    metrics = run.data.metrics
    ended = metrics["trials"] if "trials" in metrics else sum(metrics.get(name, 0.0) for name in _ENDED_COUNTS)
    return StudyOverview(
        run_id=str(run.info.run_id),
        name=str(run.data.tags[tags.STUDY]),
        state=_STATES.get(run.info.status, str(run.info.status).lower()),
        ended=int(ended),
        feasible=int(metrics.get("trials_feasible", metrics.get("progress/feasible", 0.0))),
        on_front=int(metrics.get("front_size", metrics.get("progress/front", 0.0))),
        opened=run.data.tags.get(tags.OPENED_AT, "")[:16].replace("T", " "),
    )


def _snapshot(client: MlflowClient, run: Run) -> StudySnapshot:
    """Return the snapshot in a study's run; without trials if none was published yet."""
    empty = {"study": run.data.tags[tags.STUDY], "objectives": [], "limits": [], "trials": []}
    return StudySnapshot.from_json(_read_json(client, run.info.run_id, front.TRIALS_FILE, empty))


def _studies_of(client: MlflowClient, runs: list[Run]) -> tuple[dict[str, Run], list[StudySnapshot]]:
    """Return the runs and snapshots of the studies that the trials belong to, in the order of the trials."""
    studies: dict[str, Run] = {}
    for run in runs:
        name = run.data.tags.get(tags.STUDY, "")
        if name and name not in studies:
            study = run_search.find_study(client, run.info.experiment_id, name)
            studies |= {name: study} if study is not None else {}
    return studies, [_snapshot(client, study) for study in studies.values()]


def _find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return a run; None if it does not exist, for example because the version was copied from another server."""
    if not run_id:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in _NOT_FOUND:
            raise
        return None


def _champions(client: MlflowClient, study: str) -> list[Champion]:
    """Return the champions of all registered models whose champion comes from the study."""
    champions = []
    for model in client.search_registered_models(max_results=1000):
        number = model.aliases.get("champion")
        if number is None or model.name.endswith(LEDGER_SUFFIX):
            continue
        version_tags = client.get_model_version(model.name, str(number)).tags
        if version_tags.get(tags.STUDY) == study:
            trial = version_tags.get(tags.TRIAL, "").rpartition("/")[2]
            trial_number = int(trial) if trial.isdigit() else None
            champions.append(Champion(name=model.name, version=str(number), trial=trial_number))
    return champions


def _read_table(client: MlflowClient, run_id: str, name: str) -> Table:
    """Return a table of a run; an empty one if the run does not have it."""
    data = _read_json(client, run_id, f"{run_artifacts.TABLES}/{name}.json", {"columns": [], "data": []})
    return Table(columns=tuple(data["columns"]), rows=tuple(map(tuple, data["data"])))


def _read_json(client: MlflowClient, run_id: str, path: str, default: Mapping[str, Any]) -> Any:
    """Return a JSON artifact; `default` if the run does not have it."""
    folder = path.rpartition("/")[0]
    if path not in {file.path for file in client.list_artifacts(run_id, folder or None)}:
        return default
    with TemporaryDirectory() as scratch:
        return json.loads(Path(client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8"))
