"""Build the ASGI application of the pages, which an MLflow server mounts through the plugin `mlflow.app`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edgeopt.core import units
from edgeopt.core.metric_text import explain, readable
from edgeopt.core.recipe import label
from edgeopt.core.study_snapshot import ObjectiveSnapshot, StudySnapshot, TrialSnapshot
from edgeopt.core.study_summary import MAX_COMPARED, MIN_COMPARED, recommended, summary
from edgeopt.errors import EdgeoptError, InputError
from edgeopt.pages import comparison
from edgeopt.pages.sources import Source, Study
from edgeopt.tracking import front, report
from edgeopt.tracking.charts import svg
from edgeopt.tracking.charts.chart_data import TRIAL_NUMBER, build_chart_data, kind_of
from edgeopt.tracking.recorder import UI_QUERY

PREFIX = "/edgeopt"
_HERE = Path(__file__).parent
_CONTENT_SECURITY_POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'"

PageData = Callable[[Source, Request, str], Mapping[str, Any]]
"""Function that returns the variables of a template from a source, a request and the address of the MLflow UI."""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals["front_explanation"] = report.FRONT_EXPLANATION
_TEMPLATES.filters |= {
    "readable": readable,
    "explain": explain,
    "metric_name": report.metric_name,
    "label": label,
    "show": units.format_quantity,
    "path": lambda text: quote(str(text), safe=""),
}


def create_pages(tracking_uri: str = "", ui: str = "") -> Starlette:
    """Return the application, to be mounted at PREFIX.

    Args:
        tracking_uri: the MLflow server to read; empty for the server that mounts the application.
        ui: address of that server's UI for browsers; empty for the server that mounts the application.
    """
    page_data: dict[str, PageData] = {
        "home": _home,
        "study": _study,
        "compare": _compare,
        "release": _release,
    }

    def endpoint(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            return await run_in_threadpool(_respond, request, tracking_uri, ui, name, page_data[name])

        return respond

    async def csv_file(request: Request) -> Response:
        return await run_in_threadpool(_csv, request, tracking_uri)

    return Starlette(
        routes=[
            Route("/", endpoint("home"), name="home"),
            Route("/studies/{run_id}", endpoint("study"), name="study"),
            Route("/studies/{run_id}/trials.csv", csv_file, name="csv"),
            Route("/compare", endpoint("compare"), name="compare"),
            Route("/releases/{model}", endpoint("release"), name="release"),
            Mount("/static", StaticFiles(directory=_HERE / "static"), name="static"),
        ]
    )


def _respond(request: Request, tracking_uri: str, ui: str, name: str, page_data: PageData) -> Response:
    root = request.scope.get("root_path", "").removesuffix(PREFIX)
    ui = ui or f"{root}/"
    status = 200
    try:
        variables = page_data(Source(tracking_uri or _own_address(request, root)), request, ui)
    except EdgeoptError as error:
        name, variables, status = "error", {"error": error}, 404 if isinstance(error, InputError) else 502
    text = _TEMPLATES.get_template(f"{name}.html").render(root=f"{root}{PREFIX}", ui=ui, ui_query=UI_QUERY, **variables)
    return HTMLResponse(text, status_code=status, headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY})


def _csv(request: Request, tracking_uri: str) -> Response:
    """Return all trials of a study as a CSV file."""
    root = request.scope.get("root_path", "").removesuffix(PREFIX)
    try:
        study = Source(tracking_uri or _own_address(request, root)).study(request.path_params["run_id"])
    except EdgeoptError as error:
        return PlainTextResponse(str(error), status_code=404 if isinstance(error, InputError) else 502)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "trials.csv"
        front.write_csv(path, study.snapshot)
        text = path.read_text(encoding="utf-8")
    name = f"{quote(study.name, safe='')}-trials.csv"
    return Response(text, media_type="text/csv", headers={"Content-Disposition": f'attachment; filename="{name}"'})


def _own_address(request: Request, root: str) -> str:
    """Return the address of this server from its socket; a client could forge the Host header."""
    host, port = request.scope["server"]
    return f"{request.scope['scheme']}://{f'[{host}]' if ':' in host else host}:{port}{root}"


def _home(source: Source, _: Request, __: str) -> Mapping[str, Any]:
    studies = source.studies()
    running = any(study.state == "running" for study in studies)
    return {"studies": studies, "running": running, "models": source.models()}


def _study(source: Source, request: Request, ui: str) -> Mapping[str, Any]:
    study = source.study(request.path_params["run_id"])
    query = request.query_params
    snapshot = study.snapshot
    data = None
    if snapshot.objectives:
        data = build_chart_data(snapshot.with_objectives(_ordered(snapshot, query.get("x", ""), query.get("y", ""))))
    best = recommended(snapshot)
    return {
        "study": study,
        "snapshot": snapshot,
        "summary": summary(snapshot),
        "recommended": None if best is None else best.number,
        "data": data,
        "chart": svg.figure(data, _link_to_run(study, ui)) if data and data.points else "",
        "limits": report.limit_table(snapshot),
        "outcomes": report.outcome_table(snapshot.trials),
        "progress": report.hypervolume_section(study.hypervolumes),
        "trials": _sorted_trials(
            study,
            query.get("sort", ""),
            descending=query.get("down") == "on",
            feasible_only=query.get("feasible") == "on",
        ),
        "ended": sum(1 for trial in snapshot.trials if trial.is_over),
        "query": dict(query),
        "describe_outcome": partial(report.describe_outcome, snapshot),
        "kind": kind_of,
        "min_trials": MIN_COMPARED,
        "max_trials": MAX_COMPARED,
    }


def _ordered(snapshot: StudySnapshot, x: str, y: str) -> tuple[ObjectiveSnapshot, ...]:
    """Return the objectives with the requested x and y axes first."""
    requested = [objective for name in (x, y) for objective in snapshot.objectives if objective.metric == name]
    first = tuple({objective.metric: objective for objective in requested}.values())
    return (*first, *(objective for objective in snapshot.objectives if objective not in first))


def _link_to_run(study: Study, ui: str) -> Callable[[TrialSnapshot], str]:
    page = f"{ui}#/experiments/{study.run.info.experiment_id}/runs/"
    return lambda trial: f"{page}{trial.run_id}{UI_QUERY}" if trial.run_id else ""


def _sorted_trials(study: Study, metric: str, *, descending: bool, feasible_only: bool) -> Sequence[TrialSnapshot]:
    """Return the trials sorted by a metric, those without a value last; sorted by outcome without a metric."""
    trials = [trial for trial in study.snapshot.trials if trial.feasible or not feasible_only]
    if metric == TRIAL_NUMBER:
        return sorted(trials, key=lambda trial: trial.number, reverse=descending)
    if metric:
        measured = [trial for trial in trials if trial.metrics.get(metric) is not None]
        ordered = sorted(measured, key=lambda trial: trial.metrics[metric], reverse=descending)
        return [*ordered, *(trial for trial in trials if trial.metrics.get(metric) is None)]
    return sorted(trials, key=report.display_order)


def _compare(source: Source, request: Request, _: str) -> Mapping[str, Any]:
    ids = list(dict.fromkeys(request.query_params.getlist("run")))
    if not MIN_COMPARED <= len(ids) <= MAX_COMPARED:
        raise InputError(
            f"a comparison needs {MIN_COMPARED} to {MAX_COMPARED} trials, got {len(ids)}",
            hint="Select trials on the page of a study",
        )
    trials = [source.trial(run_id) for run_id in ids]
    return {
        "trials": trials,
        "settings": comparison.different_settings(trials),
        "metrics": comparison.metric_rows(trials),
        "layers": comparison.layer_rows(trials),
        "generations": comparison.generation_rows(trials),
    }


def _release(source: Source, request: Request, _: str) -> Mapping[str, Any]:
    release = source.release(request.path_params["model"])
    return {
        "release": release.overview,
        "objectives": release.objectives,
        "runs": release.runs,
        "studies": release.studies,
        "baseline": release.baseline,
    }
