"""The front as an interactive chart."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from edgeopt.core.metric_text import readable
from edgeopt.tracking.charts.chart_data import (
    BASELINE_LABEL,
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
    label_front,
)

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_WIDTH, _HEIGHT = 960, 520  # of the plot's inside in pixels, for placing labels


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
            error_x=_error_bars([(p.x, p.x_interval) for p in points]),
            error_y=_error_bars([(p.y, p.y_interval) for p in points]),
        )
    if view.baseline is not None:
        drawing.add_scatter(
            x=[view.baseline[0]],
            y=[view.baseline[1]],
            mode="markers",
            name=BASELINE_LABEL,
            marker={"symbol": "diamond", "size": 13, "color": LIMIT, "line": {"width": 1, "color": INK}},
            hovertemplate=f"<b>{BASELINE_LABEL}</b><br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
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


def _error_bars(values: Sequence[tuple[float, tuple[float, float] | None]]) -> dict[str, Any]:
    """Return 95 % confidence intervals as asymmetric error bars."""
    ends = [(value, *(interval or (value, value))) for value, interval in values]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, _, high in ends],
        "arrayminus": [value - low for value, low, _ in ends],
        "thickness": 1,
        "width": 3,
        "color": "#7b8794",
    }


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
    def pixel(location: tuple[float, float]) -> tuple[float, float]:
        return (
            (location[0] - view.x.low) / (view.x.high - view.x.low) * _WIDTH,
            (location[1] - view.y.low) / (view.y.high - view.y.low) * _HEIGHT,
        )

    front = view.of("front")
    texts = [f"#{p.number}" for p in front]
    places = label_front(view, pixel, [(9 * len(text) + 4, 18) for text in texts], 8, (0, 0, _WIDTH, _HEIGHT))
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
    trial = point.trial
    lines = [f"<b>Trial {point.number}</b> · {KINDS[point.kind]}"]
    lines += [f"{escape(str(k))} = {escape(short(v))}" for k, v in trial.params.items()]
    lines.append("")
    lines += [f"{escape(readable(k))}: {v:.4g}" for k, v in list(trial.metrics.items())[:14]]
    room = [f"{escape(readable(k))}: {_headroom(v)}" for k, v in trial.excess.items() if v is not None]
    return "<br>".join([*lines, *(["", "<b>limits</b>", *room] if room else [])])


def _headroom(excess: float) -> str:
    return f"{excess:.0%} beyond" if excess > 0 else f"{-excess:.0%} headroom"


def short(value: Any) -> str:
    """A setting as people read it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
