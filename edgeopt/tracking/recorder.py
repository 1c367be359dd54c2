"""Studies and trials as MLflow runs: one run a study, one nested run a trial, each logged once.

Every method looks up what is already there by the tags of `edgeopt.core.mlflow_tags` before it writes, and a run
is ended only when all of it is written. A process killed between any two calls therefore leaves runs
that the next call completes, and nothing twice.
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
from edgeopt.tracking import cards, engines, files, lookup, mlflow_fields, server

if TYPE_CHECKING:
    from edgeopt.core.study_snapshot import StudySnapshot
    from edgeopt.tracking.engines import Released
    from edgeopt.tracking.report import Course

Status = Literal["FINISHED", "FAILED", "KILLED"]
MODE = "?workflowType=machine_learning"  # else the UI opens its pages for chats and agents


@dataclass(frozen=True, slots=True, kw_only=True)
class UiHint:
    """How to see a study in the MLflow UI.

    Attributes:
        command: serves its store; empty where a server already does.
        path: of the study's page on that server.
        url, front_url: the study's page and the picture of its front.
        page_url: the page on which `command` shows the study; empty where a server already runs, which may have none.
        view_urls: saved views of the runs page by name.
    """

    command: str
    path: str
    url: str
    front_url: str
    page_url: str
    view_urls: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowRecorder:
    """Records into one MLflow experiment.

    Attributes:
        tracking_uri: None takes what MLflow itself resolves: MLFLOW_TRACKING_URI, or the SQLite file
            mlflow.db in the working folder.
        patience_s: how long a worker that has nothing else to do waits for a server that does not answer.
    """

    tracking_uri: str | None = None
    experiment: str = "edgeopt"
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.patience_s >= 0:
            raise ConfigError(f"{self.patience_s} is no time to wait", location="patience_s", hint="Give 0 or more")
        if not self.experiment.strip():
            raise ConfigError("an experiment needs a name", location="experiment", hint="Set tracking.experiment")

    @property
    def uri(self) -> str:
        return server.resolve(self.tracking_uri)

    def connect(self) -> None:
        """Make sure that the store answers and has its tables and the experiment.

        Call it once before workers start: MLflow cannot create one database from two processes.
        Raises TrackingError within some ten seconds where nothing answers.
        """
        uri = self.uri
        server.probe(uri)
        with server.answering(uri) as client:
            server.experiment(client, uri, self.experiment)

    def open_study(self, study: str, config: Mapping[str, Any], tag_values: Mapping[str, str]) -> str:
        """The run of `study`, RUNNING: a new one, or that of the study that is resumed."""
        if not study or re.search(r"['\"`%\\]", study):
            raise ConfigError(f"{study!r} cannot name a study", location="study", hint="Use letters, digits, - and _")
        opened = datetime.now(UTC).isoformat()
        with server.answering(self.uri) as client:
            experiment = self._experiment(client)
            run = lookup.study(client, experiment, study)
            if run is None:
                identity = {tags.STUDY: study, tags.ROLE: "study", tags.OPENED_AT: opened}
                run = client.create_run(experiment, tags=resolve_tags(identity), run_name=study)
            elif run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            run_id = str(run.info.run_id)
            client.log_batch(
                run_id, tags=_run_tags({**mlflow_fields.surroundings(), **tag_values, tags.OPENED_AT: opened})
            )
            client.log_text(run_id, files.as_yaml(config), "config.yaml")
            return run_id

    def begin(
        self,
        study: str,
        number: int,
        params: Mapping[str, Any],
        config: Mapping[str, Any],
        attempt: int = 1,
    ) -> str:
        """The run of an attempt at a trial, which starts now. An ended run is returned as it is."""
        with server.answering(self.uri) as client:
            run = self._ensure_trial(client, study, number, params, attempt)
            if run.info.status == "RUNNING":
                kept, _ = mlflow_fields.trial_params(config, params)
                client.log_batch(run.info.run_id, params=_new_params(run, kept))
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
        """Log a finished trial whole and end its run; a run that has ended is left as it is.

        `run_id` is what `begin` returned, where that is known: it saves looking for it. `ended_s` is when the trial
        was over, in seconds since 1970, where that is not now. The engine of a feasible trial goes into the artifact
        store, unless nobody wants to `keep_engine`: the run has what it takes to build it again.
        Raises TrackingError where MLflow refuses, InputError where the engine was changed since it was built.
        """
        with server.answering(self.uri) as client:
            ended_ms = int(1000 * (time.time() if ended_s is None else ended_s))
            began_ms = ended_ms - int(1000 * sum(result.timings_s.values()))
            run = (
                client.get_run(run_id)
                if run_id
                else self._ensure_trial(client, study, number, params, attempt, began_ms)
            )
            run_id = str(run.info.run_id)
            if run.info.status != "RUNNING":
                return run_id
            tables = files.log(run, config, result, tracking_uri=self.uri)
            client.log_inputs(run_id, datasets=mlflow_fields.datasets(result))
            model_id = engines.keep(client, run, result) if keep_engine and result.feasible and result.engine else None
            metrics, left_out = mlflow_fields.metrics(result)
            entities = mlflow_fields.metric_entities(
                result, metrics, run_id=run_id, model_id=model_id, at_ms=run.info.start_time
            )
            kept, cut = mlflow_fields.trial_params(config, params)
            labels = mlflow_fields.trial_tags(result) | {"mlflow.note.content": cards.trial(result)}
            labels |= {MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": path, "type": "table"} for path in tables])}
            labels |= {tags.TRUNCATED_PARAMS: ", ".join(cut)} if cut else {}
            labels |= {tags.NOT_LOGGED: ", ".join(left_out)} if left_out else {}
            client.log_batch(run_id, metrics=entities, params=_new_params(run, kept), tags=_run_tags(labels))
            if not params:
                client.update_run(run_id, name=_name(number, result.recipe.get("text", "")))
            client.set_terminated(run_id, "FAILED" if result.failure else "FINISHED", end_time=ended_ms)
            return run_id

    def release(self, study: str, front: Collection[int], *, dry_run: bool = False) -> list[Released]:
        """Remove the engines of trials that are not in `front` from the artifact store, registered ones never.

        With `dry_run` nothing is changed, and what would be is returned.
        """
        with server.answering(self.uri) as client:
            return list(engines.release(client, self._experiment(client), study, set(front), dry_run=dry_run))

    def kill(self, study: str, number: int, why: str, attempt: int = 1) -> None:
        """End the RUNNING run of an attempt as KILLED; an attempt without one is left alone."""
        with server.answering(self.uri) as client:
            run = lookup.attempt(client, self._experiment(client), study, number, attempt)
            if run is not None and run.info.status == "RUNNING":
                client.set_tag(run.info.run_id, tags.FAILURE, why[: mlflow_fields.TAG_LENGTH])
                client.set_terminated(run.info.run_id, "KILLED")

    def progress(self, study: str, values: Mapping[str, float], step: int, at_s: float) -> None:
        """Log figures of the study itself after `step` trials, as they were at a time in seconds since 1970."""
        at_ms = int(1000 * at_s)  # MLflow keeps a figure once that it is told twice with one time stamp
        with server.answering(self.uri) as client:
            _, parent = _parent(self.uri, self.experiment, study)
            client.log_batch(parent, metrics=[Metric(name, value, at_ms, step) for name, value in values.items()])

    def publish(self, snapshot: StudySnapshot) -> None:
        """Write all trials as they are now into the study's run; `close_study` writes the same file at the end."""
        from edgeopt.tracking import front

        with server.answering(self.uri) as client:
            _, parent = _parent(self.uri, self.experiment, snapshot.study)
            client.log_text(parent, front.trials(snapshot), front.TRIALS)

    def open_runs(self, study: str) -> dict[tuple[int, int], str]:
        """Trial number and attempt → run id of the runs that are still RUNNING."""
        with server.answering(self.uri) as client:
            found = lookup.trials(client, self._experiment(client), study, running=True)
            return {(lookup.number(run), lookup.attempt_of(run)): str(run.info.run_id) for run in found}

    def runs(self, study: str) -> dict[int, str]:
        """Trial number → run id; of a trial that was killed and run again, the later run."""
        with server.answering(self.uri) as client:
            found = lookup.by_number(client, self._experiment(client), study)
            return {number: str(run.info.run_id) for number, run in found.items()}

    def latest_study(self) -> str | None:
        """The study that was opened last; None where there is none."""
        with server.answering(self.uri) as client:
            run = lookup.latest_study(client, self._experiment(client))
            return None if run is None else str(run.data.tags[tags.STUDY])

    def close_study(self, snapshot: StudySnapshot, *, status: Status, course: Course | None = None) -> str:
        """Log ranks, totals, charts and tables of the front, and end the study's run with `status`.

        `course` is for the report. A second call after more trials logs only what has changed. Returns the run id.
        """
        from edgeopt.tracking import front, saved_views

        with server.answering(self.uri) as client:
            parent = self._require_parent(client, snapshot.study)
            runs = lookup.by_number(client, parent.info.experiment_id, snapshot.study)
            for trial in snapshot.trials:
                if trial.pareto_rank is not None and trial.number in runs:
                    _log_changed(client, runs[trial.number], {tags.PARETO_RANK: float(trial.pareto_rank)})
            _log_changed(client, parent, front.totals(snapshot))
            with tempfile.TemporaryDirectory() as scratch:
                front.write(Path(scratch), snapshot, course=course)
                client.log_artifacts(parent.info.run_id, scratch, front.FOLDER)
            views = saved_views.views(snapshot)
            saved_views.write(client, parent.info.experiment_id, views, now_ms=int(time.time() * 1000))
            client.set_tag(parent.info.run_id, "mlflow.note.content", cards.study(snapshot))
            client.set_terminated(parent.info.run_id, status)
            return str(parent.info.run_id)

    def ui_hint(self, study: str) -> UiHint:
        """How to open the run of `study` in the MLflow UI."""
        from edgeopt.tracking import saved_views

        uri = self.uri
        with server.answering(uri) as client:
            run = self._require_parent(client, study)
            views = saved_views.paths(client.get_experiment(run.info.experiment_id), study)
        page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        path, front = page + MODE, page + "/artifacts/front/front.html" + MODE
        served = uri.startswith(("http://", "https://"))
        host = re.sub("//[^/@]*@", "//", uri).rstrip("/") if served else "http://127.0.0.1:5000"
        command = "" if served else f"edgeopt ui --tracking-uri {redact_password(uri)}"
        return UiHint(
            command=command,
            path=path,
            url=host + path,
            page_url="" if served else f"{host}/edgeopt/studies/{run.info.run_id}",
            front_url=host + front,
            view_urls={name: host + view for name, view in views.items()},
        )

    def _experiment(self, client: MlflowClient) -> str:
        return server.experiment(client, self.uri, self.experiment)

    def _require_parent(self, client: MlflowClient, study: str) -> Run:
        return client.get_run(_parent(self.uri, self.experiment, study)[1])

    def _ensure_trial(
        self,
        client: MlflowClient,
        study: str,
        number: int,
        params: Mapping[str, Any],
        attempt: int,
        began_ms: int | None = None,
    ) -> Run:
        experiment, parent = _parent(self.uri, self.experiment, study)
        known = lookup.attempt(client, experiment, study, number, attempt)
        if known is not None:
            return known
        identity = {tags.STUDY: study, tags.ROLE: "trial", tags.TRIAL: f"{study}/{number}", tags.ATTEMPT: str(attempt)}
        return client.create_run(
            experiment,
            start_time=began_ms,
            tags=resolve_tags({**identity, "mlflow.parentRunId": parent}),
            run_name=_name(number, label(params) or "running"),
        )


@lru_cache(maxsize=64)
def _parent(uri: str, experiment: str, study: str) -> tuple[str, str]:
    """Ids of the experiment and of the study's run in it, which never change: they are looked up once a process."""
    with server.answering(uri) as client:
        known = server.experiment(client, uri, experiment)
        run = lookup.study(client, known, study)
    if run is None:
        raise TrackingError(
            f"study {study!r} has no run in experiment {experiment!r}",
            location=redact_password(uri),
            hint="Open it first, or set MLFLOW_TRACKING_URI to the store that holds it",
        )
    return known, str(run.info.run_id)


def _name(number: int, what: str) -> str:
    return f"{number} · {what}"[: mlflow_fields.KEY_LENGTH]


def _new_params(run: Run, values: Mapping[str, str]) -> list[Param]:
    return [Param(key, value) for key, value in values.items() if key not in run.data.params]


def _run_tags(values: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value[: mlflow_fields.TAG_LENGTH]) for key, value in values.items()]


def _log_changed(client: MlflowClient, run: Run, values: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    new = [Metric(k, v, now, 0) for k, v in values.items() if run.data.metrics.get(k) != v]
    if new:
        client.log_batch(run.info.run_id, metrics=new)
