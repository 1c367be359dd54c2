"""Find the MLflow runs of studies and trials by their tags."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Run

from edgeopt.core import mlflow_tags as tags

_PAGE_SIZE = 1000


def find_study(client: MlflowClient, experiment: str, name: str) -> Run | None:
    """Return the run of the study `name`; None if it has none."""
    return next(_search(client, experiment, f"tags.`{tags.ROLE}` = 'study' and tags.`{tags.STUDY}` = '{name}'"), None)


def list_studies(client: MlflowClient) -> list[Run]:
    """Return the runs of studies in all experiments, newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    order = ["attributes.start_time DESC"]
    return list(client.search_runs(experiments, f"tags.`{tags.ROLE}` = 'study'", order_by=order))


def find_latest_study(client: MlflowClient, experiment: str) -> Run | None:
    """Return the run of the study that was opened last; None if the experiment has no study."""
    order = [f"tags.`{tags.OPENED_AT}` DESC"]
    runs = client.search_runs([experiment], f"tags.`{tags.ROLE}` = 'study'", max_results=1, order_by=order)
    return runs[0] if runs else None


def trial_runs(client: MlflowClient, experiment: str, study: str, *, running: bool = False) -> Iterator[Run]:
    """Yield the runs of the trials of a study, newest first; with `running`, only those that are RUNNING."""
    query = f"tags.`{tags.ROLE}` = 'trial' and tags.`{tags.STUDY}` = '{study}'"
    return _search(client, experiment, query + (" and attributes.status = 'RUNNING'" if running else ""))


def find_attempt(client: MlflowClient, experiment: str, study: str, trial: int, attempt: int) -> Run | None:
    """Return the run of one attempt at a trial; None if it has none."""
    runs = _search(client, experiment, f"tags.`{tags.TRIAL}` = '{study}/{trial}'")
    return next((run for run in runs if attempt_number(run) == attempt), None)


def runs_with_engine(client: MlflowClient, experiment: str, study: str) -> Iterator[Run]:
    """Yield the runs of a study whose engine is in the artifact store."""
    query = f"tags.`{tags.ROLE}` = 'trial' and tags.`{tags.STUDY}` = '{study}'"
    return _search(client, experiment, f"{query} and tags.`{tags.ENGINE_MODEL_ID}` LIKE 'm-%'")


def runs_sharing_engine(client: MlflowClient, experiment: str, model_id: str) -> Iterator[Run]:
    """Yield the runs of all studies that refer to the engine in a logged model."""
    return _search(client, experiment, f"tags.`{tags.ENGINE_MODEL_ID}` = '{model_id}'")


def run_by_trial(client: MlflowClient, experiment: str, study: str) -> dict[int, Run]:
    """Return the run of each trial by trial number.

    If a trial has several runs, a run that was not killed is preferred, then the newest.
    """
    runs: dict[int, Run] = {}
    for run in trial_runs(client, experiment, study):
        number = trial_number(run)
        preferred = runs.get(number)
        if preferred is None or (preferred.info.status == "KILLED" and run.info.status != "KILLED"):
            runs[number] = run
    return dict(sorted(runs.items()))


def attempt_number(run: Run) -> int:
    """Return which attempt at its trial a run is, counted from 1."""
    return int(run.data.tags.get(tags.ATTEMPT, "1"))


def trial_number(run: Run) -> int:
    """Return the trial number in a run's tags."""
    return int(run.data.tags[tags.TRIAL].rpartition("/")[2])


def _search(client: MlflowClient, experiment: str, query: str) -> Iterator[Run]:
    order, token = ["attributes.start_time DESC"], None
    while True:
        page = client.search_runs([experiment], query, max_results=_PAGE_SIZE, order_by=order, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
