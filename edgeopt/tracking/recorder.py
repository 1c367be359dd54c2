"""Record studies and trials as MLflow runs: one run per study, one nested run per trial.

Every method searches by the tags of `edgeopt.core.mlflow_tags` for existing runs before it writes, and ends a run only
after everything was written. If a process is killed between two calls, the next call completes the run, and nothing is
logged twice.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.recipe import label
from edgeopt.core.redaction import redact_password
from edgeopt.core.result import TrialResult
from edgeopt.errors import ConfigError, TrackingError
from edgeopt.tracking import engines, mlflow_fields, run_artifacts, run_descriptions, run_search, server

if TYPE_CHECKING:
    from edgeopt.core.study_snapshot import StudySnapshot
    from edgeopt.tracking.engines import ReleasedEngine
    from edgeopt.tracking.report import SearchStatistics

Status = Literal["FINISHED", "FAILED", "KILLED"]
UI_QUERY = "?workflowType=machine_learning"
"""Query of links into the MLflow UI; without it the UI opens its pages for LLM traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLinks:
    """Addresses of a study in the MLflow UI and in the pages of edgeopt.

    Attributes:
        command: command that serves the store; empty if a server already does.
        path: path of the study's run on that server.
        url: address of the study's run.
        front_url: address of the report.
        page_url: address of the study's page that `command` serves; empty if a server already runs, because it may not
            have the pages of edgeopt.
        view_urls: addresses of the saved views of the runs page, by name.
    """

    command: str
    path: str
    url: str
    front_url: str
    page_url: str
    view_urls: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowRecorder:
    """Recorder that writes into one MLflow experiment.

    Attributes:
        tracking_uri: None uses MLflow's default: MLFLOW_TRACKING_URI, or the SQLite file mlflow.db in the working
            folder.
        experiment: name of the MLflow experiment.
        patience_s: seconds that an otherwise idle worker waits for a server that does not answer.
    """

    tracking_uri: str | None = None
    experiment: str = "edgeopt"
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.patience_s >= 0:
            raise ConfigError(
                f"`patience_s` must be at least 0 seconds, got {self.patience_s}",
                location="patience_s",
                hint="Set tracking.patience_s to 0 or more",
            )
        if not self.experiment.strip():
            raise ConfigError(
                "`experiment` must not be empty", location="experiment", hint="Set tracking.experiment to a name"
            )

    @property
    def uri(self) -> str:
        """Return the tracking URI in use."""
        return server.resolve_uri(self.tracking_uri)

    def connect(self) -> None:
        """Check that the store answers, and create its tables and the experiment if they do not exist.

        Call it once before workers start: two processes cannot create the same MLflow database.

        Raises TrackingError within about ten seconds if nothing answers.
        """
        uri = self.uri
        server.probe(uri)
        with server.connect(uri) as client:
            server.get_or_create_experiment(client, uri, self.experiment)

    def open_study(self, study: str, config: Mapping[str, Any], tag_values: Mapping[str, str]) -> str:
        """Create the run of a study, or set the run of a resumed study to RUNNING, and return its id.

        Raises ConfigError if the name contains quotes, `%` or a backslash, which MLflow's queries do not allow.
        """
        if not study or re.search(r"['\"`%\\]", study):
            raise ConfigError(
                f"the name of a study must not be empty or contain quotes, % or \\, got {study!r}",
                location="study",
                hint="Use letters, digits, - and _",
            )
        opened = datetime.now(UTC).isoformat()
        with server.connect(self.uri) as client:
            experiment = self._experiment(client)
            run = run_search.find_study(client, experiment, study)
            if run is None:
                identity = {tags.STUDY: study, tags.ROLE: "study", tags.OPENED_AT: opened}
                run = client.create_run(experiment, tags=resolve_tags(identity), run_name=study)
            elif run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            run_id = str(run.info.run_id)
            client.log_batch(
                run_id, tags=_tag_entities({**mlflow_fields.environment_tags(), **tag_values, tags.OPENED_AT: opened})
            )
            client.log_text(run_id, run_artifacts.as_yaml(config), "config.yaml")
            return run_id

    def begin(
        self,
        study: str,
        number: int,
        params: Mapping[str, Any],
        config: Mapping[str, Any],
        attempt: int = 1,
    ) -> str:
        """Return the run of an attempt at a trial, creating it and logging its params if it has not ended."""
        with server.connect(self.uri) as client:
            run = self._ensure_trial(client, study, number, params, attempt)
            if run.info.status == "RUNNING":
                run_params, _ = mlflow_fields.trial_params(config, params)
                client.log_batch(run.info.run_id, params=_new_params(run, run_params))
            return str(run.info.run_id)

    def record(
        self,
        study: str,
        number: int,
        params: Mapping[str, Any],
        config: Mapping[str, Any],
        result: TrialResult,
        *,
        attempt: int = 1,
        run_id: str = "",
        ended_s: float | None = None,
        keep_engine: bool = True,
    ) -> str:
        """Log a finished trial, end its run and return the run id. A run that has ended is not changed.

        Args:
            run_id: the run that `begin` returned, if known; saves a search.
            ended_s: when the trial ended, in seconds since 1970; now if None.
            keep_engine: store the engine of a feasible trial. Without it the run still has the config that builds it.

        Raises TrackingError if MLflow rejects a request, InputError if the engine was changed since it was built.
        """
        with server.connect(self.uri) as client:
            ended_ms = int(1000 * (time.time() if ended_s is None else ended_s))
            started_ms = ended_ms - int(1000 * sum(result.timings_s.values()))
            run = (
                client.get_run(run_id)
                if run_id
                else self._ensure_trial(client, study, number, params, attempt, started_ms)
            )
            run_id = str(run.info.run_id)
            if run.info.status != "RUNNING":
                return run_id
            tables = run_artifacts.log_artifacts(run, config, result, tracking_uri=self.uri)
            client.log_inputs(run_id, datasets=mlflow_fields.dataset_inputs(result))
            model_id = (
                engines.log_engine(client, run, result) if keep_engine and result.feasible and result.engine else None
            )
            metrics, not_finite = mlflow_fields.trial_metrics(result)
            entities = mlflow_fields.metric_entities(
                result, metrics, run_id=run_id, model_id=model_id, at_ms=run.info.start_time
            )
            run_params, truncated = mlflow_fields.trial_params(config, params)
            run_tags = mlflow_fields.trial_tags(result) | {
                "mlflow.note.content": run_descriptions.trial_description(result)
            }
            run_tags |= {MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": path, "type": "table"} for path in tables])}
            run_tags |= {tags.TRUNCATED_PARAMS: ", ".join(truncated)} if truncated else {}
            run_tags |= {tags.NOT_LOGGED: ", ".join(not_finite)} if not_finite else {}
            client.log_batch(
                run_id, metrics=entities, params=_new_params(run, run_params), tags=_tag_entities(run_tags)
            )
            if not params:
                client.update_run(run_id, name=_run_name(number, result.recipe_text))
            client.set_terminated(run_id, "FAILED" if result.failure else "FINISHED", end_time=ended_ms)
            return run_id

    def release(self, study: str, front: Collection[int], *, dry_run: bool = False) -> list[ReleasedEngine]:
        """Remove the engines of trials outside `front` from the artifact store and return them.

        Registered engines always stay. With `dry_run` nothing is removed.
        """
        with server.connect(self.uri) as client:
            return list(engines.release_engines(client, self._experiment(client), study, set(front), dry_run=dry_run))

    def kill(self, study: str, number: int, why: str, attempt: int = 1) -> None:
        """Set the RUNNING run of an attempt to KILLED, with the reason `why`; do nothing if there is no such run."""
        with server.connect(self.uri) as client:
            run = run_search.find_attempt(client, self._experiment(client), study, number, attempt)
            if run is not None and run.info.status == "RUNNING":
                client.set_tag(run.info.run_id, tags.FAILURE, why[: mlflow_fields.TAG_LENGTH])
                client.set_terminated(run.info.run_id, "KILLED")

    def progress(self, study: str, values: Mapping[str, float], step: int, at_s: float) -> None:
        """Log metrics of the study after `step` trials, as of `at_s` in seconds since 1970.

        MLflow stores a metric once if it is logged twice with the same time stamp.
        """
        at_ms = int(1000 * at_s)
        with server.connect(self.uri) as client:
            _, parent = _parent(self.uri, self.experiment, study)
            client.log_batch(parent, metrics=[Metric(name, value, at_ms, step) for name, value in values.items()])

    def publish(self, snapshot: StudySnapshot) -> None:
        """Write the current snapshot into the study's run; `close_study` writes the same file at the end."""
        from edgeopt.tracking import front

        with server.connect(self.uri) as client:
            _, parent = _parent(self.uri, self.experiment, snapshot.study)
            client.log_text(parent, front.trials_json(snapshot), front.TRIALS_FILE)

    def open_runs(self, study: str) -> dict[tuple[int, int], str]:
        """Return the ids of RUNNING runs by trial number and attempt."""
        with server.connect(self.uri) as client:
            runs = run_search.trial_runs(client, self._experiment(client), study, running=True)
            return {
                (run_search.trial_number(run), run_search.attempt_number(run)): str(run.info.run_id) for run in runs
            }

    def runs(self, study: str) -> dict[int, str]:
        """Return run ids by trial number; the newest run of a trial that was killed and repeated."""
        with server.connect(self.uri) as client:
            runs = run_search.run_by_trial(client, self._experiment(client), study)
            return {number: str(run.info.run_id) for number, run in runs.items()}

    def latest_study(self) -> str | None:
        """Return the name of the study that was opened last; None if there is no study."""
        with server.connect(self.uri) as client:
            run = run_search.find_latest_study(client, self._experiment(client))
            return None if run is None else str(run.data.tags[tags.STUDY])

    def close_study(
        self, snapshot: StudySnapshot, *, status: Status, statistics: SearchStatistics | None = None
    ) -> str:
        """Log ranks, totals, charts and tables of the front, and end the study's run with `status`.

        `statistics` are shown in the report. Returns the run id. A second call after more trials logs only the changes.
        """
        from edgeopt.tracking import front, saved_views

        with server.connect(self.uri) as client:
            parent = self._require_parent(client, snapshot.study)
            runs = run_search.run_by_trial(client, parent.info.experiment_id, snapshot.study)
            for trial in snapshot.trials:
                if trial.pareto_rank is not None and trial.number in runs:
                    _log_changed(client, runs[trial.number], {tags.PARETO_RANK: float(trial.pareto_rank)})
            _log_changed(client, parent, front.totals(snapshot))
            with tempfile.TemporaryDirectory() as scratch:
                front.write(Path(scratch), snapshot, statistics=statistics)
                client.log_artifacts(parent.info.run_id, scratch, front.FOLDER)
            views = saved_views.build_views(snapshot)
            saved_views.save_views(client, parent.info.experiment_id, views, now_ms=int(time.time() * 1000))
            client.set_tag(parent.info.run_id, "mlflow.note.content", run_descriptions.study_description(snapshot))
            client.set_terminated(parent.info.run_id, status)
            return str(parent.info.run_id)

    def study_links(self, study: str) -> StudyLinks:
        """Return the addresses of a study in the MLflow UI."""
        from edgeopt.tracking import saved_views

        uri = self.uri
        with server.connect(uri) as client:
            run = self._require_parent(client, study)
            views = saved_views.view_paths(client.get_experiment(run.info.experiment_id), study)
        page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        path, front = page + UI_QUERY, page + "/artifacts/front/front.html" + UI_QUERY
        served = server.is_server(uri)
        host = re.sub("//[^/@]*@", "//", uri).rstrip("/") if served else "http://127.0.0.1:5000"
        command = "" if served else f"edgeopt ui --tracking-uri {redact_password(uri)}"
        return StudyLinks(
            command=command,
            path=path,
            url=host + path,
            page_url="" if served else f"{host}/edgeopt/studies/{run.info.run_id}",
            front_url=host + front,
            view_urls={name: host + view for name, view in views.items()},
        )

    def _experiment(self, client: MlflowClient) -> str:
        return server.get_or_create_experiment(client, self.uri, self.experiment)

    def _require_parent(self, client: MlflowClient, study: str) -> Run:
        return client.get_run(_parent(self.uri, self.experiment, study)[1])

    def _ensure_trial(
        self,
        client: MlflowClient,
        study: str,
        number: int,
        params: Mapping[str, Any],
        attempt: int,
        started_ms: int | None = None,
    ) -> Run:
        experiment, parent = _parent(self.uri, self.experiment, study)
        existing = run_search.find_attempt(client, experiment, study, number, attempt)
        if existing is not None:
            return existing
        identity = {tags.STUDY: study, tags.ROLE: "trial", tags.TRIAL: f"{study}/{number}", tags.ATTEMPT: str(attempt)}
        return client.create_run(
            experiment,
            start_time=started_ms,
            tags=resolve_tags({**identity, "mlflow.parentRunId": parent}),
            run_name=_run_name(number, label(params) or "running"),
        )


@lru_cache(maxsize=64)
def _parent(uri: str, experiment: str, study: str) -> tuple[str, str]:
    """Return the ids of the experiment and of the study's run. They never change, so a process caches them."""
    with server.connect(uri) as client:
        experiment_id = server.get_or_create_experiment(client, uri, experiment)
        run = run_search.find_study(client, experiment_id, study)
    if run is None:
        raise TrackingError(
            f"the study {study!r} has no run in the experiment {experiment!r}",
            location=redact_password(uri),
            hint="Open the study first, or set MLFLOW_TRACKING_URI to its store",
        )
    return experiment_id, str(run.info.run_id)


def _run_name(number: int, recipe: str) -> str:
    return f"{number} · {recipe}"[: mlflow_fields.KEY_LENGTH]


def _new_params(run: Run, values: Mapping[str, str]) -> list[Param]:
    return [Param(key, value) for key, value in values.items() if key not in run.data.params]


def _tag_entities(values: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value[: mlflow_fields.TAG_LENGTH]) for key, value in values.items()]


def _log_changed(client: MlflowClient, run: Run, values: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    new = [Metric(k, v, now, 0) for k, v in values.items() if run.data.metrics.get(k) != v]
    if new:
        client.log_batch(run.info.run_id, metrics=new)
