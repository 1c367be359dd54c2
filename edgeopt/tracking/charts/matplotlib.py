"""Draw the front with Matplotlib: a PNG picture, and a PDF document with the table of trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

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
    caption,
    label_front,
)

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": TEXT_COLOUR,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": TEXT_COLOUR,
    "grid.color": "#e4e7eb",
}

_PAGE_INCHES = (11.0, 7.2)
_ROWS_PER_PAGE = 36
_MAX_CELL = 72  # characters
_LINE_POINTS = 0.91 * 72 * _PAGE_INCHES[0]
_BOLD_WIDTH = 1.2  # of a bold character, relative to a normal one
_CHARACTER_WIDTH = 0.56  # mean width of a character of DejaVu Sans, relative to the font size
_MARKS: tuple[tuple[PointKind, int, str, str], ...] = (
    ("feasible", 46, "white", FEASIBLE_COLOUR),
    ("front", 110, TEXT_COLOUR, FRONT_COLOUR),
)


def write_png(data: ChartData, path: Path) -> None:
    """Draw the chart into a PNG file."""
    with mpl.rc_context(_STYLE):
        _chart(data).savefig(path)


def write_pdf(data: ChartData, headers: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    """Write a PDF document: the chart on page 1, a table of trials on page 2 and following."""
    with mpl.rc_context(_STYLE), PdfPages(path, metadata={"Title": f"Study {data.study}"}) as document:
        document.savefig(_chart(data))
        pages = max(1, math.ceil(len(rows) / _ROWS_PER_PAGE))
        for page in range(pages):
            title = f"Study {data.study}: trials" + (f" ({page + 1} of {pages})" if pages > 1 else "")
            shown = rows[page * _ROWS_PER_PAGE : (page + 1) * _ROWS_PER_PAGE]
            document.savefig(_table_page(title, headers, shown))


def _table_page(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Figure:
    """Draw a table; column widths follow the longest cell, and cells that are too long are cut."""
    figure = Figure(figsize=_PAGE_INCHES, facecolor="white")
    figure.text(0.045, 0.945, title, fontsize=15, fontweight="bold")
    cells = [[_cut(text) for text in row] for row in (headers, *rows)]
    lengths = [[len(text) * (1.0 if line else _BOLD_WIDTH) for text in row] for line, row in enumerate(cells)]
    widths = [max(row[column] for row in lengths) + 2 for column in range(len(headers))]
    size = min(9.0, _LINE_POINTS / max(1, sum(widths)) / _CHARACTER_WIDTH)
    starts = [0.045 + 0.91 * sum(widths[:column]) / sum(widths) for column in range(len(headers))]
    for line, row in enumerate(cells):
        y = 0.9 - 0.84 * line / (_ROWS_PER_PAGE + 1)
        for x, text in zip(starts, row, strict=True):
            figure.text(x, y, text, fontsize=size, fontweight="normal" if line else "bold", parse_math=False)
    return figure


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"


def _chart(data: ChartData) -> Figure:
    figure = Figure(figsize=_PAGE_INCHES, dpi=130, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.955, top=0.86, bottom=0.175)
    axes.grid(True, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(data.x.low, data.x.high)
    axes.set_ylim(data.y.low, data.y.high)
    axes.set_xlabel(_axis_label(data.x), labelpad=8)
    axes.set_ylabel(_axis_label(data.y), labelpad=8)
    _limits(axes, data)
    _points(figure, axes, data)
    _title(figure, data)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.075, 0.005), ncols=2, frameon=False, fontsize=9.5
    )
    canvas.draw()  # type: ignore[no-untyped-call]
    _labels(axes, data)
    return figure


def _axis_label(axis: Axis) -> str:
    return "  ·  ".join(filter(None, (axis.title, axis.better)))


def _title(figure: Figure, data: ChartData) -> None:
    figure.text(0.085, 0.945, f"Study {data.study}: Pareto front", fontsize=15, fontweight="bold")
    figure.text(0.085, 0.905, caption(data), fontsize=10.5, color="#52606d")


def _points(figure: Figure, axes: Any, data: ChartData) -> None:
    _scatter(
        axes,
        data.points_of("infeasible"),
        label=POINT_KINDS["infeasible"],
        marker="x",
        c=INFEASIBLE_COLOUR,
        s=42,
        linewidths=1.6,
        zorder=2,
    )
    scale: dict[str, Any] = {}
    coloured = [p.colour for p in data.points if p.kind != "infeasible" and p.colour is not None]
    if data.colour is not None and coloured:
        scale = {"cmap": COLOUR_MAP, "vmin": min(coloured), "vmax": max(coloured)}
    if data.front_line:
        axes.plot(
            [p.x for p in data.front_line],
            [p.y for p in data.front_line],
            color=TEXT_COLOUR,
            linewidth=1.2,
            alpha=0.55,
            zorder=3,
        )
    for point in data.points:
        _error_bars(axes, point)
    if data.baseline is not None:
        axes.scatter(
            *data.baseline,
            label=BASELINE_LABEL,
            marker="D",
            s=80,
            c=LIMIT_COLOUR,
            edgecolors=TEXT_COLOUR,
            linewidths=1,
            zorder=4,
        )
    last = None
    for kind, size, edge, plain in _MARKS:
        fill: dict[str, Any] = {"c": [p.colour for p in data.points_of(kind)], **scale} if scale else {"c": plain}
        style = {"label": POINT_KINDS[kind], "s": size, "edgecolors": edge, "linewidths": 1.3, "zorder": 4}
        last = _scatter(axes, data.points_of(kind), **style, **fill) or last
    if scale and last is not None and data.colour is not None:
        bar = figure.colorbar(last, ax=axes, pad=0.015, fraction=0.05, aspect=32)
        bar.set_label(_axis_label(data.colour), labelpad=8)
        bar.outline.set_visible(False)


def _scatter(axes: Any, points: Sequence[Point], **style: Any) -> Any:
    if not points:
        return None
    return axes.scatter([p.x for p in points], [p.y for p in points], **style)


def _error_bars(axes: Any, point: Point) -> None:
    for line in point.interval_lines:
        xs, ys = zip(*line, strict=True)
        axes.plot(xs, ys, color="#7b8794", linewidth=0.9, alpha=0.7, zorder=2)


def _limits(axes: Any, data: ChartData) -> None:
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    style = {"fontsize": 9.5, "color": LIMIT_COLOUR, "bbox": box, "textcoords": "offset points"}
    line = {"color": LIMIT_COLOUR, "linewidth": 1.4, "linestyle": (0, (5, 3))}
    legend = {"label": "limit; the shaded side is not allowed"}
    if (x := data.x.drawn_bound) is not None:
        axes.axvspan(x, data.x.high, color=LIMIT_COLOUR, alpha=0.07, linewidth=0)
        axes.axvline(x, **line, **legend)
        axes.annotate(data.x.bound_text, (x, 1), xycoords=("data", "axes fraction"), xytext=(6, -6), va="top", **style)
        legend = {}
    elif data.x.distant:
        axes.annotate(data.x.bound_text, (1, 0), xycoords="axes fraction", xytext=(-6, 6), ha="right", **style)
    if (y := data.y.drawn_bound) is not None:
        axes.axhspan(y, data.y.high, color=LIMIT_COLOUR, alpha=0.07, linewidth=0)
        axes.axhline(y, **line, **legend)
        where = {"xycoords": ("axes fraction", "data"), "xytext": (-6, 6), "ha": "right"}
        axes.annotate(data.y.bound_text, (1, y), **where, **style)
    elif data.y.distant:
        axes.annotate(data.y.bound_text, (0, 1), xycoords="axes fraction", xytext=(6, -6), va="top", **style)


def _labels(axes: Any, data: ChartData) -> None:
    """Draw the numbers of the front's trials where they overlap nothing."""

    def pixel(point: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(point)
        return float(x), float(y)

    front = data.points_of("front")
    texts = [f"#{point.number}" for point in front]
    box = axes.get_window_extent()
    sizes = [(11 * len(text) + 4, 18) for text in texts]
    centres = label_front(data, pixel, sizes, 10, (box.x0, box.y0, box.x1, box.y1))
    back = axes.transData.inverted()
    for text, point in zip(texts, centres, strict=True):
        x, y = back.transform(point)
        axes.text(x, y, text, ha="center", va="center", fontsize=10, fontweight="bold", zorder=5)
