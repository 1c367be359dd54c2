"""Draw the front and its hypervolume as SVG; every point of the front chart is a link to its run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.tracking.charts.chart_data import (
    BASELINE_LABEL,
    FEASIBLE_COLOUR,
    FRONT_COLOUR,
    GRID_COLOUR,
    INFEASIBLE_COLOUR,
    LIMIT_COLOUR,
    POINT_KINDS,
    TEXT_COLOUR,
    Axis,
    ChartData,
    Pixel,
    Point,
    PointKind,
    label_front,
)

WIDTH, HEIGHT = 900, 460
_SMALL_WIDTH, _SMALL_HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 18, 56
_TICKS = 6
_STYLES: Mapping[PointKind, tuple[int, str, str]] = {
    "infeasible": (4, "none", INFEASIBLE_COLOUR),
    "feasible": (5, FEASIBLE_COLOUR, "white"),
    "front": (7, FRONT_COLOUR, TEXT_COLOUR),
}


def figure(data: ChartData, link: Callable[[TrialSnapshot], str]) -> str:
    """Return an `svg` element; `link` returns the address of a trial's run, or an empty string."""
    to_x = _scale(data.x.low, data.x.high, _LEFT, WIDTH - _RIGHT)
    to_y = _scale(data.y.low, data.y.high, HEIGHT - _BOTTOM, _TOP)
    front, plotted = len(data.points_of("front")), len(data.points)
    label = f"{data.y.title} against {data.x.title}: {front} of {plotted} trials on the front"
    parts = [
        f"<svg class='front' role='group' aria-label='{escape(label)}' viewBox='0 0 {WIDTH} {HEIGHT}'>",
        *_axes(data, to_x, to_y),
        *_limits(data, to_x, to_y),
    ]
    if len(data.front_line) > 1:
        path = " ".join(f"{to_x(p.x):.1f},{to_y(p.y):.1f}" for p in data.front_line)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{TEXT_COLOUR}' stroke-opacity='0.5'/>")
    parts += _baseline(data, to_x, to_y)
    labels = _label_centres(data, to_x, to_y)
    for kind, (_, fill, stroke) in _STYLES.items():
        for point in data.points_of(kind):
            parts += _error_bars(point, to_x, to_y, stroke if fill == "none" else fill)
        parts += [
            _point(data, p, to_x(p.x), to_y(p.y), link(p.trial), labels.get(p.number)) for p in data.points_of(kind)
        ]
    return "".join([*parts, "</svg>"])


def hypervolume_chart(hypervolumes: Sequence[float]) -> str:
    """Return an `svg` element that shows the hypervolume of the front after each trial."""
    count, top = len(hypervolumes), max(hypervolumes)
    to_x = _scale(1, max(2, count), _LEFT, _SMALL_WIDTH - _RIGHT)
    to_y = _scale(0.0, 1.1 * top, _SMALL_HEIGHT - _BOTTOM, _TOP)
    label = f"hypervolume of the front after each of {count} trials: {hypervolumes[-1]:.3f} after the last"
    points = " ".join(f"{to_x(n):.1f},{to_y(value):.1f}" for n, value in enumerate(hypervolumes, start=1))
    bottom, right = _SMALL_HEIGHT - _BOTTOM, _SMALL_WIDTH - _RIGHT
    parts = [f"<svg class='hypervolume' role='img' aria-label='{label}' viewBox='0 0 {_SMALL_WIDTH} {_SMALL_HEIGHT}'>"]
    for value in round_ticks(0.0, 1.1 * top, 4):
        y = to_y(value)
        parts.append(f"<line x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' class='grid' stroke='{GRID_COLOUR}'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{value:g}</text>")
    for value in [tick for tick in round_ticks(1, max(2, count), 8) if tick == int(tick)]:
        parts.append(f"<text x='{to_x(value):.1f}' y='{bottom + 18}' text-anchor='middle'>{value:g}</text>")
    middle = (_TOP + bottom) / 2
    parts += [
        f"<polyline points='{points}' fill='none' stroke='{FRONT_COLOUR}' stroke-width='2'/>",
        f"<path d='M{points.rpartition(' ')[2]}h0' stroke='{FRONT_COLOUR}' stroke-width='7' stroke-linecap='round'/>",
        f"<text x='{(_LEFT + right) / 2}' y='{_SMALL_HEIGHT - 14}' text-anchor='middle'>evaluated trials</text>",
        f"<text x='18' y='{middle}' transform='rotate(-90 18 {middle})' text-anchor='middle'>hypervolume</text>",
        "</svg>",
    ]
    return "".join(parts)


