"""Write the report on a study: one HTML page that needs no network and no other file.

It shows the front in any two objectives, limits with headroom, outcomes, parameter importance, the progress of the
search, and every trial in a table that can be sorted and filtered.
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
from edgeopt.tracking.charts.chart_data import FRONT, View, kind_of, prepare
from edgeopt.tracking.charts.matplotlib import headline
from edgeopt.tracking.charts.plotly import figure, short

_PAGE = Path(__file__).with_name("front.html")
_SCRIPT = Path(__file__).with_name("front.js")
_DECIDES = 0.01
"""Shares below this are not worth a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a study went.

    Attributes:
        hypervolumes: of the front after each evaluated trial, from 0 to 1.
        importance: metric → parameter → share of the metric's spread that goes with its choice.
        spent_s, spent_j: of all trials together; no joules where they were not tracked.
        saved_s: what was not spent, by what spared it.
    """

    hypervolumes: Sequence[float] = ()
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spent_s: float = 0.0
    spent_j: float = 0.0
    saved_s: Mapping[str, float] = field(default_factory=dict)


def write(path: Path, snapshot: StudySnapshot, *, course: Course) -> None:
    """Write the report of a study as one HTML page."""
    views = [prepare(snapshot.with_objectives(pair)) for pair in _pairs(snapshot.objectives)]
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in {
        "STUDY": escape(snapshot.study),
        "SUMMARY": escape(summary(snapshot)),
        "HEADLINE": escape(headline(views[0])),
        "CHARTS": _charts(views),
        "HOW": _how(views[0]),
        "LIMITS": limit_table(snapshot),
        "OUTCOMES": outcome_table(snapshot.trials),
        "IMPORTANCE": _importance_table(course),
        "COURSE": _course(course),
        "TRIALS": _trial_table(snapshot),
        "SCRIPT": f"<script type='module'>{_SCRIPT.read_text(encoding='utf-8')}</script>",
    }.items():
        page = page.replace(f"<!--{name}-->", text)
    path.write_text(page, encoding="utf-8")


def _pairs(objectives: tuple[ObjectiveSnapshot, ...]) -> list[tuple[ObjectiveSnapshot, ...]]:
    """Return the objectives in every order that puts another pair first; the third becomes the colour."""
    if len(objectives) < 3:
        return [objectives]
    return [(a, b, *(o for o in objectives if o not in (a, b))) for a, b in itertools.combinations(objectives, 2)]


def _charts(views: Sequence[View]) -> str:
    """All charts, of which the first is shown, and what chooses another."""
    drawn = []
    for number, view in enumerate(views):
        chart = figure(view).to_html(
            full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False, "responsive": True}
        )
        drawn.append(f"<div class='chart'{' hidden' if number else ''}>{chart}</div>")
    if len(views) == 1:
        return drawn[0]
    options = "".join(f"<option>{escape(f'{v.x.title} against {v.y.title}')}</option>" for v in views)
    return f"<p><label>Show <select id='pair'>{options}</select></label></p>" + "".join(drawn)


def _how(view: View) -> str:
    shown = {"X axis": view.x, "Y axis": view.y, "Colour": view.colour}
    parts = ["Each point is one compressed model; the lines through it are 95 % confidence intervals."]
    parts += [f"{name}: {escape(', '.join(filter(None, (a.title, a.better))))}." for name, a in shown.items() if a]
    if view.baseline is not None:
        parts.append("The diamond is the original, uncompressed model.")
    if view.x.drawn_bound is not None or view.y.drawn_bound is not None:
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
    lines = []
    for limit in snapshot.limits:
        known = [(trial, trial.excess.get(limit.metric)) for trial in snapshot.trials]
        judged = [excess for _, excess in known if excess is not None]
        front = [-excess for trial, excess in known if excess is not None and trial.on_front]
        bound = "not known" if limit.bound is None else units.format_quantity(limit.bound, limit.unit)
        room = f"{min(front):.0%} to {max(front):.0%}" if front else "–"
        count = f"{sum(1 for excess in judged if excess <= 0)} of {len(judged)}" if judged else "not measured"
        base = snapshot.baseline.get(limit.metric)
        original = "–" if base is None else units.format_quantity(base, limit.unit)
        lines.append(_line(readable(limit.metric), limit.text, bound, original, count, room, titles=(limit.metric,)))
    heads = ("Metric", "Limit", "Value of the limit", "Original model", "Satisfied by", "Headroom on the front")
    return _table("", heads, lines)


def outcome_table(trials: Sequence[TrialSnapshot]) -> str:
    """Return the count of trials per outcome, with the limits they exceed or the stages at which they failed."""
    groups: dict[str, list[TrialSnapshot]] = {}
    for trial in trials:
        groups.setdefault(trial.outcome_text, []).append(trial)
    lines = []
    for outcome, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        exceeded = Counter(readable(metric) for trial in members for metric in trial.exceeded)
        why = ", ".join(f"{metric} ({count})" for metric, count in exceeded.most_common())
        failed = Counter(trial.failure.partition(":")[0] for trial in members if trial.failure)
        why = why or ", ".join(f"at {stage} ({count})" for stage, count in failed.most_common())
        lines.append(_line(outcome, str(len(members)), why or "–"))
    return _table("", ("Outcome", "Trials", "Exceeded limits, or failed stages"), lines)


def _importance_table(course: Course) -> str:
    metrics = list(course.importance)
    names = {n: max(course.importance[m].get(n, 0.0) for m in metrics) for m in metrics for n in course.importance[m]}
    shown = sorted((n for n in names if names[n] >= _DECIDES), key=lambda n: -names[n])
    if not shown:
        return "<p>Too few trials were measured, or no parameter decides alone.</p>"
    lines = []
    for name in shown:
        bars = "".join(f"<td>{_bar(course.importance[metric].get(name, 0.0))}</td>" for metric in metrics)
        lines.append(f"<tr><td>{escape(name)}</td>{bars}</tr>")
    return _table("", ("Parameter", *map(readable, metrics)), lines)


def _bar(share: float) -> str:
    return f"<span class='bar' style='width:{120 * share:.0f}px'></span> {share:.0%}"


def _course(course: Course) -> str:
    return _spent(course) + growth(course.hypervolumes)


def _spent(course: Course) -> str:
    told = [f"All trials together took {course.spent_s / 60:.1f} minutes."]
    if course.spent_j:
        told.append(f"They needed {course.spent_j / 3600:.3g} Wh.")
    saved = [f"{seconds / 60:.1f} by {by}" for by, seconds in course.saved_s.items() if seconds >= 1]
    told += [f"Minutes that were not spent: {', '.join(saved)}."] if saved else []
    return f"<p>{escape(' '.join(told))}</p>"


def growth(hypervolumes: Sequence[float]) -> str:
    """The front's hypervolume over the trials, as a line and in words; nothing before the first feasible trial."""
    if not any(hypervolumes):
        return ""
    width, height, top = 720, 150, max(hypervolumes)
    across = width / max(1, len(hypervolumes) - 1)
    points = " ".join(
        f"{n * across:.1f},{height - 4 - (height - 8) * value / top:.1f}" for n, value in enumerate(hypervolumes)
    )
    words = (
        f"The front after each evaluated trial, as the share that it dominates of what lies within the limits "
        f"(hypervolume): {hypervolumes[-1]:.3f} after the last."
    )
    line = f"<polyline points='{points}' fill='none' stroke='{FRONT}' stroke-width='2'/>"
    box = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    return f"<p>{escape(words)}</p><svg role='img' aria-label='{escape(words)}' {box}>{line}</svg>"


