"""Write the report on a study: one HTML page that needs no network and no other file.

It shows the front in any two objectives, the limits with their headroom, the outcomes, the importance of parameters,
the progress of the search, and every trial in a table that can be sorted and filtered. The pages of edgeopt use the
same tables.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from edgeopt.core import units
from edgeopt.core.metric_text import explain, readable
from edgeopt.core.study_snapshot import ObjectiveSnapshot, StudySnapshot, TrialSnapshot
from edgeopt.core.study_summary import summary
from edgeopt.tracking.charts import svg
from edgeopt.tracking.charts.chart_data import BASELINE_LABEL, ChartData, build_chart_data, caption, kind_of
from edgeopt.tracking.charts.plotly import figure, short

FRONT_EXPLANATION = (
    "Feasible trials for which no other feasible trial is at least as good in every objective and better in one."
)
_HEADROOM_EXPLANATION = "Relative distance between the worse end of the confidence interval and the limit."
_PAGE = Path(__file__).with_name("front.html")
_SCRIPT = Path(__file__).with_name("front.js")
_MIN_IMPORTANCE = 0.01
"""Parameters that explain less of every metric are not listed."""
_ORDER = {"front": 0, "feasible": 1, "infeasible": 2}
_SAVED_BY = {"rungs": "early stopping", "cache": "caching"}
"""Words for the keys of `SearchStatistics.saved_s` that are not words for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStatistics:
    """Statistics of a search that a snapshot does not hold.

    Attributes:
        hypervolumes: hypervolume of the front after each evaluated trial, from 0 to 1.
        importance: metric → parameter → share of the metric's variance that the parameter explains, from 0 to 1.
        spent_s: seconds that all trials took together.
        spent_j: joules that all trials took together; 0 if energy was not measured.
        saved_s: seconds saved, by the method that saved them.
    """

    hypervolumes: Sequence[float] = ()
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spent_s: float = 0.0
    spent_j: float = 0.0
    saved_s: Mapping[str, float] = field(default_factory=dict)


def write(path: Path, snapshot: StudySnapshot, *, statistics: SearchStatistics) -> None:
    """Write the report of a study as one HTML page."""
    charts = [build_chart_data(snapshot.with_objectives(order)) for order in _axis_orders(snapshot.objectives)]
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in {
        "STUDY": escape(snapshot.study),
        "SUMMARY": escape(summary(snapshot)),
        "CAPTION": escape(caption(charts[0])),
        "CHARTS": _charts(charts),
        "LEGEND": _legend(charts[0]),
        "LIMITS": limit_table(snapshot),
        "OUTCOMES": outcome_table(snapshot.trials),
        "IMPORTANCE": _importance_table(statistics),
        "PROGRESS": _cost(statistics) + hypervolume_section(statistics.hypervolumes),
        "TRIALS": _trial_table(snapshot),
        "SCRIPT": f"<script type='module'>{_SCRIPT.read_text(encoding='utf-8')}</script>",
    }.items():
        page = page.replace(f"<!--{name}-->", text)
    path.write_text(page, encoding="utf-8")


def _axis_orders(objectives: tuple[ObjectiveSnapshot, ...]) -> list[tuple[ObjectiveSnapshot, ...]]:
    """Return the objectives in every order that puts another pair first; the third becomes the colour."""
    if len(objectives) < 3:
        return [objectives]
    return [(a, b, *(o for o in objectives if o not in (a, b))) for a, b in itertools.combinations(objectives, 2)]


def _charts(charts: Sequence[ChartData]) -> str:
    """Return all charts, the first one visible, and a control that selects another."""
    parts = []
    for number, data in enumerate(charts):
        chart = figure(data).to_html(
            full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False, "responsive": True}
        )
        parts.append(f"<div class='chart'{' hidden' if number else ''}>{chart}</div>")
    if len(charts) == 1:
        return parts[0]
    options = "".join(f"<option>{escape(f'{data.x.title} against {data.y.title}')}</option>" for data in charts)
    return f"<p><label>Show <select id='pair'>{options}</select></label></p>" + "".join(parts)


def _legend(data: ChartData) -> str:
    axes = {"X axis": data.x, "Y axis": data.y, "Colour": data.colour}
    parts = ["Each point is one compressed model; the lines through it are 95 % confidence intervals."]
    parts += [f"{name}: {escape(', '.join(filter(None, (a.title, a.better))))}." for name, a in axes.items() if a]
    if data.baseline is not None:
        parts.append("The diamond is the original, uncompressed model.")
    if data.x.drawn_bound is not None or data.y.drawn_bound is not None:
        parts.append(
            "Dashed lines are limits; the shaded side is not allowed. A limit is satisfied only if the whole "
            "confidence interval is within it."
        )
    parts.append(
        "A trial is <b>on the front</b> if no other feasible trial is at least as good in every objective and better "
        "in one. Choose among the numbered points. Hover over a point for its recipe and values."
    )
    return " ".join(parts)


