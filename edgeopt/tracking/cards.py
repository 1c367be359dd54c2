"""The notes that stand above a run in the MLflow UI, for people who did not start it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeopt.core import units
from edgeopt.core.result import TrialResult, Verdict, undone
from edgeopt.tracking.charts.chart_data import readable

LENGTH = 8000  # of a tag in MLflow
_ROWS = 40


def trial(result: TrialResult) -> str:
    """Markdown: the recipe, each limit against what was measured, remarks on the engine."""
    lines = [f"**Recipe:** {result.recipe.get('text', '')}", ""]
    if result.failure is not None:
        lines += [f"**Failed** while it was at `{result.failure.stage}`: {_cell(result.failure.message)}", ""]
    if result.refused:
        lines += [f"**Refused** at {result.refused}: {undone(result.refused)}, because a limit is broken.", ""]
    if result.emulated:
        here = result.device.get("name", "another machine")
        lines += [f"Limits of the device {result.target} were checked on {here}.", ""]
    unit = {m.metric: m.unit for m in (*result.predictions, *result.measurements)}
    if result.verdicts:
        lines += ["| limit | measured | verdict |", "|---|---|---|"]
        lines += [_verdict(verdict, unit.get(verdict.metric, "")) for verdict in result.verdicts]
        lines.append("")
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines)[:LENGTH]


def _verdict(verdict: Verdict, unit: str) -> str:
    value = "not measured" if verdict.value is None else units.show(verdict.value, unit)
    value += ", predicted at best" if verdict.predicted else ""
    kept = "not excluded" if verdict.predicted else "kept"
    word = kept if verdict.satisfied else f"**not kept**: {_cell(verdict.reason)}"
    return f"| {readable(verdict.metric)} {verdict.limit} | {value} | {word} |"


def study(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    objectives: Sequence[Mapping[str, Any]],
    limits: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown: what was asked for and which trials are on the front."""
    feasible = [row for row in rows if row["feasible"]]
    front = [row for row in feasible if row["pareto_rank"] == 1]
    lines = [
        f"**Study {name}:** {len(rows)} trials, {len(feasible)} keep every limit, {len(front)} on the front. "
        "Open the artifact `front/front.html`.",
        "",
    ]
    lines += [f"- {readable(limit['metric'])} {limit['limit']}" for limit in limits]
    heads = ["trial", *(readable(o["metric"]) for o in objectives)]
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in front[:_ROWS]:
        figures = [_figure(row["metrics"].get(o["metric"]), o["unit"]) for o in objectives]
        lines.append(f"| {' | '.join([str(row['number']), *figures])} |")
    return "\n".join(lines)[:LENGTH]


def _figure(value: float | None, unit: str) -> str:
    return "–" if value is None else units.show(value, unit)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
