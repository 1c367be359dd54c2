"""A trial as the ledger of its study knows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.summary import Summary

if TYPE_CHECKING:
    import sqlalchemy as sql

State = Literal["waiting", "running", "finished", "stopped", "refused", "failed"]
Origin = Literal["enqueued", "spread", "sampled", "refined"]
DONE = ("finished", "stopped", "refused", "failed")
"""States of trials that are over: all measured, stopped at a rung, refused before any work, or failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial, at one revision of its study.

    Attributes:
        origin: why it was tried.
        attempt: from 1; one that is given up, or whose worker dies, is followed by the next.
        worker: who has it or had it last.
        built: its engine was built, and it waits for a worker that measures.
        recorded: the tracking server knows all of it.
        run_id: of its last attempt in the tracking server; empty before that has one.
        ended_s: when it was over, in seconds since 1970 by the store's clock.
        hints: what the sampler noted for itself.
        summary: of its result; None before it is over.
    """

    number: int
    params: Params
    state: State
    origin: Origin
    attempt: int
    worker: str
    built: bool
    recorded: bool
    run_id: str
    ended_s: float | None
    hints: Mapping[str, Any]
    summary: Summary | None
    revision: int

    @classmethod
    def read(cls, found: sql.Row[Any]) -> Row:
        """From a row of the table of trials."""
        return cls(
            number=found.number,
            params=json.loads(found.params),
            state=found.state,
            origin=found.origin,
            attempt=found.attempt,
            worker=found.worker,
            built=bool(found.built),
            recorded=bool(found.recorded),
            run_id=found.run_id,
            ended_s=found.ended_s,
            hints=json.loads(found.hints),
            summary=None if found.summary is None else Summary.from_json(found.summary),
            revision=found.revision,
        )

    @property
    def anew(self) -> dict[str, Any]:
        """What its next attempt begins with."""
        return {"attempt": self.attempt + 1, "run_id": ""}
