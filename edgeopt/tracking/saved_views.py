"""Saved views of a study on the runs page of the MLflow UI.

MLflow keeps a saved view as a tag of the experiment: an envelope with a name and the page's state as JSON text. That is
no documented interface; tests/tracking/test_saved_views.py opens the links in a browser, so that an MLflow that reads
them otherwise is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.study_snapshot import StudySnapshot

Chart = dict[str, Any]

TAG = "mlflow.sharedViewState."
NAMES = ("front", "parameters", "limits", "energy")
RUNS_SHOWN = 500
"""Runs that a chart draws at most."""
_MODE = "workflowType=machine_learning&compareRunsMode=CHART"
_SECTION = "edgeopt"
_LONGEST = 20_000  # characters in a tag of an experiment


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedView:
    """Attributes:
    key: names it in links and in the tag; the same whenever it is written again.
    state: of MLflow's runs page.
    """

    key: str
    name: str
    state: Mapping[str, Any]


def views(snapshot: StudySnapshot) -> list[SavedView]:
    """Return the views of the front, the parameters, the limits and the energy of a study."""
    metrics = sorted({metric for trial in snapshot.trials for metric in trial.metrics})
    params = sorted({name for trial in snapshot.trials for name in trial.params})
    names = [objective.metric for objective in snapshot.objectives]
    charts_of = {
        "front": (True, _front(names)),
        "parameters": (False, [_parallel(params, names)]),
        "limits": (False, [_bar(f"excess/{limit.metric}") for limit in snapshot.limits]),
        "energy": (False, [_bar(metric) for metric in metrics if metric.startswith("energy/")]),
    }
    return [
        _view(snapshot.study, name, feasible=only, charts=charts)
        for name, (only, charts) in charts_of.items()
        if charts
    ]


def write(client: MlflowClient, experiment: str, found: Sequence[SavedView], now_ms: int) -> None:
    """Keep the views with the experiment; one that is there is replaced, one that is too long is left out."""
    for view in found:
        state = json.dumps(view.state, separators=(",", ":"))
        envelope = {"name": view.name, "createdAt": now_ms, "updatedAt": now_ms, "state": state}
        text = json.dumps(envelope)
        if len(text) <= _LONGEST:
            client.set_experiment_tag(experiment, TAG + view.key, text)


def paths(experiment: Experiment, study: str) -> dict[str, str]:
    """Name → path, on a server, of the page of every view that was written."""
    keys = {name: _key(study, name) for name in NAMES}
    page = f"/#/experiments/{experiment.experiment_id}/runs?{_MODE}&viewStateShareKey="
    return {name: page + key for name, key in keys.items() if TAG + key in experiment.tags}


def _view(study: str, name: str, *, feasible: bool, charts: Sequence[Chart]) -> SavedView:
    query = f"tags.`{tags.STUDY}` = '{study}' and tags.`{tags.ROLE}` = 'trial'"
    query += f" and metrics.`{tags.FEASIBLE}` = 1" if feasible else ""
    columns = min(2, len(charts))
    section = {
        "uuid": _SECTION,
        "name": name,
        "display": True,
        "isReordered": True,
        "columns": columns,
        "cardHeight": 480,
    }
    state = {
        "searchFilter": query,
        "orderByKey": f"metrics.`{tags.PARETO_RANK}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsPinned": [],
        "groupBy": None,
        "isAccordionReordered": True,
        "hideEmptyCharts": False,
        "chartsSearchFilter": "",
        "compareRunSections": [section],
        "compareRunCharts": [
            {"uuid": f"{name}-{n}", "metricSectionId": _SECTION, "deleted": False, "isGenerated": False, **chart}
            for n, chart in enumerate(charts)
        ],
    }
    return SavedView(key=_key(study, name), name=f"{study}: {name}", state=state)


def _key(study: str, name: str) -> str:
    return hashlib.sha256(f"edgeopt {study} {name}".encode()).hexdigest()[:32]


def _front(names: Sequence[str]) -> list[Chart]:
    """Each objective against the next, and the first two with the third as colour."""
    pairs = [_scatter(x, y) for x, y in pairwise(names)]
    if len(names) < 3:
        return pairs or [_bar(name) for name in names]
    coloured = {
        "type": "CONTOUR",
        "runsCountToCompare": RUNS_SHOWN,
        "xaxis": _axis(names[0]),
        "yaxis": _axis(names[1]),
        "zaxis": _axis(names[2]),
    }
    return [coloured, *pairs]


def _scatter(x: str, y: str) -> Chart:
    return {
        "type": "SCATTER",
        "runsCountToCompare": RUNS_SHOWN,
        "xaxis": _axis(x),
        "yaxis": _axis(y),
    }


def _axis(metric: str) -> Chart:
    return {"key": metric, "type": "METRIC"}


def _parallel(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    return {
        "type": "PARALLEL",
        "runsCountToCompare": RUNS_SHOWN,
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }


def _bar(metric: str) -> Chart:
    return {"type": "BAR", "metricKey": metric, "runsCountToCompare": RUNS_SHOWN}