def limit_table(snapshot: StudySnapshot) -> str:
    """Return each limit with the original model's value, the trials that satisfy it and the headroom of the front."""
    if not snapshot.limits:
        return "<p>No limits were set.</p>"
    rows = []
    for limit in snapshot.limits:
        excesses = [(trial, trial.excess.get(limit.metric)) for trial in snapshot.trials]
        judged = [
            excess <= 0 and limit.metric not in trial.disturbed for trial, excess in excesses if excess is not None
        ]
        headroom = [-excess for trial, excess in excesses if excess is not None and trial.on_front]
        bound = "not known" if limit.bound is None else units.format_quantity(limit.bound, limit.unit)
        ends = dict.fromkeys(f"{end:.0%}" for end in (min(headroom), max(headroom))) if headroom else {"–": None}
        count = f"{sum(judged)} of {len(judged)}" if judged else "not measured"
        original = _show(snapshot.baseline.get(limit.metric), limit.unit)
        cells = map(escape, (limit.text, bound, original, count, " to ".join(ends)))
        rows.append(_row(metric_name(limit.metric), *cells))
    headers = [
        ("Metric", ""),
        ("Limit", ""),
        ("Value of the limit", ""),
        ("Original model", "The model before compression, on the same runtime."),
        ("Satisfied by", "Trials whose whole confidence interval is within the limit, of all judged trials."),
        ("Headroom on the front", _HEADROOM_EXPLANATION),
    ]
    return _table("", headers, rows)


def outcome_table(trials: Sequence[TrialSnapshot]) -> str:
    """Return the count of trials per outcome, with the limits they exceed or the stages at which they failed."""
    groups: dict[str, list[TrialSnapshot]] = {}
    for trial in trials:
        groups.setdefault(trial.outcome_text, []).append(trial)
    rows = []
    for outcome, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        exceeded = Counter(metric for trial in members for metric in trial.exceeded)
        causes = [f"{metric_name(metric)} ({count})" for metric, count in exceeded.most_common()]
        disturbed = Counter(metric for trial in members for metric in trial.disturbed)
        causes += [f"{metric_name(metric)} disturbed ({count})" for metric, count in disturbed.most_common()]
        stages = Counter(trial.failure.partition(":")[0] for trial in members if trial.failure)
        causes = causes or [f"at {escape(stage)} ({count})" for stage, count in stages.most_common()]
        rows.append(_row(escape(outcome), str(len(members)), ", ".join(causes) or "–"))
    return _table(
        "", [("Outcome", ""), ("Trials", ""), ("Exceeded limits, disturbed metrics or failed stages", "")], rows
    )


def _importance_table(statistics: SearchStatistics) -> str:
    metrics = list(statistics.importance)
    largest: dict[str, float] = {}
    for shares in statistics.importance.values():
        for name, share in shares.items():
            largest[name] = max(share, largest.get(name, 0.0))
    names = sorted((name for name in largest if largest[name] >= _MIN_IMPORTANCE), key=lambda name: -largest[name])
    if not names:
        return "<p>Too few trials were measured, or no parameter decides alone.</p>"
    rows = [
        _row(escape(name), *(_bar(statistics.importance[metric].get(name, 0.0)) for metric in metrics))
        for name in names
    ]
    return _table("", [("Parameter", ""), *_metric_headers(metrics)], rows)


def _bar(share: float) -> str:
    return f"<span class='bar' style='width:{120 * share:.0f}px'></span> {share:.0%}"


def _cost(statistics: SearchStatistics) -> str:
    sentences = [f"All trials together took {statistics.spent_s / 60:.1f} minutes."]
    if statistics.spent_j:
        sentences.append(f"They needed {statistics.spent_j / 3600:.3g} Wh.")
    saved = [
        f"{seconds / 60:.1f} min by {_SAVED_BY.get(method, method)}"
        for method, seconds in statistics.saved_s.items()
        if seconds >= 1
    ]
    sentences += [f"Time saved: {', '.join(saved)}."] if saved else []
    return f"<p>{escape(' '.join(sentences))}</p>"


def hypervolume_section(hypervolumes: Sequence[float]) -> str:
    """Return the hypervolume of the front after each trial, in words and as a chart.

    The text is empty while no trial is feasible.
    """
    if not any(hypervolumes):
        return ""
    words = (
        "The hypervolume is the share of the space within the limits that the front dominates, from 0 to 1. "
        f"It is {hypervolumes[-1]:.3f} after the last of {len(hypervolumes)} evaluated trials."
    )
    return f"<p>{escape(words)}</p>{svg.hypervolume_chart(hypervolumes)}"


def display_order(trial: TrialSnapshot) -> tuple[bool, int, int]:
    """Return the key that sorts trials for display: front, feasible, other finished trials, then unfinished ones."""
    return (not trial.is_over, _ORDER[kind_of(trial)], trial.number)


