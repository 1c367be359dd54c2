"""The notes that stand above a run in the MLflow UI, for people who did not start it."""

from __future__ import annotations

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.result import TrialResult, Verdict, skipped_work
from edgeopt.core.study_snapshot import StudySnapshot

LENGTH = 8000  # of a tag in MLflow
_ROWS = 40


def trial(result: TrialResult) -> str:
    """Markdown: the recipe, each limit against what was measured, remarks on the engine."""
    lines = [f"**Recipe:** {result.recipe.get('text', '')}", ""]
    if result.failure is not None:
        lines += [f"**Failed** while it was at `{result.failure.stage}`: {_cell(result.failure.message)}", ""]
    if result.refused:
        lines += [f"**Refused** at {result.refused}: {skipped_work(result.refused)}, because a limit is broken.", ""]
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
    value = "not measured" if verdict.value is None else units.format_quantity(verdict.value, unit)
    value += ", predicted at best" if verdict.predicted else ""
    kept = "not excluded" if verdict.predicted else "kept"
    word = kept if verdict.satisfied else f"**not kept**: {_cell(verdict.reason)}"
    return f"| {readable(verdict.metric)} {verdict.limit} | {value} | {word} |"


def study(snapshot: StudySnapshot) -> str:
    """Return Markdown with the limits of a study and the trials on its front."""
    lines = [
        f"**Study {snapshot.study}:** {len(snapshot.trials)} trials, {len(snapshot.feasible)} satisfy every limit, "
        f"{len(snapshot.front)} are on the front. Open the artifact `front/front.html`.",
        "",
    ]
    lines += [f"- {readable(limit.metric)} {limit.text}" for limit in snapshot.limits]
    heads = ["trial", *(readable(o.metric) for o in snapshot.objectives)]
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for trial in snapshot.front[:_ROWS]:
        figures = [_figure(trial.metrics.get(o.metric), o.unit) for o in snapshot.objectives]
        lines.append(f"| {' | '.join([str(trial.number), *figures])} |")
    return "\n".join(lines)[:LENGTH]


def _figure(value: float | None, unit: str) -> str:
    return "–" if value is None else units.format_quantity(value, unit)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
