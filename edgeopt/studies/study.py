"""A study as users of the Python API see it: trials, front, champion, plots and explanations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, overload

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.recipe import label
from edgeopt.core.study_snapshot import Champion, ObjectiveSnapshot, StudySnapshot, TrialSnapshot
from edgeopt.core.study_summary import explanation, recommended, summary
from edgeopt.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from edgeopt.core.result import TrialResult
    from edgeopt.release.promote import Promotion
    from edgeopt.studies.open_study import OpenStudy


@dataclass(frozen=True, slots=True)
class Trials(Sequence[TrialSnapshot]):
    """Trials of a study, in order of their numbers. Shown as a table in notebooks."""

    items: tuple[TrialSnapshot, ...]
    objectives: tuple[ObjectiveSnapshot, ...]

    @overload
    def __getitem__(self, index: int) -> TrialSnapshot: ...

    @overload
    def __getitem__(self, index: slice) -> Trials: ...

    def __getitem__(self, index: int | slice) -> TrialSnapshot | Trials:
        return Trials(self.items[index], self.objectives) if isinstance(index, slice) else self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[TrialSnapshot]:
        return iter(self.items)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per trial: outcome, rank, `params.*`, `metrics.*` and the ends of their 95 % intervals."""
        import pandas as pd

        rows = []
        for trial in self.items:
            row = {"number": trial.number, "outcome": trial.outcome_text, "pareto_rank": trial.pareto_rank}
            row |= {f"params.{name}": value for name, value in trial.params.items()}
            for name, value in trial.metrics.items():
                row[f"metrics.{name}"] = value
                if name in trial.intervals:
                    row[f"metrics.{name}.low"], row[f"metrics.{name}.high"] = trial.intervals[name]
            rows.append(row)
        return pd.DataFrame(rows).set_index("number") if rows else pd.DataFrame()

    def _repr_html_(self) -> str:
        heads = ["trial", "recipe", *(readable(o.metric) for o in self.objectives), "outcome"]
        lines = []
        for trial in self.items:
            values = (trial.metrics.get(o.metric) for o in self.objectives)
            shown = (
                "–" if v is None else units.format_quantity(v, o.unit)
                for v, o in zip(values, self.objectives, strict=True)
            )
            cells = [str(trial.number), label(trial.params), *shown, trial.outcome_text]
            lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        head = "".join(f"<th>{escape(name)}</th>" for name in heads)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


class Study:
    """A study: its trials, its Pareto front and its champion, read from the study's storage at each access."""

    def __init__(self, opened: OpenStudy) -> None:
        """Wrap an open study; use `edgeopt.sweep` or `edgeopt.load_study` to get one."""
        self._opened = opened

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return self._opened.name

    @property
    def snapshot(self) -> StudySnapshot:
        """Return the study as it is now."""
        return self._opened.snapshot_with_champion()

    @property
    def trials(self) -> Trials:
        """Return all trials."""
        snapshot = self._opened.snapshot()
        return Trials(snapshot.trials, snapshot.objectives)

    @property
    def front(self) -> Trials:
        """Return the feasible trials that no other trial dominates."""
        snapshot = self._opened.snapshot()
        return Trials(snapshot.front, snapshot.objectives)

    @property
    def champion(self) -> Champion | None:
        """Return the registered champion if it comes from this study."""
        return self.snapshot.champion

    def best(self, by: str | None = None) -> TrialSnapshot:
        """Return the best trial of the front.

        Args:
            by: metric of an objective, such as `size/engine_mib`. Default: the champion, or else the trial with the
                lowest sum of its objectives, each scaled to 0 … 1 over the front.

        Raises:
            InfeasibleError: no trial satisfies every limit.
            InputError: `by` is not an objective.
        """
        snapshot = self.snapshot
        if not snapshot.front:
            raise InfeasibleError(
                "no trial satisfies every limit", location=f"study {self.name}", hint="Search longer, or widen limits"
            )
        if by is None:
            trial = recommended(snapshot)
            assert trial is not None
            return trial
        objective = next((o for o in snapshot.objectives if o.metric == by), None)
        if objective is None:
            names = ", ".join(o.metric for o in snapshot.objectives)
            raise InputError(f"`by` must be one of {names}; got {by!r}", location="by")
        sign = 1.0 if objective.direction == "minimize" else -1.0
        return min(snapshot.front, key=lambda trial: (sign * trial.metrics[by], trial.number))

    def result(self, trial: int | TrialSnapshot) -> TrialResult:
        """Return everything that was measured of a trial that is over."""
        return self._opened.study.load_result(self._trial(trial).number)

    def summary(self) -> str:
        """Return the recommended trial compared with the original model, in one or two sentences."""
        return summary(self.snapshot)

    def explain(self, trial: int | TrialSnapshot) -> str:
        """Return five lines: the recipe of a trial, gains, losses, limits, and why it is or is not on the front."""
        return "\n".join(explanation(self.snapshot, self._trial(trial)))

    def plot_front(self, x: str | None = None, y: str | None = None) -> go.Figure:
        """Return an interactive chart of the trials with 95 % intervals, limits and the original model.

        Args:
            x, y: metrics of two objectives; the first two by default.

        Raises:
            InputError: `x` or `y` is not an objective.
        """
        from edgeopt.tracking.charts import plotly
        from edgeopt.tracking.charts.chart_data import build_chart_data

        snapshot = self.snapshot
        known = {o.metric: o for o in snapshot.objectives}
        for axis, metric in (("x", x), ("y", y)):
            if metric is not None and metric not in known:
                raise InputError(f"`{axis}` must be one of {', '.join(known)}; got {metric!r}", location=axis)
        first = [known[metric] for metric in (x, y) if metric is not None]
        rest = [o for o in snapshot.objectives if o not in first]
        if y is not None and x is None:
            first = [rest.pop(0), *first] if rest else first
        return plotly.figure(build_chart_data(snapshot.with_objectives((*first, *rest))))

    def promote(
        self,
        *,
        policy: str = "default",
        trial: int | None = None,
        reason: str = "",
        private_key: str | Path | None = None,
        dry_run: bool = False,
        config_dir: str | Path | None = None,
    ) -> Promotion:
        """Register the front and set the aliases of a release policy; see `edgeopt.promote`."""
        from edgeopt.release import signature

        folder = None if config_dir is None else Path(config_dir)
        key = signature.key_from_environment() if private_key is None else Path(private_key)
        chosen = self._opened.policy(policy, folder)
        self._opened.recorder.connect()
        promotion = self._opened.promote(
            self._opened.snapshot(),
            chosen,
            folder,
            trial=trial,
            reason=reason,
            private_key=key,
            dry_run=dry_run,
        )
        if not dry_run:
            self._opened = replace(self._opened, promoted=chosen.model)
        return promotion

    def _trial(self, trial: int | TrialSnapshot) -> TrialSnapshot:
        number = trial.number if isinstance(trial, TrialSnapshot) else trial
        for known in self._opened.snapshot().trials:
            if known.number == number:
                return known
        raise InputError(f"study {self.name!r} has no trial {number}", location="trial", hint="See Study.trials")

    def __repr__(self) -> str:
        snapshot = self._opened.snapshot()
        return f"Study({self.name!r}: {len(snapshot.trials)} trials, {len(snapshot.front)} on the front)"

    def _repr_html_(self) -> str:
        snapshot = self.snapshot
        head = f"<p><b>Study {escape(self.name)}</b>: {escape(summary(snapshot))}</p>"
        return head + Trials(snapshot.front, snapshot.objectives)._repr_html_()