def _trial_table(snapshot: StudySnapshot) -> str:
    objectives = snapshot.objectives
    heads = ("#", "Outcome", *(readable(o.metric) for o in objectives), "Least headroom", "Recipe")
    order = {"front": 0, "feasible": 1, "infeasible": 2}
    lines = []
    if snapshot.baseline:
        original = (_number(snapshot.baseline.get(o.metric), o.unit) for o in objectives)
        empty = "<td class='n' data-v=''>–</td>"
        lines.append(f"<tr class='baseline'>{empty}<td>original model</td>{''.join(original)}{empty}<td></td></tr>")
    for trial in sorted(snapshot.trials, key=lambda t: (order[kind_of(t)], t.number)):
        excesses = [trial.excess.get(limit.metric) for limit in snapshot.limits]
        room = None if not excesses or None in excesses else -max(e for e in excesses if e is not None)
        settings = ", ".join(f"{name}={short(value)}" for name, value in trial.params.items())
        cells = [
            f"<td class='n'>{trial.number}</td>",
            f"<td>{escape(verdict(trial))}</td>",
            *(_number(trial.metrics.get(o.metric), o.unit) for o in objectives),
            f"<td class='n' data-v='{'' if room is None else room}'>{'–' if room is None else f'{room:.0%}'}</td>",
            f"<td class='p'>{escape(settings)}</td>",
        ]
        lines.append(f"<tr class='{kind_of(trial)}'>{''.join(cells)}</tr>")
    return _table("trials", heads, lines, sortable=True)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "<td class='n' data-v=''>–</td>"
    return f"<td class='n' data-v='{value}'>{escape(units.format_quantity(value, unit))}</td>"


def _line(*cells: str, titles: Sequence[str] = ()) -> str:
    """Return a table row; `titles` are metrics whose explanation becomes the tooltip of the first cells."""
    tooltips = [f" title='{escape(explain(metric), quote=True)}'" if explain(metric) else "" for metric in titles]
    tooltips += [""] * (len(cells) - len(tooltips))
    return f"<tr>{''.join(f'<td{tip}>{escape(cell)}</td>' for cell, tip in zip(cells, tooltips, strict=True))}</tr>"


def _table(kind: str, heads: Iterable[str], lines: Sequence[str], *, sortable: bool = False) -> str:
    named = (f"<button type='button'>{escape(head)}</button>" if sortable else escape(head) for head in heads)
    head = "".join(f"<th scope='col'>{name}</th>" for name in named)
    return f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def verdict(trial: TrialSnapshot) -> str:
    """Return the outcome of a trial with its reason."""
    words = trial.outcome_text
    if trial.failure:
        return f"{words}: {trial.failure}"
    exceeded = [f"{readable(metric)} {excess:+.0%}" for metric, excess in trial.exceeded.items()]
    missing = [readable(metric) for metric in trial.unmeasured]
    if trial.outcome in ("refused", "stopped"):
        return f"{words}: {', '.join(exceeded)}"
    if trial.outcome != "infeasible":
        return words
    reasons = [f"exceeds {', '.join(exceeded)}"] if exceeded else []
    reasons += [f"not measured: {', '.join(missing)}"] if missing else []
    return f"{words}: {'; '.join(reasons) or 'a measurement was disturbed, so a limit is not proven'}"
