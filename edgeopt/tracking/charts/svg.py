"""The front as an SVG picture of which every point is a link: for pages that change while people look at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from html import escape

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.tracking.charts.chart_data import (
    BASELINE_LABEL,
    FRONT,
    GREY,
    INK,
    KINDS,
    LIMIT,
    PLAIN,
    Axis,
    Kind,
    Pixel,
    Point,
    View,
    label_front,
)

WIDTH, HEIGHT = 900, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 18, 56
_TICKS = 6
_STYLES: Mapping[Kind, tuple[int, str, str]] = {
    "infeasible": (4, "none", GREY),
    "feasible": (5, PLAIN, "white"),
    "front": (7, FRONT, INK),
}


def figure(view: View, link: Callable[[TrialSnapshot], str]) -> str:
    """Return an `svg` element; `link` returns the address of a trial's run, or an empty string."""
    across, up = _scale(view.x, _LEFT, WIDTH - _RIGHT), _scale(view.y, HEIGHT - _BOTTOM, _TOP)
    words = f"{view.y.title} against {view.x.title}: {len(view.of('front'))} of {len(view.points)} trials on the front"
    parts = [
        f"<svg class='front' role='group' aria-label='{escape(words)}' viewBox='0 0 {WIDTH} {HEIGHT}'>",
        *_axes(view, across, up),
        *_limits(view, across, up),
    ]
    if len(view.path) > 1:
        path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in view.path)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{INK}' stroke-opacity='0.5'/>")
    parts += _baseline(view, across, up)
    names = _names(view, across, up)
    for kind, (_, fill, stroke) in _STYLES.items():
        for point in view.of(kind):
            parts += _error_bars(point, across, up, stroke if fill == "none" else fill)
        parts += [_point(view, p, across(p.x), up(p.y), link(p.trial), names.get(p.number)) for p in view.of(kind)]
    return "".join([*parts, "</svg>"])


def _names(view: View, across: Callable[[float], float], up: Callable[[float], float]) -> dict[int, Pixel]:
    """The middle of each number beside a point of the front, clear of points, lines and of one another."""

    def pixel(location: Pixel) -> Pixel:
        return across(location[0]), HEIGHT - up(location[1])

    front = view.of("front")
    sizes = [(8.0 * len(str(p.number)) + 2, 14.0) for p in front]
    upwards = label_front(view, pixel, sizes, 7, (_LEFT, _BOTTOM, WIDTH - _RIGHT, HEIGHT - _TOP))
    return {point.number: (x, HEIGHT - y) for point, (x, y) in zip(front, upwards, strict=True)}


def _point(view: View, point: Point, x: float, y: float, link: str, at: Pixel | None) -> str:
    """A point, which says what it is of, and its number in the middle of `at`."""
    radius, fill, stroke = _STYLES[point.kind]
    figures = ", ".join(
        f"{readable(axis.metric)} {units.format_quantity(value, axis.unit)}"
        for axis, value in ((view.x, point.x), (view.y, point.y), (view.colour, point.colour))
        if axis is not None and value is not None
    )
    settings = ", ".join(f"{name} = {value}" for name, value in point.trial.params.items())
    told = escape(f"trial {point.number}, {KINDS[point.kind]}: {figures}; {settings}")
    dot = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{fill}' stroke='{stroke}' stroke-width='1.5'/>"
    middle = f"x='{at[0]:.1f}' y='{at[1] + 4:.1f}' text-anchor='middle'" if at else ""
    name = f"<text {middle} class='name'>{point.number}</text>" if at else ""
    inside = f"<title>{told}</title>{dot}{name}"
    return f"<a href='{escape(link)}' aria-label='{told}'>{inside}</a>" if link else f"<g>{inside}</g>"


def _baseline(view: View, across: Callable[[float], float], up: Callable[[float], float]) -> Iterator[str]:
    """Draw the original model as a diamond with its name."""
    if view.baseline is None:
        return
    x, y = across(view.baseline[0]), up(view.baseline[1])
    words = escape(
        f"{BASELINE_LABEL}: {readable(view.x.metric)} {units.format_quantity(view.baseline[0], view.x.unit)}, "
        f"{readable(view.y.metric)} {units.format_quantity(view.baseline[1], view.y.unit)}"
    )
    shape = f"<path d='M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z' fill='{LIMIT}' stroke='{INK}'/>"
    name = f"<text x='{x:.1f}' y='{y - 11:.1f}' text-anchor='middle' class='name'>{BASELINE_LABEL}</text>"
    yield f"<g class='baseline'><title>{words}</title>{shape}{name}</g>"


def _error_bars(
    point: Point, across: Callable[[float], float], up: Callable[[float], float], colour: str
) -> Iterator[str]:
    x, y = across(point.x), up(point.y)
    if point.x_interval is not None:
        low, high = map(across, point.x_interval)
        yield f"<line x1='{low:.1f}' x2='{high:.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{colour}' class='interval'/>"
    if point.y_interval is not None:
        low, high = map(up, point.y_interval)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{low:.1f}' y2='{high:.1f}' stroke='{colour}' class='interval'/>"


def _axes(view: View, across: Callable[[float], float], up: Callable[[float], float]) -> Iterator[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in _ticks(view.x):
        x = across(value)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{bottom}' class='grid'/>"
        yield f"<text x='{x:.1f}' y='{bottom + 18}' text-anchor='middle'>{value:g}</text>"
    for value in _ticks(view.y):
        y = up(value)
        yield f"<line x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' class='grid'/>"
        yield f"<text x='{_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{value:g}</text>"
    middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
    yield f"<text x='{middle[0]}' y='{HEIGHT - 14}' text-anchor='middle'>{escape(_title(view.x))}</text>"
    turned = f"transform='rotate(-90 18 {middle[1]})' text-anchor='middle'"
    yield f"<text x='18' y='{middle[1]}' {turned}>{escape(_title(view.y))}</text>"


def _limits(view: View, across: Callable[[float], float], up: Callable[[float], float]) -> Iterator[str]:
    line = f"stroke='{LIMIT}' stroke-width='1.6' stroke-dasharray='6 4'"
    if view.x.drawn_bound is not None:
        x = across(view.x.drawn_bound)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{HEIGHT - _BOTTOM}' {line}/>"
        yield f"<text x='{x + 5:.1f}' y='{_TOP + 12}' class='limit'>{escape(view.x.bound_text)}</text>"
    if view.y.drawn_bound is not None:
        y = up(view.y.drawn_bound)
        yield f"<line x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' {line}/>"
        words = escape(view.y.bound_text)
        yield f"<text x='{WIDTH - _RIGHT - 5}' y='{y - 6:.1f}' text-anchor='end' class='limit'>{words}</text>"


def _title(axis: Axis) -> str:
    return f"{axis.title} · {axis.better}" if axis.better else axis.title


def _scale(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - axis.low) / (axis.high - axis.low) * (end - start)


def _ticks(axis: Axis) -> list[float]:
    """Round numbers within an axis: 1, 2 or 5 times a power of ten apart."""
    wanted = (axis.high - axis.low) / _TICKS
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= wanted)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
