"""Compute the content of a front chart for any drawing library: axes, points, limits and label positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.study_snapshot import LimitSnapshot, ObjectiveSnapshot, StudySnapshot, TrialSnapshot

PointKind = Literal["front", "feasible", "infeasible"]
POINT_KINDS: dict[PointKind, str] = {
    "front": "on the front",
    "feasible": "feasible, but dominated by another trial",
    "infeasible": "infeasible: not every limit is satisfied",
}
BASELINE_LABEL = "original model"
# the palette of Okabe and Ito and the scale cividis are readable with every kind of colour vision
FRONT_COLOUR, FEASIBLE_COLOUR, INFEASIBLE_COLOUR, LIMIT_COLOUR = "#0072B2", "#56B4E9", "#9a9a9a", "#D55E00"
TEXT_COLOUR, GRID_COLOUR = "#1f2933", "#e4e7eb"
COLOUR_MAP = "cividis"
TRIAL_NUMBER = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis that shows one objective.

    Attributes:
        bound: the limit on this metric; None if it has none.
        low, high: the range of the axis.
        distant: True if the limit is too far from the points to be drawn.
    """

    metric: str
    unit: str
    direction: str
    bound: float | None
    low: float
    high: float
    distant: bool

    @property
    def title(self) -> str:
        """Return the name of the metric with its unit."""
        if self.metric == TRIAL_NUMBER:
            return "trial"
        return f"{readable(self.metric)}{f' ({self.unit})' if self.unit else ''}"

    @property
    def better(self) -> str:
        """Return which direction is better; empty for trial numbers."""
        if self.metric == TRIAL_NUMBER:
            return ""
        return "smaller is better" if self.direction == "minimize" else "larger is better"

    @property
    def drawn_bound(self) -> float | None:
        """Return the limit to draw; None if there is none or it is distant."""
        return None if self.distant else self.bound

    @property
    def bound_text(self) -> str:
        """Return the label of the limit."""
        text = f"limit {units.format_quantity(self.bound or 0.0, self.unit)}"
        return f"{text} is outside the chart" if self.distant else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A trial in a chart; `x_interval` and `y_interval` are 95 % confidence intervals, None without width."""

    kind: PointKind
    x: float
    y: float
    colour: float | None
    trial: TrialSnapshot
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None

    @property
    def number(self) -> int:
        """Return the number of the trial."""
        return self.trial.number

    @property
    def interval_lines(self) -> list[list[tuple[float, float]]]:
        """Return the confidence intervals as lines through the point."""
        lines = []
        if self.x_interval is not None:
            lines.append([(self.x_interval[0], self.y), (self.x_interval[1], self.y)])
        if self.y_interval is not None:
            lines.append([(self.x, self.y_interval[0]), (self.x, self.y_interval[1])])
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartData:
    """Axes and points of one chart.

    Attributes:
        unplotted: trials that lack one of the two values because they failed or were not measured.
        baseline: the original, uncompressed model as (x, y); None if one of its two values is not known.
    """

    study: str
    x: Axis
    y: Axis
    colour: Axis | None
    points: tuple[Point, ...]
    unplotted: tuple[TrialSnapshot, ...]
    baseline: tuple[float, float] | None = None

    def points_of(self, kind: PointKind) -> list[Point]:
        """Return the points of one kind."""
        return [point for point in self.points if point.kind == kind]

    @property
    def lines(self) -> list[list[tuple[float, float]]]:
        """Return all drawn lines: the line through the front, and the limits."""
        lines = [[(p.x, p.y) for p in self.front_line]]
        if self.x.drawn_bound is not None:
            lines.append([(self.x.drawn_bound, self.y.low), (self.x.drawn_bound, self.y.high)])
        if self.y.drawn_bound is not None:
            lines.append([(self.x.low, self.y.drawn_bound), (self.x.high, self.y.drawn_bound)])
        return lines

    @property
    def front_line(self) -> list[Point]:
        """Return the trials of the front that are not dominated in the two drawn axes, from left to right.

        With a third objective, other trials of the front may be off this line.
        """
        if self.x.metric == TRIAL_NUMBER:
            return []
        signs = [1 if axis.direction == "minimize" else -1 for axis in (self.x, self.y)]
        best, line = float("inf"), []
        for point in sorted(self.points_of("front"), key=lambda p: (signs[0] * p.x, signs[1] * p.y)):
            if signs[1] * point.y < best:
                best = signs[1] * point.y
                line.append(point)
        return sorted(line, key=lambda p: p.x)


def caption(data: ChartData) -> str:
    """Return one sentence with the counts of trials."""
    front = len(data.points_of("front"))
    feasible = front + len(data.points_of("feasible"))
    text = f"{len(data.points)} trials measured, {feasible} satisfy every limit, {front} of them on the front"
    return f"{text}; {len(data.unplotted)} ended without these values" if data.unplotted else text


def kind_of(trial: TrialSnapshot) -> PointKind:
    """Return how a trial is drawn."""
    if not trial.feasible:
        return "infeasible"
    return "front" if trial.on_front else "feasible"


def build_chart_data(snapshot: StudySnapshot) -> ChartData:
    """Return the chart of a study: first objective on the x axis, second on the y axis, third as colour.

    With one objective, the x axis is the number of the trial.
    """
    objectives = list(snapshot.objectives[:3])
    if len(objectives) == 1:
        objectives.insert(0, ObjectiveSnapshot(metric=TRIAL_NUMBER, unit="", direction="minimize"))
    names = [objective.metric for objective in objectives]
    values = {trial.number: [_value(trial, name) for name in names] for trial in snapshot.trials}
    plotted = [trial for trial in snapshot.trials if None not in values[trial.number][:2]]
    origin = [snapshot.baseline.get(name) for name in names[:2]]
    baseline = (origin[0], origin[1]) if origin[0] is not None and origin[1] is not None else None
    axes = []
    for index, objective in enumerate(objectives):
        shown = [_value(trial, objective.metric) for trial in plotted]
        shown += [end for trial in plotted for end in trial.intervals.get(objective.metric, ())]
        shown += [baseline[index]] if baseline is not None and index < 2 else []
        axes.append(_axis(objective, shown, snapshot.limit_on(objective.metric)))
    points = []
    for trial in plotted:
        x, y, colour = (*values[trial.number], None)[:3]
        assert x is not None
        assert y is not None
        points.append(
            Point(
                kind=kind_of(trial),
                x=x,
                y=y,
                colour=colour,
                trial=trial,
                x_interval=trial.intervals.get(names[0]),
                y_interval=trial.intervals.get(names[1]),
            )
        )
    return ChartData(
        study=snapshot.study,
        x=axes[0],
        y=axes[1],
        colour=axes[2] if len(axes) > 2 else None,
        points=tuple(points),
        unplotted=tuple(trial for trial in snapshot.trials if None in values[trial.number][:2]),
        baseline=baseline,
    )


def _value(trial: TrialSnapshot, metric: str) -> float | None:
    return float(trial.number) if metric == TRIAL_NUMBER else trial.metrics.get(metric)


def _axis(objective: ObjectiveSnapshot, values: Sequence[float | None], limit: LimitSnapshot | None) -> Axis:
    known = [value for value in values if value is not None]
    bound = None if limit is None else limit.bound
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    reach = high - low or abs(high) or 1.0
    distant = bound is not None and not low - 1.5 * reach <= bound <= high + 1.5 * reach
    if bound is not None and not distant:
        low, high = min(low, bound), max(high, bound)
    margin = 0.08 * (high - low or abs(high) or 1.0)
    return Axis(
        metric=objective.metric,
        unit=objective.unit,
        direction=objective.direction,
        bound=bound,
        low=low - margin,
        high=high + margin,
        distant=distant,
    )


Pixel = tuple[float, float]
Box = tuple[float, float, float, float]
_AROUND = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (1, 0), (0, -1), (-1, 0))


def place_labels(anchors: Sequence[Pixel], sizes: Sequence[Pixel], obstacles: Sequence[Box], frame: Box) -> list[Pixel]:
    """Return the centre of each label such that labels overlap no obstacle and no other label within the frame.

    All values are in pixels. Candidates are eight positions around each anchor at three distances. The candidate with
    the least overlap is used; the nearest one if several are equal.
    """
    occupied, centres = list(obstacles), []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        options = []
        for gap in (4, 14, 26):
            for dx, dy in _AROUND:
                distance = gap if dx and dy else gap + 6
                cx, cy = x + dx * (width / 2 + distance), y + dy * (height / 2 + distance)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                options.append(
                    (sum(_overlap(box, other) for other in occupied) + 10 * _outside(box, frame), cx, cy, box)
                )
        _, cx, cy, box = min(options, key=lambda option: option[0])
        occupied.append(box)
        centres.append((cx, cy))
    return centres


def label_front(
    data: ChartData, pixel: Callable[[Pixel], Pixel], sizes: Sequence[Pixel], radius: float, frame: Box
) -> list[Pixel]:
    """Return the centre in pixels of each front trial's label, clear of points, lines and other labels.

    Args:
        pixel: converts a point in axis units to pixels.
        sizes: width and height of each label.
        radius: radius of a point.
    """
    intervals = [ends for point in data.points for ends in point.interval_lines]
    lines = [list(map(pixel, line)) for line in (*data.lines, *intervals)]
    obstacles = _obstacles([pixel((p.x, p.y)) for p in data.points], lines, radius)
    if data.baseline is not None:
        obstacles += _obstacles([pixel(data.baseline)], [], radius + 4)
    return place_labels([pixel((p.x, p.y)) for p in data.points_of("front")], sizes, obstacles, frame)


def _obstacles(points: Sequence[Pixel], lines: Sequence[Sequence[Pixel]], radius: float) -> list[Box]:
    """Return boxes that cover points and lines."""
    boxes = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    for (x0, y0), (x1, y1) in (ends for line in lines for ends in pairwise(line)):
        count = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / 8))
        along = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
        boxes += [(x - 2, y - 2, x + 2, y + 2) for x, y in along]
    return boxes


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
