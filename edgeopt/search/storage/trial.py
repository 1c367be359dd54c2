"""Represent a trial as the trial storage holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.core.study_snapshot import TrialState
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial_summary import TrialSummary

if TYPE_CHECKING:
    import sqlalchemy as sql

Origin = Literal["enqueued", "spread", "sampled", "refined"]
"""What proposed a recipe: the sweep file, the initial spread, a sampler, or the refinement of the front."""
ENDED_STATES: tuple[TrialState, ...] = ("finished", "stopped", "refused", "failed")
"""States of trials that have ended."""
EVALUATED_STATES: tuple[TrialState, ...] = ("finished", "stopped", "failed")
"""States of ended trials that took time to evaluate. They count against the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial at one revision of its study.

    Attributes:
        attempt: 1 for the first attempt. A trial that is released, or whose worker dies, starts its next attempt.
        worker: name of the worker that owns the trial or owned it last; empty before the first.
        built: True once the engine is built and the trial waits for a worker that measures.
        recorded: True once the tracking server has the complete result.
        run_id: MLflow run of the last attempt; empty before it has one.
        ended_s: end of the trial in Unix seconds, by the clock of the database.
        sampler_attrs: data that the sampler stored for its own use.
        summary: summary of the result; None until the trial ends.
        revision: revision of the study at which the trial last changed.
    """

    number: int
    params: Params
    state: TrialState
    origin: Origin
    attempt: int
    worker: str
    built: bool
    recorded: bool
    run_id: str
    ended_s: float | None
    sampler_attrs: Mapping[str, Any]
    summary: TrialSummary | None
    revision: int

    @classmethod
    def from_row(cls, row: sql.Row[Any]) -> Trial:
        """Build a trial from a row of the table of trials."""
        return cls(
            number=row.number,
            params=json.loads(row.params),
            state=row.state,
            origin=row.origin,
            attempt=row.attempt,
            worker=row.worker,
            built=bool(row.built),
            recorded=bool(row.recorded),
            run_id=row.run_id,
            ended_s=row.ended_s,
            sampler_attrs=json.loads(row.hints),
            summary=None if row.summary is None else TrialSummary.from_json(row.summary),
            revision=row.revision,
        )

    @property
    def next_attempt(self) -> dict[str, Any]:
        """Return the columns that change when the next attempt starts."""
        return {"attempt": self.attempt + 1, "run_id": ""}
