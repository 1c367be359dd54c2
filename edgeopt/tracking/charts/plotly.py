"""Draw the front as an interactive chart with Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from edgeopt.core.metric_text import readable
from edgeopt.tracking.charts.chart_data import (
    BASELINE_LABEL,
    COLOUR_MAP,
    FEASIBLE_COLOUR,
    FRONT_COLOUR,
    INFEASIBLE_COLOUR,
    LIMIT_COLOUR,
    POINT_KINDS,
    TEXT_COLOUR,
    Axis,
    ChartData,
    Point,
    PointKind,
    label_front,
)

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_WIDTH, _HEIGHT = 960, 520  # size of the plot area in pixels, to place labels


def figure(data: ChartData) -> go.Figure:
    """Return the chart as a Plotly figure."""
    drawing = go.Figure()
    coloured = [p.colour for p in data.points if p.kind != "infeasible" and p.colour is not None]
    if data.front_line:
        drawing.add_scatter(
            x=[p.x for p in data.front_line],
            y=[p.y for p in data.front_line],
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            line={"color": TEXT_COLOUR, "width": 1.4},
            opacity=0.5,
        )
    styles: tuple[tuple[PointKind, dict[str, Any]], ...] = (
        (
            "infeasible",
            {
                "symbol": "x-thin",
                "size": 8,
                "line": {"width": 1.8, "color": INFEASIBLE_COLOUR},
                "color": INFEASIBLE_COLOUR,
            },
        ),
        ("feasible", {"size": 9, "line": {"width": 1, "color": "white"}, "color": FEASIBLE_COLOUR}),
        ("front", {"size": 15, "line": {"width": 1.6, "color": TEXT_COLOUR}, "color": FRONT_COLOUR}),
    )
    for kind, marker in styles:
        points = data.points_of(kind)
        if kind != "infeasible" and data.colour is not None and coloured:
            marker |= _colour_scale(data.colour, points, coloured, bar=kind == "front" or not data.points_of("front"))
        drawing.add_scatter(
            x=[p.x for p in points],
            y=[p.y for p in points],
            mode="markers",
            name=POINT_KINDS[kind],
            marker=marker,
            hovertemplate="%{customdata}<extra></extra>",
            customdata=[_hover(p) for p in points],
            error_x=_error_bars([(p.x, p.x_interval) for p in points]),
            error_y=_error_bars([(p.y, p.y_interval) for p in points]),
        )
    if data.baseline is not None:
        drawing.add_scatter(
            x=[data.baseline[0]],
            y=[data.baseline[1]],
            mode="markers",
            name=BASELINE_LABEL,
            marker={"symbol": "diamond", "size": 13, "color": LIMIT_COLOUR, "line": {"width": 1, "color": TEXT_COLOUR}},
            hovertemplate=f"<b>{BASELINE_LABEL}</b><br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        )
    _limits(drawing, data)
    _labels(drawing, data)
    axis = {"gridcolor": "#e4e7eb", "zeroline": False, "linecolor": "#7b8794", "ticks": "outside"}
    drawing.update_layout(
        font={"family": _FONT, "size": 14, "color": TEXT_COLOUR},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=664,
        margin={"l": 76, "r": 24, "t": 40, "b": 120},
        hoverlabel={"bgcolor": "white", "font": {"family": _FONT, "size": 13}},
        legend={"orientation": "h", "x": 0, "y": -0.15, "yanchor": "top", "itemwidth": 30},
        xaxis={**axis, "range": [data.x.low, data.x.high], "title": _axis_title(data.x)},
        yaxis={**axis, "range": [data.y.low, data.y.high], "title": _axis_title(data.y)},
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
        "colorscale": COLOUR_MAP,
        "cmin": min(coloured),
        "cmax": max(coloured),
        "showscale": bar,
        "colorbar": {"title": title, "thickness": 14, "outlinewidth": 0},
    }


def _limits(drawing: go.Figure, data: ChartData) -> None:
    line = {"color": LIMIT_COLOUR, "width": 1.6, "dash": "dash"}
    shade = {"fillcolor": LIMIT_COLOUR, "opacity": 0.07, "line_width": 0, "layer": "below"}
    text = {"font": {"color": LIMIT_COLOUR, "size": 13}, "bgcolor": "rgba(255,255,255,0.85)", "showarrow": False}
    corner = {"x": 1, "y": 1, "xref": "paper", "yref": "paper"}
    beside = {**corner, "xanchor": "left", "yanchor": "top", "xshift": 5, "yshift": -4, **text}
    above = {**corner, "xanchor": "right", "yanchor": "bottom", "xshift": -5, "yshift": 4, **text}
    if (x := data.x.drawn_bound) is not None:
        drawing.add_vrect(x0=x, x1=data.x.high, **shade)
        drawing.add_vline(x=x, line=line)
        drawing.add_annotation({**beside, "x": x, "xref": "x", "text": data.x.bound_text})
    elif data.x.distant:
        drawing.add_annotation({**above, "y": 0, "text": data.x.bound_text})
    if (y := data.y.drawn_bound) is not None:
        drawing.add_hrect(y0=y, y1=data.y.high, **shade)
        drawing.add_hline(y=y, line=line)
        drawing.add_annotation({**above, "y": y, "yref": "y", "text": data.y.bound_text})
    elif data.y.distant:
        drawing.add_annotation({**beside, "x": 0, "text": data.y.bound_text})


def _labels(drawing: go.Figure, data: ChartData) -> None:
    def pixel(location: tuple[float, float]) -> tuple[float, float]:
        return (
            (location[0] - data.x.low) / (data.x.high - data.x.low) * _WIDTH,
            (location[1] - data.y.low) / (data.y.high - data.y.low) * _HEIGHT,
        )

    front = data.points_of("front")
    texts = [f"#{p.number}" for p in front]
    centres = label_front(data, pixel, [(9 * len(text) + 4, 18) for text in texts], 8, (0, 0, _WIDTH, _HEIGHT))
    for point, text, (x, y) in zip(front, texts, centres, strict=True):
        from_x, from_y = pixel((point.x, point.y))
        drawing.add_annotation(
            x=point.x,
            y=point.y,
            text=f"<b>{text}</b>",
            showarrow=False,
            xshift=x - from_x,
            yshift=y - from_y,
            font={"size": 14, "color": TEXT_COLOUR},
        )


def _hover(point: Point) -> str:
    trial = point.trial
    lines = [f"<b>Trial {point.number}</b> · {POINT_KINDS[point.kind]}"]
    lines += [f"{escape(str(k))} = {escape(short(v))}" for k, v in trial.params.items()]
    lines.append("")
    lines += [f"{escape(readable(k))}: {v:.4g}" for k, v in list(trial.metrics.items())[:14]]
    limits = [f"{escape(readable(k))}: {_headroom(v)}" for k, v in trial.excess.items() if v is not None]
    return "<br>".join([*lines, *(["", "<b>Limits</b>", *limits] if limits else [])])


def _headroom(excess: float) -> str:
    return f"exceeded by {excess:.0%}" if excess > 0 else f"{-excess:.0%} headroom"


def short(value: Any) -> str:
    """Return the value of a parameter with at most 60 characters."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
