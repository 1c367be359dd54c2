"""Write the descriptions of runs that the MLflow UI shows, as Markdown."""

from __future__ import annotations

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.result import PREDICTION, TrialResult, Verdict, skipped_work
from edgeopt.core.study_snapshot import OUTCOMES, StudySnapshot

MAX_LENGTH = 8000
"""Characters that MLflow stores in a tag."""
_MAX_FRONT_ROWS = 40


def trial_description(result: TrialResult) -> str:
    """Return the recipe of a trial, its limits with the measured values, and remarks on the engine."""
    lines = [f"**Recipe:** {result.recipe_text}", ""]
    if result.failure is not None:
        lines += [f"**Failed** in stage `{result.failure.stage}`: {_table_cell(result.failure.message)}", ""]
    if result.refused == PREDICTION:
        words = OUTCOMES["refused"].capitalize()
        lines += [f"**{words}**: {skipped_work(result.refused)}, because a limit would be exceeded.", ""]
    elif result.refused:
        words = OUTCOMES["stopped"].capitalize()
        lines += [f"**{words}** at {result.refused}: {skipped_work(result.refused)}, because a limit is exceeded.", ""]
    if result.emulated:
        machine = result.device_name or "another machine"
        lines += [f"The limits of the device {result.target} were checked on {machine}.", ""]
    unit = {m.metric: m.unit for m in (*result.predictions, *result.measurements)}
    if result.verdicts:
        lines += ["| limit | measured | verdict |", "|---|---|---|"]
        lines += [_verdict_row(verdict, unit.get(verdict.metric, "")) for verdict in result.verdicts]
        lines.append("")
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines)[:MAX_LENGTH]


def _verdict_row(verdict: Verdict, unit: str) -> str:
    value = "not measured" if verdict.value is None else units.format_quantity(verdict.value, unit)
    value += " (predicted, best case)" if verdict.predicted else ""
    satisfied = "not excluded" if verdict.predicted else "satisfied"
    words = satisfied if verdict.satisfied else f"**exceeded**: {_table_cell(verdict.reason)}"
    return f"| {readable(verdict.metric)} {verdict.limit} | {value} | {words} |"


def study_description(snapshot: StudySnapshot) -> str:
    """Return the limits of a study and the trials on its front."""
    lines = [
        f"**Study {snapshot.study}:** {len(snapshot.trials)} trials, {len(snapshot.feasible)} satisfy every limit, "
        f"{len(snapshot.front)} are on the front. Open the artifact `front/front.html`.",
        "",
    ]
    lines += [f"- {readable(limit.metric)} {limit.text}" for limit in snapshot.limits]
    headers = ["trial", *(readable(objective.metric) for objective in snapshot.objectives)]
    lines += ["", f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    for trial in snapshot.front[:_MAX_FRONT_ROWS]:
        values = [_value(trial.metrics.get(objective.metric), objective.unit) for objective in snapshot.objectives]
        lines.append(f"| {' | '.join([str(trial.number), *values])} |")
    return "\n".join(lines)[:MAX_LENGTH]


def _value(value: float | None, unit: str) -> str:
    return "–" if value is None else units.format_quantity(value, unit)


def _table_cell(text: str) -> str:
    """Return `text` in one line without the character that separates Markdown cells."""
    return " ".join(text.replace("|", "/").split())
