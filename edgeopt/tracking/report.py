"""The report on a study: one page that needs no network and no other file.

The front in any two objectives, the limits and the headroom below them, what was refused and why, what decides, how the
search went, and every trial in a table that can be sorted and filtered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from edgeopt.core import units
from edgeopt.tracking.charts.chart_data import FRONT, View, kind_of, prepare, readable
from edgeopt.tracking.charts.matplotlib import headline
from edgeopt.tracking.charts.plotly import figure, short

Rows = Sequence[Mapping[str, Any]]

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


def write(path: Path, *, study: str, rows: Rows, objectives: Rows, limits: Rows, course: Course) -> None:
    """Write the page; rows, objectives and limits are those of `edgeopt front --json`."""
    views = [prepare(study=study, rows=rows, objectives=pair, limits=limits) for pair in _pairs(objectives)]
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in {
        "STUDY": escape(study),
        "HEADLINE": escape(headline(views[0])),
        "CHARTS": _charts(views),
        "HOW": _how(views[0]),
        "LIMITS": limit_table(rows, limits),
        "OUTCOMES": outcome_table(rows),
        "IMPORTANCE": _importance_table(course),
        "COURSE": _course(course),
        "TRIALS": _trial_table(rows, objectives, limits),
        "SCRIPT": f"<script type='module'>{_SCRIPT.read_text(encoding='utf-8')}</script>",
    }.items():
        page = page.replace(f"<!--{name}-->", text)
    path.write_text(page, encoding="utf-8")


def _pairs(objectives: Rows) -> list[list[Mapping[str, Any]]]:
    """The objectives with each two of them in front, as they are first; the third is the colour."""
    if len(objectives) < 3:
        return [list(objectives)]
    return [[a, b, *(o for o in objectives if o not in (a, b))] for a, b in itertools.combinations(objectives, 2)]


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
    shown = {"Across": view.x, "Up": view.y, "Colour": view.colour}
    parts = ["Each point is one compressed model."]
    parts += [f"{where}: {escape(', '.join(filter(None, (a.title, a.better))))}." for where, a in shown.items() if a]
    if view.x.drawn_bound is not None or view.y.drawn_bound is not None:
        parts.append(
            "Dashed lines are limits; the shaded side is not allowed, and a limit counts as kept only where the whole "
            "confidence interval lies within it."
        )
    parts.append(
        "A model is <b>on the front</b> where no other that keeps every limit is at least as good in all of these and "
        "better in one: choose among the numbered points. Hover over a point for its recipe and figures."
    )
    return " ".join(parts)


def limit_table(rows: Rows, limits: Rows) -> str:
    """Each limit, how many trials keep it, and the room that the front leaves below it."""
    if not limits:
        return "<p>No limits were set.</p>"
    lines = []
    for limit in limits:
        known = [(row, row["excess"].get(limit["metric"])) for row in rows]
        judged = [excess for _, excess in known if excess is not None]
        front = [-excess for row, excess in known if excess is not None and kind_of(row) == "front"]
        bound = "not known" if limit["bound"] is None else units.show(limit["bound"], limit["unit"])
        room = f"{min(front):.0%} to {max(front):.0%}" if front else "–"
        kept = f"{sum(1 for excess in judged if excess <= 0)} of {len(judged)}"
        lines.append(_line(readable(limit["metric"]), str(limit["limit"]), bound, kept, room))
    return _table("", ("Figure", "Limit", "In figures", "Kept by", "Headroom on the front"), lines)


def outcome_table(rows: Rows) -> str:
    """How many trials ended how, and on which limits."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_outcome(row), []).append(row)
    lines = []
    for outcome, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        broken = Counter(readable(m) for row in members for m, e in row["excess"].items() if e is not None and e > 0)
        why = ", ".join(f"{metric} ({count})" for metric, count in broken.most_common())
        failed = Counter(str(row["failure"]).partition(":")[0] for row in members if row["failure"])
        why = why or ", ".join(f"at {stage} ({count})" for stage, count in failed.most_common())
        lines.append(_line(outcome, str(len(members)), why or "–"))
    return _table("", ("Outcome", "Trials", "Beyond the limit of, or failed at"), lines)


_NOT_OVER = {"waiting": "waits", "running": "is being evaluated"}


def is_over(row: Mapping[str, Any]) -> bool:
    return row["state"] not in _NOT_OVER


def _outcome(row: Mapping[str, Any]) -> str:
    if not is_over(row):
        return _NOT_OVER[row["state"]]
    if row["feasible"]:
        return "on the front" if row["pareto_rank"] == 1 else "keeps every limit"
    if row["failure"]:
        return "failed"
    if row["state"] == "refused":
        return "refused by prediction, before any work"
    if row["refused"]:
        return f"stopped after {row['refused']}"
    return "breaks a limit" if any(e is not None and e > 0 for e in row["excess"].values()) else "not proven"


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


def _trial_table(rows: Rows, objectives: Rows, limits: Rows) -> str:
    heads = ("#", "Outcome", *(readable(o["metric"]) for o in objectives), "Least headroom", "Recipe")
    order = {"front": 0, "feasible": 1, "infeasible": 2}
    lines = []
    for row in sorted(rows, key=lambda r: (order[kind_of(r)], r["number"])):
        excesses = [row["excess"].get(limit["metric"]) for limit in limits]
        room = None if not excesses or None in excesses else -max(e for e in excesses if e is not None)
        settings = ", ".join(f"{k}={short(v)}" for k, v in row["params"].items())
        cells = [
            f"<td class='n'>{row['number']}</td>",
            f"<td>{escape(verdict(row))}</td>",
            *(_number(row["metrics"].get(o["metric"]), o["unit"]) for o in objectives),
            f"<td class='n' data-v='{'' if room is None else room}'>{'–' if room is None else f'{room:.0%}'}</td>",
            f"<td class='p'>{escape(settings)}</td>",
        ]
        lines.append(f"<tr class='{kind_of(row)}'>{''.join(cells)}</tr>")
    return _table("trials", heads, lines, sortable=True)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "<td class='n' data-v=''>–</td>"
    return f"<td class='n' data-v='{value}'>{escape(units.show(value, unit))}</td>"


def _line(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _table(kind: str, heads: Iterable[str], lines: Sequence[str], *, sortable: bool = False) -> str:
    named = (f"<button type='button'>{escape(head)}</button>" if sortable else escape(head) for head in heads)
    head = "".join(f"<th scope='col'>{name}</th>" for name in named)
    return f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def verdict(row: Mapping[str, Any]) -> str:
    """What became of a trial, in words."""
    if not is_over(row):
        return _NOT_OVER[row["state"]]
    if row["feasible"]:
        return "on the front" if row["pareto_rank"] == 1 else "keeps every limit"
    if row["failure"]:
        return f"failed: {row['failure']}"
    broken = [f"{readable(k)} {v:+.0%}" for k, v in row["excess"].items() if v is not None and v > 0]
    missing = [readable(k) for k, v in row["excess"].items() if v is None]
    if row["state"] == "refused":
        return f"refused, predicted beyond its limit: {', '.join(broken)}"
    words = [f"beyond its limit: {', '.join(broken)}"] if broken else []
    words += [f"not measured: {', '.join(missing)}"] if missing else []
    return "; ".join(words) or f"not proven to keep its limits ({row['state']})"
