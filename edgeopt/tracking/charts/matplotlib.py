"""The front as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": INK,
    "grid.color": "#e4e7eb",
}

_MARKS: tuple[tuple[Kind, int, str, str], ...] = (("feasible", 46, "white", PLAIN), ("front", 110, INK, FRONT))


def write(view: View, path: Path) -> None:
    """Draw `view` into the PNG file `path`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 7.2), dpi=130, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.085, right=0.955, top=0.86, bottom=0.175)
        axes.grid(True, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(view.x.low, view.x.high)
        axes.set_ylim(view.y.low, view.y.high)
        axes.set_xlabel(_words(view.x), labelpad=8)
        axes.set_ylabel(_words(view.y), labelpad=8)
        _limits(axes, view)
        _points(figure, axes, view)
        _title(figure, view)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.075, 0.005), ncols=2, frameon=False, fontsize=9.5
        )
        canvas.draw()  # type: ignore[no-untyped-call]
        _labels(axes, view)
        figure.savefig(path)


def _words(axis: Axis) -> str:
    return "  ·  ".join(filter(None, (axis.title, axis.better)))


def _title(figure: Figure, view: View) -> None:
    figure.text(0.085, 0.945, f"Study {view.study}: which compressed models fit", fontsize=15, fontweight="bold")
    figure.text(0.085, 0.905, headline(view), fontsize=10.5, color="#52606d")


def headline(view: View) -> str:
    """One sentence of totals for people."""
    shown, kept = len(view.points), len(view.of("front")) + len(view.of("feasible"))
    text = f"{shown} trials measured, {kept} satisfy every limit, {len(view.of('front'))} of them on the front"
    return f"{text}; {len(view.unplotted)} ended without these figures" if view.unplotted else text


def _points(figure: Figure, axes: Any, view: View) -> None:
    _scatter(axes, view.of("infeasible"), label=KINDS["infeasible"], marker="x", c=GREY, s=42, linewidths=1.6, zorder=2)
    scale: dict[str, Any] = {}
    coloured = [p.colour for p in view.points if p.kind != "infeasible" and p.colour is not None]
    if view.colour is not None and coloured:
        scale = {"cmap": COLOURS, "vmin": min(coloured), "vmax": max(coloured)}
    if view.path:
        axes.plot([p.x for p in view.path], [p.y for p in view.path], color=INK, linewidth=1.2, alpha=0.55, zorder=3)
    for point in view.points:
        _error_bars(axes, point)
    if view.baseline is not None:
        axes.scatter(
            *view.baseline, label=BASELINE_LABEL, marker="D", s=80, c=LIMIT, edgecolors=INK, linewidths=1, zorder=4
        )
    last = None
    for kind, size, edge, plain in _MARKS:
        fill: dict[str, Any] = {"c": [p.colour for p in view.of(kind)], **scale} if scale else {"c": plain}
        style = {"label": KINDS[kind], "s": size, "edgecolors": edge, "linewidths": 1.3, "zorder": 4}
        last = _scatter(axes, view.of(kind), **style, **fill) or last
    if scale and last is not None and view.colour is not None:
        bar = figure.colorbar(last, ax=axes, pad=0.015, fraction=0.05, aspect=32)
        bar.set_label(_words(view.colour), labelpad=8)
        bar.outline.set_visible(False)


def _scatter(axes: Any, points: Sequence[Point], **style: Any) -> Any:
    if not points:
        return None
    return axes.scatter([p.x for p in points], [p.y for p in points], **style)


def _error_bars(axes: Any, point: Point) -> None:
    style = {"color": "#7b8794", "linewidth": 0.9, "alpha": 0.7, "zorder": 2}
    if point.x_interval is not None:
        axes.plot(point.x_interval, (point.y, point.y), **style)
    if point.y_interval is not None:
        axes.plot((point.x, point.x), point.y_interval, **style)


def _limits(axes: Any, view: View) -> None:
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    words = {"fontsize": 9.5, "color": LIMIT, "bbox": box, "textcoords": "offset points"}
    line = {"color": LIMIT, "linewidth": 1.4, "linestyle": (0, (5, 3))}
    named = {"label": "limit; the shaded side is not allowed"}
    if (x := view.x.drawn_bound) is not None:
        axes.axvspan(x, view.x.high, color=LIMIT, alpha=0.07, linewidth=0)
        axes.axvline(x, **line, **named)
        axes.annotate(view.x.bound_text, (x, 1), xycoords=("data", "axes fraction"), xytext=(6, -6), va="top", **words)
        named = {}
    elif view.x.distant:
        text = f"{view.x.bound_text} lies outside"
        axes.annotate(text, (1, 0), xycoords="axes fraction", xytext=(-6, 6), ha="right", **words)
    if (y := view.y.drawn_bound) is not None:
        axes.axhspan(y, view.y.high, color=LIMIT, alpha=0.07, linewidth=0)
        axes.axhline(y, **line, **named)
        where = {"xycoords": ("axes fraction", "data"), "xytext": (-6, 6), "ha": "right"}
        axes.annotate(view.y.bound_text, (1, y), **where, **words)
    elif view.y.distant:
        text = f"{view.y.bound_text} lies outside"
        axes.annotate(text, (0, 1), xycoords="axes fraction", xytext=(6, -6), va="top", **words)


def _labels(axes: Any, view: View) -> None:
    """Numbers of the front's members, where they cover neither points nor lines nor each other."""

    def pixel(point: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(point)
        return float(x), float(y)

    front = view.of("front")
    texts = [f"#{point.number}" for point in front]
    box = axes.get_window_extent()
    sizes = [(11 * len(text) + 4, 18) for text in texts]
    places = label_front(view, pixel, sizes, 10, (box.x0, box.y0, box.x1, box.y1))
    back = axes.transData.inverted()
    for text, point in zip(texts, places, strict=True):
        x, y = back.transform(point)
        axes.text(x, y, text, ha="center", va="center", fontsize=10, fontweight="bold", zorder=5)
