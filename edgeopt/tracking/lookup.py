"""Finding the runs of studies and trials by their tags."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Run

from edgeopt.core import mlflow_tags as tags

_PAGE = 1000


def study(client: MlflowClient, experiment: str, name: str) -> Run | None:
    """The run of the study `name`."""
    return next(_search(client, experiment, f"tags.`{tags.ROLE}` = 'study' and tags.`{tags.STUDY}` = '{name}'"), None)


def studies(client: MlflowClient) -> list[Run]:
    """The runs of studies in all experiments, the latest first."""
    known = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(known, f"tags.`{tags.ROLE}` = 'study'", order_by=["attributes.start_time DESC"]))


def latest_study(client: MlflowClient, experiment: str) -> Run | None:
    """The run of the study that was opened last."""
    order = [f"tags.`{tags.OPENED_AT}` DESC"]
    found = client.search_runs([experiment], f"tags.`{tags.ROLE}` = 'study'", max_results=1, order_by=order)
    return found[0] if found else None


def trials(client: MlflowClient, experiment: str, name: str, *, running: bool = False) -> Iterator[Run]:
    """All runs of trials of the study `name`, or those alone that are RUNNING; the newest first."""
    query = f"tags.`{tags.ROLE}` = 'trial' and tags.`{tags.STUDY}` = '{name}'"
    return _search(client, experiment, query + (" and attributes.status = 'RUNNING'" if running else ""))


def attempt(client: MlflowClient, experiment: str, name: str, trial: int, number: int) -> Run | None:
    """The run of one attempt at a trial."""
    attempts = _search(client, experiment, f"tags.`{tags.TRIAL}` = '{name}/{trial}'")
    return next((run for run in attempts if attempt_of(run) == number), None)


def keeping(client: MlflowClient, experiment: str, name: str) -> Iterator[Run]:
    """The runs of the study's trials that keep an engine."""
    of_study = f"tags.`{tags.ROLE}` = 'trial' and tags.`{tags.STUDY}` = '{name}'"
    return _search(client, experiment, f"{of_study} and tags.`{tags.ENGINE_MODEL_ID}` LIKE 'm-%'")


def keepers(client: MlflowClient, experiment: str, model_id: str) -> Iterator[Run]:
    """The runs that keep the engine in a logged model, of any study."""
    return _search(client, experiment, f"tags.`{tags.ENGINE_MODEL_ID}` = '{model_id}'")


def by_number(client: MlflowClient, experiment: str, name: str) -> dict[int, Run]:
    """Trial number → run; a run that was not killed goes before one that was, a newer one before an older."""
    found: dict[int, Run] = {}
    for run in trials(client, experiment, name):
        known = found.get(number(run))
        if known is None or (known.info.status == "KILLED" and run.info.status != "KILLED"):
            found[number(run)] = run
    return dict(sorted(found.items()))


def attempt_of(run: Run) -> int:
    """Which attempt at its trial a run is."""
    return int(run.data.tags.get(tags.ATTEMPT, "1"))


def number(run: Run) -> int:
    """The trial number in a run's tags."""
    return int(run.data.tags[tags.TRIAL].rpartition("/")[2])


def _search(client: MlflowClient, experiment: str, query: str) -> Iterator[Run]:
    order, token = ["attributes.start_time DESC"], None
    while True:
        page = client.search_runs([experiment], query, max_results=_PAGE, order_by=order, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
