"""The pages as an ASGI application, and mounted in an MLflow server of which they are an `mlflow.app`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from edgeopt.core.study_summary import recommended, summary
from edgeopt.errors import EdgeoptError, InputError
from edgeopt.pages import comparison
from edgeopt.pages.sources import Source, Study
from edgeopt.tracking import front, report
from edgeopt.tracking.charts import svg
from edgeopt.tracking.charts.chart_data import TRIAL_NUMBER, kind_of, prepare
from edgeopt.tracking.recorder import MODE

PREFIX = "/edgeopt"
_HERE = Path(__file__).parent
_POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'"
_ORDER = {"front": 0, "feasible": 1, "infeasible": 2}

Show = Callable[[Source, Request, str], Mapping[str, Any]]
"""What a template is given, of a source, a request, and the address of MLflow's own pages."""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "readable": readable,
    "explain": explain,
    "label": label,
    "show": units.format_quantity,
    "path": lambda text: quote(str(text), safe=""),
}


def pages(tracking_uri: str = "", ui: str = "") -> Starlette:
    """The application, to be mounted at PREFIX.

    Args:
        tracking_uri: of the MLflow server that is read; the one that these pages are part of by default.
        ui: where that server shows its own pages, as people reach it.
    """
    shown: dict[str, Show] = {
        "home": _home,
        "study": _study,
        "compare": _compare,
        "release": _release,
    }

    def endpoint(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await run_in_threadpool(_answer, request, tracking_uri, ui, name, shown[name])

        return answer

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


def _answer(request: Request, tracking_uri: str, ui: str, name: str, show: Show) -> Response:
    root = request.scope.get("root_path", "").removesuffix(PREFIX)
    ui = ui or f"{root}/"
    given = {"root": f"{root}{PREFIX}", "ui": ui, "mode": MODE}
    status = 200
    try:
        known = show(Source(tracking_uri or _own_address(request, root)), request, ui)
    except EdgeoptError as error:
        name, known, status = "error", {"error": error}, 404 if isinstance(error, InputError) else 502
    text = _TEMPLATES.get_template(f"{name}.html").render(**given, **known)
    return HTMLResponse(text, status_code=status, headers={"Content-Security-Policy": _POLICY})


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
    """Where this server listens, by its socket: never what a client says of it."""
    host, port = request.scope["server"]
    return f"{request.scope['scheme']}://{f'[{host}]' if ':' in host else host}:{port}{root}"


def _home(source: Source, _: Request, __: str) -> Mapping[str, Any]:
    return {"studies": source.studies(), "models": source.models()}


def _study(source: Source, request: Request, ui: str) -> Mapping[str, Any]:
    study = source.study(request.path_params["run_id"])
    query = request.query_params
    snapshot = study.snapshot
    view = None
    if snapshot.objectives:
        view = prepare(snapshot.with_objectives(_ordered(snapshot, query.get("x", ""), query.get("y", ""))))
    best = recommended(snapshot)
    return {
        "study": study,
        "snapshot": snapshot,
        "summary": summary(snapshot),
        "recommended": None if best is None else best.number,
        "view": view,
        "chart": svg.figure(view, _link_to_run(study, ui)) if view and view.points else "",
        "limits": report.limit_table(snapshot),
        "outcomes": report.outcome_table(snapshot.trials),
        "course": report.growth(study.hypervolumes),
        "trials": _listed(
            study,
            query.get("sort", ""),
            descending=query.get("down") == "on",
            feasible_only=query.get("feasible") == "on",
        ),
        "over": sum(1 for trial in snapshot.trials if trial.is_over),
        "asked": dict(query),
        "verdict": report.verdict,
        "kind": kind_of,
        "few": comparison.FEWEST,
        "many": comparison.MOST,
    }


def _ordered(snapshot: StudySnapshot, x: str, y: str) -> tuple[ObjectiveSnapshot, ...]:
    """Return the objectives with the requested x and y axes first."""
    chosen = [objective for name in (x, y) for objective in snapshot.objectives if objective.metric == name]
    first = tuple({objective.metric: objective for objective in chosen}.values())
    return (*first, *(objective for objective in snapshot.objectives if objective not in first))


def _link_to_run(study: Study, ui: str) -> Callable[[TrialSnapshot], str]:
    page = f"{ui}#/experiments/{study.run.info.experiment_id}/runs/"
    return lambda trial: f"{page}{trial.run_id}{MODE}" if trial.run_id else ""


def _listed(study: Study, metric: str, *, descending: bool, feasible_only: bool) -> Sequence[TrialSnapshot]:
    """Return the trials sorted by a metric, those without a value last; sorted by outcome without a metric."""
    trials = [trial for trial in study.snapshot.trials if trial.feasible or not feasible_only]
    if metric == TRIAL_NUMBER:
        return sorted(trials, key=lambda trial: trial.number, reverse=descending)
    if metric:
        measured = [trial for trial in trials if trial.metrics.get(metric) is not None]
        ordered = sorted(measured, key=lambda trial: trial.metrics[metric], reverse=descending)
        return [*ordered, *(trial for trial in trials if trial.metrics.get(metric) is None)]
    return sorted(trials, key=lambda trial: (not trial.is_over, _ORDER[kind_of(trial)], trial.number))


def _compare(source: Source, request: Request, _: str) -> Mapping[str, Any]:
    ids = list(dict.fromkeys(request.query_params.getlist("run")))
    if not comparison.FEWEST <= len(ids) <= comparison.MOST:
        raise InputError(
            f"{len(ids)} runs were chosen", hint=f"Choose {comparison.FEWEST} to {comparison.MOST} trials of a study"
        )
    trials = [source.trial(run_id) for run_id in ids]
    return {
        "trials": trials,
        "settings": comparison.settings(trials),
        "figures": comparison.figures(trials),
        "layers": comparison.layers(trials),
        "generations": comparison.generations(trials),
    }


def _release(source: Source, request: Request, _: str) -> Mapping[str, Any]:
    return {"release": source.release(request.path_params["model"])}