def _label_centres(data: ChartData, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> dict[int, Pixel]:
    """Return the centre of each front trial's label by trial number."""

    # label_front expects y to grow upwards
    def pixel(point: Pixel) -> Pixel:
        return to_x(point[0]), HEIGHT - to_y(point[1])

    front = data.points_of("front")
    sizes = [(8.0 * len(str(p.number)) + 2, 14.0) for p in front]
    centres = label_front(data, pixel, sizes, 7, (_LEFT, _BOTTOM, WIDTH - _RIGHT, HEIGHT - _TOP))
    return {point.number: (x, HEIGHT - y) for point, (x, y) in zip(front, centres, strict=True)}


def _point(data: ChartData, point: Point, x: float, y: float, link: str, label_at: Pixel | None) -> str:
    """Draw a point with its description as tooltip, and its number centred at `label_at`."""
    radius, fill, stroke = _STYLES[point.kind]
    values = ", ".join(
        f"{readable(axis.metric)} {units.format_quantity(value, axis.unit)}"
        for axis, value in ((data.x, point.x), (data.y, point.y), (data.colour, point.colour))
        if axis is not None and value is not None
    )
    params = ", ".join(f"{name} = {value}" for name, value in point.trial.params.items())
    description = escape(f"trial {point.number}, {POINT_KINDS[point.kind]}: {values}; {params}")
    dot = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{fill}' stroke='{stroke}' stroke-width='1.5'/>"
    name = ""
    if label_at is not None:
        position = f"x='{label_at[0]:.1f}' y='{label_at[1] + 4:.1f}' text-anchor='middle'"
        name = f"<text {position} class='name'>{point.number}</text>"
    content = f"<title>{description}</title>{dot}{name}"
    return f"<a href='{escape(link)}' aria-label='{description}'>{content}</a>" if link else f"<g>{content}</g>"


def _baseline(data: ChartData, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> Iterator[str]:
    """Draw the original model as a diamond with its name."""
    if data.baseline is None:
        return
    x, y = to_x(data.baseline[0]), to_y(data.baseline[1])
    description = escape(
        f"{BASELINE_LABEL}: {readable(data.x.metric)} {units.format_quantity(data.baseline[0], data.x.unit)}, "
        f"{readable(data.y.metric)} {units.format_quantity(data.baseline[1], data.y.unit)}"
    )
    shape = f"<path d='M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z' fill='{LIMIT_COLOUR}' stroke='{TEXT_COLOUR}'/>"
    name = f"<text x='{x:.1f}' y='{y - 11:.1f}' text-anchor='middle' class='name'>{BASELINE_LABEL}</text>"
    yield f"<g class='baseline'><title>{description}</title>{shape}{name}</g>"


def _error_bars(
    point: Point, to_x: Callable[[float], float], to_y: Callable[[float], float], colour: str
) -> Iterator[str]:
    for (x1, y1), (x2, y2) in point.interval_lines:
        ends = f"x1='{to_x(x1):.1f}' x2='{to_x(x2):.1f}' y1='{to_y(y1):.1f}' y2='{to_y(y2):.1f}'"
        yield f"<line {ends} stroke='{colour}' class='interval'/>"


def _axes(data: ChartData, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> Iterator[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in round_ticks(data.x.low, data.x.high, _TICKS):
        x = to_x(value)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{bottom}' class='grid'/>"
        yield f"<text x='{x:.1f}' y='{bottom + 18}' text-anchor='middle'>{value:g}</text>"
    for value in round_ticks(data.y.low, data.y.high, _TICKS):
        y = to_y(value)
        yield f"<line x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' class='grid'/>"
        yield f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{value:g}</text>"
    middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
    yield f"<text x='{middle[0]}' y='{HEIGHT - 14}' text-anchor='middle'>{escape(_title(data.x))}</text>"
    rotation = f"transform='rotate(-90 18 {middle[1]})' text-anchor='middle'"
    yield f"<text x='18' y='{middle[1]}' {rotation}>{escape(_title(data.y))}</text>"


def _limits(data: ChartData, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> Iterator[str]:
    line = f"stroke='{LIMIT_COLOUR}' stroke-width='1.6' stroke-dasharray='6 4'"
    if data.x.drawn_bound is not None:
        x = to_x(data.x.drawn_bound)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{HEIGHT - _BOTTOM}' {line}/>"
        yield f"<text x='{x + 5:.1f}' y='{_TOP + 12}' class='limit'>{escape(data.x.bound_text)}</text>"
    if data.y.drawn_bound is not None:
        y = to_y(data.y.drawn_bound)
        yield f"<line x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' {line}/>"
        label = escape(data.y.bound_text)
        yield f"<text x='{WIDTH - _RIGHT - 5}' y='{y - 6:.1f}' text-anchor='end' class='limit'>{label}</text>"


def _title(axis: Axis) -> str:
    return f"{axis.title} · {axis.better}" if axis.better else axis.title


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return a function that maps `low` … `high` to the pixels `start` … `end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Return at most about `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    smallest = (high - low) / count
    power = 10.0 ** math.floor(math.log10(smallest))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= smallest)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
