"""The front as one self-contained page: an interactive chart, the limits and every trial in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from edgeopt import units
from edgeopt.tracking.chart_png import headline
from edgeopt.tracking.view import (
    COLOURS,
    FRONT,
    GREY,
    INK,
    KINDS,
    LIMIT,
    PLAIN,
    Axis,
    Kind,
    Point,
    View,
    kind_of,
    obstacles,
    place_labels,
    readable,
)

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_WIDTH, _HEIGHT = 960, 520  # of the plot's inside in pixels, for placing labels
_PAGE = Path(__file__).with_name("front.html")


def write(
    view: View, path: Path, *, objectives: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page; it needs no network and no other file."""
    chart = figure(view).to_html(
        full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True}
    )
    rows = [*(p.row for p in view.points), *view.unplotted]
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in {
        "STUDY": escape(view.study),
        "HEADLINE": escape(headline(view)),
        "HOW": _how(view),
        "LIMITS": _limit_table(limits),
        "TRIALS": _trial_table(rows, objectives),
        "CHART": chart,
    }.items():
        page = page.replace(f"<!--{name}-->", text)
    path.write_text(page, encoding="utf-8")


def figure(view: View) -> go.Figure:
    """The chart alone."""
    drawing = go.Figure()
    coloured = [p.colour for p in view.points if p.kind != "infeasible" and p.colour is not None]
    if view.path:
        drawing.add_scatter(
            x=[p.x for p in view.path],
            y=[p.y for p in view.path],
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            line={"color": INK, "width": 1.4},
            opacity=0.5,
        )
    styles: tuple[tuple[Kind, dict[str, Any]], ...] = (
        ("infeasible", {"symbol": "x-thin", "size": 8, "line": {"width": 1.8, "color": GREY}, "color": GREY}),
        ("feasible", {"size": 9, "line": {"width": 1, "color": "white"}, "color": PLAIN}),
        ("front", {"size": 15, "line": {"width": 1.6, "color": INK}, "color": FRONT}),
    )
    for kind, marker in styles:
        points = view.of(kind)
        if kind != "infeasible" and view.colour is not None and coloured:
            marker |= _colour_scale(view.colour, points, coloured, bar=kind == "front" or not view.of("front"))
        drawing.add_scatter(
            x=[p.x for p in points],
            y=[p.y for p in points],
            mode="markers",
            name=KINDS[kind],
            marker=marker,
            hovertemplate="%{customdata}<extra></extra>",
            customdata=[_hover(p) for p in points],
        )
    _limits(drawing, view)
    _labels(drawing, view)
    axis = {"gridcolor": "#e4e7eb", "zeroline": False, "linecolor": "#7b8794", "ticks": "outside"}
    drawing.update_layout(
        font={"family": _FONT, "size": 14, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=664,
        margin={"l": 76, "r": 24, "t": 40, "b": 120},
        hoverlabel={"bgcolor": "white", "font": {"family": _FONT, "size": 13}},
        legend={"orientation": "h", "x": 0, "y": -0.15, "yanchor": "top", "itemwidth": 30},
        xaxis={**axis, "range": [view.x.low, view.x.high], "title": _axis_title(view.x)},
        yaxis={**axis, "range": [view.y.low, view.y.high], "title": _axis_title(view.y)},
    )
    return drawing


def _axis_title(axis: Axis) -> str:
    better = f" <span style='color:#52606d'>· {axis.better}</span>" if axis.better else ""
    return escape(axis.title) + better


def _colour_scale(axis: Axis, points: Sequence[Point], coloured: Sequence[float], *, bar: bool) -> dict[str, Any]:
    title = {"text": f"{escape(axis.title)} · {axis.better}", "side": "right"}
    return {
        "color": [p.colour for p in points],
        "colorscale": COLOURS,
        "cmin": min(coloured),
        "cmax": max(coloured),
        "showscale": bar,
        "colorbar": {"title": title, "thickness": 14, "outlinewidth": 0},
    }


def _limits(drawing: go.Figure, view: View) -> None:
    line = {"color": LIMIT, "width": 1.6, "dash": "dash"}
    shade = {"fillcolor": LIMIT, "opacity": 0.07, "line_width": 0, "layer": "below"}
    word = {"font": {"color": LIMIT, "size": 13}, "bgcolor": "rgba(255,255,255,0.85)", "showarrow": False}
    corner = {"x": 1, "y": 1, "xref": "paper", "yref": "paper"}
    beside = {**corner, "xanchor": "left", "yanchor": "top", "xshift": 5, "yshift": -4, **word}
    above = {**corner, "xanchor": "right", "yanchor": "bottom", "xshift": -5, "yshift": 4, **word}
    if (x := view.x.drawn_bound) is not None:
        drawing.add_vrect(x0=x, x1=view.x.high, **shade)
        drawing.add_vline(x=x, line=line)
        drawing.add_annotation({**beside, "x": x, "xref": "x", "text": view.x.bound_text})
    elif view.x.distant:
        drawing.add_annotation({**above, "y": 0, "text": f"{view.x.bound_text} lies outside"})
    if (y := view.y.drawn_bound) is not None:
        drawing.add_hrect(y0=y, y1=view.y.high, **shade)
        drawing.add_hline(y=y, line=line)
        drawing.add_annotation({**above, "y": y, "yref": "y", "text": view.y.bound_text})
    elif view.y.distant:
        drawing.add_annotation({**beside, "x": 0, "text": f"{view.y.bound_text} lies outside"})


def _labels(drawing: go.Figure, view: View) -> None:
    def pixel(place: tuple[float, float]) -> tuple[float, float]:
        return (
            (place[0] - view.x.low) / (view.x.high - view.x.low) * _WIDTH,
            (place[1] - view.y.low) / (view.y.high - view.y.low) * _HEIGHT,
        )

    front = view.of("front")
    texts = [f"#{p.number}" for p in front]
    places = place_labels(
        [pixel((p.x, p.y)) for p in front],
        [(9 * len(text) + 4, 18) for text in texts],
        obstacles([pixel((p.x, p.y)) for p in view.points], [list(map(pixel, line)) for line in view.lines], radius=8),
        (0, 0, _WIDTH, _HEIGHT),
    )
    for point, text, (x, y) in zip(front, texts, places, strict=True):
        from_x, from_y = pixel((point.x, point.y))
        drawing.add_annotation(
            x=point.x,
            y=point.y,
            text=f"<b>{text}</b>",
            showarrow=False,
            xshift=x - from_x,
            yshift=y - from_y,
            font={"size": 14, "color": INK},
        )


def _hover(point: Point) -> str:
    row = point.row
    lines = [f"<b>Trial {point.number}</b> · {KINDS[point.kind]}"]
    lines += [f"{escape(str(k))} = {escape(_short(v))}" for k, v in row["params"].items()]
    lines.append("")
    lines += [f"{escape(readable(k))}: {v:.4g}" for k, v in list(row["metrics"].items())[:14]]
    above = {k: v for k, v in row["excess"].items() if v is not None and v > 0}
    broken = [f"{escape(readable(k))}: {v:+.0%}" for k, v in above.items()]
    return "<br>".join([*lines, *(["", "<b>above the limit</b>", *broken] if broken else [])])


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


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


def _limit_table(limits: Sequence[Mapping[str, Any]]) -> str:
    if not limits:
        return "<p>No limits were set.</p>"
    cells = "".join(
        f"<tr><td>{escape(readable(limit['metric']))}</td><td>{escape(str(limit['limit']))}</td>"
        f"<td>{'not known' if limit['bound'] is None else escape(units.show(limit['bound'], limit['unit']))}</td></tr>"
        for limit in limits
    )
    return _table("", "<th>Figure</th><th>Limit</th><th>In figures</th>", cells)


def _trial_table(rows: Sequence[Mapping[str, Any]], objectives: Sequence[Mapping[str, Any]]) -> str:
    heads = "".join(f"<th class='n'>{escape(readable(o['metric']))}</th>" for o in objectives)
    order = {"front": 0, "feasible": 1, "infeasible": 2}
    lines = []
    for row in sorted(rows, key=lambda r: (order[kind_of(r)], r["number"])):
        figures = "".join(f"<td class='n'>{_cell(row['metrics'].get(o['metric']), o['unit'])}</td>" for o in objectives)
        settings = ", ".join(f"{k}={_short(v)}" for k, v in row["params"].items())
        lines.append(
            f"<tr class='{kind_of(row)}'><td class='n'>{row['number']}</td><td>{escape(verdict(row))}</td>{figures}"
            f"<td class='p'>{escape(settings)}</td></tr>"
        )
    return _table("trials", f"<th class='n'>#</th><th>Outcome</th>{heads}<th>Recipe</th>", "".join(lines))


def _table(kind: str, head: str, body: str) -> str:
    return f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def verdict(row: Mapping[str, Any]) -> str:
    """What became of a trial, in words."""
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


def _cell(value: float | None, unit: str) -> str:
    return "–" if value is None else escape(units.show(value, unit))
