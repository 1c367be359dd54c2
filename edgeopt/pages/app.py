"""The pages as an ASGI application, and mounted in an MLflow server of which they are an `mlflow.app`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edgeopt.core import units
from edgeopt.errors import EdgeoptError, InputError
from edgeopt.pages import comparison
from edgeopt.pages.sources import Source, Study
from edgeopt.tracking import report
from edgeopt.tracking.charts import svg
from edgeopt.tracking.charts.chart_data import TRIAL_NUMBER, kind_of, prepare, readable
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
_TEMPLATES.filters |= {"readable": readable, "show": units.show, "path": lambda text: quote(str(text), safe="")}


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

    return Starlette(
        routes=[
            Route("/", endpoint("home"), name="home"),
            Route("/studies/{run_id}", endpoint("study"), name="study"),
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


def _own_address(request: Request, root: str) -> str:
    """Where this server listens, by its socket: never what a client says of it."""
    host, port = request.scope["server"]
    return f"{request.scope['scheme']}://{f'[{host}]' if ':' in host else host}:{port}{root}"


def _home(source: Source, _: Request, __: str) -> Mapping[str, Any]:
    return {"studies": source.studies(), "models": source.models()}


def _study(source: Source, request: Request, ui: str) -> Mapping[str, Any]:
    study = source.study(request.path_params["run_id"])
    asked = request.query_params
    rows, limits = study.document["trials"], study.document["limits"]
    objectives = _chosen(study, asked.get("x", ""), asked.get("y", ""))
    view = prepare(study=study.name, rows=rows, objectives=objectives, limits=limits) if objectives else None
    return {
        "study": study,
        "view": view,
        "chart": svg.figure(view, _link_to_run(study, ui)) if view and view.points else "",
        "choices": [o["metric"] for o in study.document["objectives"]],
        "limits": report.limit_table(rows, limits),
        "outcomes": report.outcome_table(rows),
        "course": report.growth(study.hypervolumes),
        "rows": _listed(
            study, asked.get("sort", ""), falling=asked.get("down") == "on", kept=asked.get("kept") == "on"
        ),
        "over": sum(map(report.is_over, rows)),
        "asked": dict(asked),
        "verdict": report.verdict,
        "kind": kind_of,
        "few": comparison.FEWEST,
        "many": comparison.MOST,
    }


def _chosen(study: Study, x: str, y: str) -> list[Mapping[str, Any]]:
    """The objectives with those first that were asked for."""
    known = list(study.document["objectives"])
    first = [o for name in (x, y) for o in known if o["metric"] == name]
    first = list({o["metric"]: o for o in first}.values())
    return [*first, *(o for o in known if o not in first)]


def _link_to_run(study: Study, ui: str) -> Callable[[Mapping[str, Any]], str]:
    page = f"{ui}#/experiments/{study.run.info.experiment_id}/runs/"
    return lambda row: f"{page}{row['run_id']}{MODE}" if row["run_id"] else ""


def _listed(study: Study, by: str, *, falling: bool, kept: bool) -> Sequence[Mapping[str, Any]]:
    """The trials in the order that was asked for, those without the figure last; by outcome where none was."""
    rows = [row for row in study.document["trials"] if row["feasible"] or not kept]
    if by == TRIAL_NUMBER:
        return sorted(rows, key=lambda row: row["number"], reverse=falling)
    if by:
        with_figure = [row for row in rows if row["metrics"].get(by) is not None]
        ordered = sorted(with_figure, key=lambda row: row["metrics"][by], reverse=falling)
        return [*ordered, *(row for row in rows if row["metrics"].get(by) is None)]
    return sorted(rows, key=lambda row: (not report.is_over(row), _ORDER[kind_of(row)], row["number"]))


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
