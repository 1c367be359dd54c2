"""What a picture of the front shows, before any library draws it: axes, points, limits, label places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.study_snapshot import LimitSnapshot, ObjectiveSnapshot, StudySnapshot, TrialSnapshot

Kind = Literal["front", "feasible", "infeasible"]
KINDS: dict[Kind, str] = {
    "front": "on the front",
    "feasible": "feasible, but dominated by another trial",
    "infeasible": "infeasible: not every limit is satisfied",
}
BASELINE_LABEL = "original model"
# Okabe and Ito's palette, told apart with every kind of colour vision; colour as a scale is cividis
FRONT, PLAIN, GREY, LIMIT, INK = "#0072B2", "#56B4E9", "#9a9a9a", "#D55E00", "#1f2933"
COLOURS = "cividis"
TRIAL_NUMBER = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One objective as it is shown.

    Attributes:
        bound: the limit on this metric, None where there is none.
        low, high: the range to show.
        distant: the limit lies so far outside that drawing it would squeeze all points together.
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
        if self.metric == TRIAL_NUMBER:
            return "trial"
        return f"{readable(self.metric)}{f' ({self.unit})' if self.unit else ''}"

    @property
    def better(self) -> str:
        """Which way is good; empty where neither is."""
        if self.metric == TRIAL_NUMBER:
            return ""
        return "smaller is better" if self.direction == "minimize" else "larger is better"

    @property
    def drawn_bound(self) -> float | None:
        return None if self.distant else self.bound

    @property
    def bound_text(self) -> str:
        return f"limit {units.format_quantity(self.bound or 0.0, self.unit)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One trial as it is drawn; `x_interval` and `y_interval` are 95 % confidence intervals, None without width."""

    kind: Kind
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


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
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

    def of(self, kind: Kind) -> list[Point]:
        return [point for point in self.points if point.kind == kind]

    @property
    def lines(self) -> list[list[tuple[float, float]]]:
        """Everything drawn as a line: the path along the front and the limits."""
        found = [[(p.x, p.y) for p in self.path]]
        if self.x.drawn_bound is not None:
            found.append([(self.x.drawn_bound, self.y.low), (self.x.drawn_bound, self.y.high)])
        if self.y.drawn_bound is not None:
            found.append([(self.x.low, self.y.drawn_bound), (self.x.high, self.y.drawn_bound)])
        return found

    @property
    def path(self) -> list[Point]:
        """Front members that no other beats in both drawn axes, from left to right: the line to follow.

        With a third objective a member may lie off this line; it is on the front for its colour.
        """
        if self.x.metric == TRIAL_NUMBER:
            return []
        signs = [1 if axis.direction == "minimize" else -1 for axis in (self.x, self.y)]
        best, found = float("inf"), []
        for point in sorted(self.of("front"), key=lambda p: (signs[0] * p.x, signs[1] * p.y)):
            if signs[1] * point.y < best:
                best = signs[1] * point.y
                found.append(point)
        return sorted(found, key=lambda p: p.x)


def kind_of(trial: TrialSnapshot) -> Kind:
    """Return how a trial is drawn."""
    if not trial.feasible:
        return "infeasible"
    return "front" if trial.on_front else "feasible"


def prepare(snapshot: StudySnapshot) -> View:
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
    return View(
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
    """Where the centre of each label goes so that it covers no obstacle, no other label and stays in the frame.

    Everything in pixels. Of eight places round each anchor, then eight further out, the first with
    the least overlap is taken.
    """
    taken, places = list(obstacles), []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        options = []
        for gap in (4, 14, 26):
            for dx, dy in _AROUND:
                beside = gap if dx and dy else gap + 6
                cx, cy = x + dx * (width / 2 + beside), y + dy * (height / 2 + beside)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                options.append((sum(_overlap(box, other) for other in taken) + 10 * _outside(box, frame), cx, cy, box))
        _, cx, cy, box = min(options, key=lambda option: option[0])
        taken.append(box)
        places.append((cx, cy))
    return places


def label_front(
    view: View, pixel: Callable[[Pixel], Pixel], sizes: Sequence[Pixel], radius: float, frame: Box
) -> list[Pixel]:
    """The centre in pixels of each front member's label, clear of points of `radius`, of lines and of one another.

    `pixel` says where on the picture a point of the two axes lies.
    """
    drawn = [list(map(pixel, line)) for line in view.lines]
    taken = _obstacles([pixel((p.x, p.y)) for p in view.points], drawn, radius)
    return place_labels([pixel((p.x, p.y)) for p in view.of("front")], sizes, taken, frame)


def _obstacles(points: Sequence[Pixel], lines: Sequence[Sequence[Pixel]], radius: float) -> list[Box]:
    """Boxes over points of `radius` pixels and along lines, which labels keep clear of."""
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
