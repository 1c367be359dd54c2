"""Write saved views of a study for the runs page of the MLflow UI.

MLflow stores a saved view in a tag of the experiment: an envelope with a name and the state of the page as JSON. This
format is not documented. tests/tracking/test_saved_views.py opens the links in a browser and fails if a version of
MLflow reads them differently.
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

TAG_PREFIX = "mlflow.sharedViewState."
TITLES: Mapping[str, str] = {
    "front": "Pareto front",
    "parameters": "Parameters and objectives",
    "limits": "Distance to each limit",
    "energy": "Energy",
}
"""Title of each view by its name. The key of a view derives from its name."""
MAX_RUNS = 500
"""Runs that a chart draws at most."""
MIN_CONTOUR_RUNS = 3
"""MLflow interpolates a contour chart between its points; with two of them it is empty."""
_UI_QUERY = "workflowType=machine_learning&compareRunsMode=CHART"
_SECTION = "edgeopt"
_MAX_TAG_LENGTH = 20_000  # of an experiment tag in MLflow


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedView:
    """A saved view of the runs page.

    Attributes:
        name: what the view shows: a key of `TITLES`.
        key: identifies the view in links and in the tag; the same each time the view is written.
        title: the name that MLflow shows.
        state: the state of MLflow's runs page.
    """

    name: str
    key: str
    title: str
    state: Mapping[str, Any]


def build_views(snapshot: StudySnapshot) -> list[SavedView]:
    """Return the views of the front, the parameters, the limits and the energy of a study, without empty ones."""
    metrics = sorted({metric for trial in snapshot.trials for metric in trial.metrics})
    objectives = [objective.metric for objective in snapshot.objectives]
    charts = {
        "front": _front_charts(snapshot, objectives),
        "parameters": [_parallel(_varied_params(snapshot), objectives)] if _varied_params(snapshot) else [],
        "limits": [_bar(f"excess/{limit.metric}") for limit in snapshot.limits],
        "energy": [_bar(metric) for metric in metrics if metric.startswith("energy/")],
    }
    return [
        _view(snapshot.study, name, feasible_only=name == "front", charts=charts[name])
        for name in TITLES
        if charts[name]
    ]


def save_views(client: MlflowClient, experiment: str, views: Sequence[SavedView], now_ms: int) -> None:
    """Write views into tags of the experiment, replacing earlier ones; a view that is too long is left out."""
    for view in views:
        state = json.dumps(view.state, separators=(",", ":"))
        envelope = {"name": view.title, "createdAt": now_ms, "updatedAt": now_ms, "state": state}
        text = json.dumps(envelope)
        if len(text) <= _MAX_TAG_LENGTH:
            client.set_experiment_tag(experiment, TAG_PREFIX + view.key, text)


def view_paths(experiment: Experiment, study: str) -> dict[str, str]:
    """Return the path of each saved view on its server, by name."""
    keys = {name: _key(study, name) for name in TITLES}
    page = f"/#/experiments/{experiment.experiment_id}/runs?{_UI_QUERY}&viewStateShareKey="
    return {name: page + key for name, key in keys.items() if TAG_PREFIX + key in experiment.tags}


def _view(study: str, name: str, *, feasible_only: bool, charts: Sequence[Chart]) -> SavedView:
    query = f"tags.`{tags.STUDY}` = '{study}' and tags.`{tags.ROLE}` = 'trial'"
    query += f" and metrics.`{tags.FEASIBLE}` = 1" if feasible_only else ""
    section = {
        "uuid": _SECTION,
        "name": TITLES[name],
        "display": True,
        "isReordered": True,
        "columns": min(2, len(charts)),
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
    return SavedView(name=name, key=_key(study, name), title=f"{study}: {TITLES[name]}", state=state)


def _key(study: str, name: str) -> str:
    return hashlib.sha256(f"edgeopt {study} {name}".encode()).hexdigest()[:32]


def _front_charts(snapshot: StudySnapshot, objectives: Sequence[str]) -> list[Chart]:
    """Return a scatter chart of each pair of neighbouring objectives.

    With three objectives and enough feasible trials, the first chart is a contour: two axes and the third as colour.
    """
    pairs = [_scatter(x, y) for x, y in pairwise(objectives)]
    measured = [trial for trial in snapshot.feasible if all(name in trial.metrics for name in objectives)]
    if len(objectives) < 3 or len(measured) < MIN_CONTOUR_RUNS:
        return pairs or [_bar(name) for name in objectives]
    contour = {
        "type": "CONTOUR",
        "runsCountToCompare": MAX_RUNS,
        "xaxis": _axis(objectives[0]),
        "yaxis": _axis(objectives[1]),
        "zaxis": _axis(objectives[2]),
    }
    return [contour, *pairs]


def _varied_params(snapshot: StudySnapshot) -> list[str]:
    """Return the parameters that differ between trials; an axis with one value shows nothing."""
    names = sorted({name for trial in snapshot.trials for name in trial.params})
    return [name for name in names if len({str(trial.params.get(name)) for trial in snapshot.trials}) > 1]


def _scatter(x: str, y: str) -> Chart:
    return {
        "type": "SCATTER",
        "runsCountToCompare": MAX_RUNS,
        "xaxis": _axis(x),
        "yaxis": _axis(y),
    }


def _axis(metric: str) -> Chart:
    return {"key": metric, "type": "METRIC"}


def _parallel(params: Sequence[str], metrics: Sequence[str]) -> Chart:
    return {
        "type": "PARALLEL",
        "runsCountToCompare": MAX_RUNS,
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }


def _bar(metric: str) -> Chart:
    return {"type": "BAR", "metricKey": metric, "runsCountToCompare": MAX_RUNS}