def _trial_table(snapshot: StudySnapshot) -> str:
    objectives = snapshot.objectives
    headers = [
        ("#", "Number of the trial."),
        ("Outcome", ""),
        *_metric_headers([objective.metric for objective in objectives]),
        ("Least headroom", _HEADROOM_EXPLANATION),
        ("Recipe", ""),
    ]
    rows = []
    if snapshot.baseline:
        values = "".join(_number(snapshot.baseline.get(o.metric), o.unit) for o in objectives)
        empty = "<td class='n' data-v=''>–</td>"
        rows.append(f"<tr class='baseline'>{empty}<td>{BASELINE_LABEL}</td>{values}{empty}<td></td></tr>")
    for trial in sorted(snapshot.trials, key=display_order):
        excesses = [trial.excess.get(limit.metric) for limit in snapshot.limits]
        headroom = None if not excesses or None in excesses else -max(e for e in excesses if e is not None)
        recipe = ", ".join(f"{name}={short(value)}" for name, value in trial.params.items())
        sort_value, text = ("", "–") if headroom is None else (headroom, f"{headroom:.0%}")
        cells = [
            f"<td class='n'>{trial.number}</td>",
            f"<td>{escape(describe_outcome(snapshot, trial))}</td>",
            *(_objective_cell(trial, objective) for objective in objectives),
            f"<td class='n' data-v='{sort_value}'>{text}</td>",
            f"<td class='p'>{escape(recipe)}</td>",
        ]
        rows.append(f"<tr class='{kind_of(trial)}'>{''.join(cells)}</tr>")
    return _table("trials", headers, rows, sortable=True)


def _objective_cell(trial: TrialSnapshot, objective: ObjectiveSnapshot) -> str:
    """Return the measured value with its interval, or else the predicted value, which does not take part in sorting."""
    metric, unit = objective.metric, objective.unit
    if metric in trial.metrics or metric not in trial.predicted:
        return _number(trial.metrics.get(metric), unit, trial.intervals.get(metric))
    value = escape(units.format_quantity(trial.predicted[metric], unit))
    return f"<td class='n' data-v=''>{value}<div class='soft'>predicted</div></td>"


def _number(value: float | None, unit: str, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "<td class='n' data-v=''>–</td>"
    ends = "" if interval is None else f"<div class='soft'>{interval[0]:.4g} … {interval[1]:.4g}</div>"
    return f"<td class='n' data-v='{value}'>{escape(units.format_quantity(value, unit))}{ends}</td>"


def _show(value: float | None, unit: str) -> str:
    return "–" if value is None else units.format_quantity(value, unit)


def metric_name(metric: str) -> str:
    """Return the readable name of a metric as HTML, with its explanation as tooltip."""
    return _with_tooltip(readable(metric), explain(metric))


def _metric_headers(metrics: Iterable[str]) -> list[tuple[str, str]]:
    return [(readable(metric), explain(metric)) for metric in metrics]


def _with_tooltip(text: str, tooltip: str) -> str:
    return f"<abbr title='{escape(tooltip)}'>{escape(text)}</abbr>" if tooltip else escape(text)


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _table(kind: str, headers: Iterable[tuple[str, str]], rows: Sequence[str], *, sortable: bool = False) -> str:
    """Return a table; each header is a text and its tooltip, and rows are HTML."""
    names = [_with_tooltip(text, tooltip) for text, tooltip in headers]
    names = [f"<button type='button'>{name}</button>" for name in names] if sortable else names
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    return f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def describe_outcome(snapshot: StudySnapshot, trial: TrialSnapshot) -> str:
    """Return the outcome of a trial with its reason: the exceeded limits, missing metrics or the error."""
    outcome = trial.outcome_text
    if trial.failure:
        return f"{outcome}: {trial.failure}"
    if trial.outcome in ("refused", "stopped"):
        reasons = [_excess_reason(snapshot, trial, metric) for metric in trial.exceeded]
        return f"{outcome}: {', '.join(reasons)}" if reasons else outcome
    if trial.outcome != "infeasible":
        return outcome
    exceeded = [f"{readable(metric)} {excess:+.0%}" for metric, excess in trial.exceeded.items()]
    missing = [readable(metric) for metric in trial.unmeasured]
    reasons = [f"exceeds {', '.join(exceeded)}"] if exceeded else []
    reasons += [f"not measured: {', '.join(missing)}"] if missing else []
    disturbed = [readable(metric) for metric in trial.disturbed]
    reasons += [f"disturbed by other processes: {', '.join(disturbed)}"] if disturbed else []
    return f"{outcome}: {'; '.join(reasons) or 'a measurement was disturbed, so a limit is not proven'}"


def _excess_reason(snapshot: StudySnapshot, trial: TrialSnapshot, metric: str) -> str:
    """Return the value that exceeds a limit and the limit, such as `size: engine 9 MiB predicted, limit 5 MiB`."""
    limit = snapshot.limit_on(metric)
    value = trial.metrics.get(metric, trial.predicted.get(metric))
    if limit is None or limit.bound is None or value is None:
        return f"{readable(metric)} {trial.exceeded[metric]:+.0%}"
    predicted = "" if metric in trial.metrics else " predicted"
    shown, bound = units.format_quantity(value, limit.unit), units.format_quantity(limit.bound, limit.unit)
    return f"{readable(metric)} {shown}{predicted}, limit {bound} ({trial.exceeded[metric]:+.0%})"
