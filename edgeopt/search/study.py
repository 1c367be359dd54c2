"""A study: its trials, what to try next, and when it is over."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.core.result import PREDICTION, TrialResult
from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective
from edgeopt.search.pareto.hypervolume import without_growth
from edgeopt.search.pareto.ranking import EVALUATED, Ranking, begun, spent_j, spent_s
from edgeopt.search.prediction import Foresee
from edgeopt.search.samplers.proposals import Proposal, Proposals
from edgeopt.search.space.definition import Search
from edgeopt.search.storage.summary import Summary
from edgeopt.search.storage.trial import DONE, Row, State
from edgeopt.search.storage.trial_store import Ledger, Member

REFUSALS = 200
"""Recipes in a row that the estimate refuses, after which a search gives up."""
ATTEMPTS = 5
"""How often a trial is begun whose worker dies, before it is taken to be the cause."""


@dataclass(slots=True, kw_only=True)
class Study:
    """One search in a ledger, as one of its workers sees it.

    Attributes:
        foresee: what arithmetic says of a recipe; it costs milliseconds.
        worker: under which name trials are taken.
        standing: how the trials compare.
        built: takes trials alone whose engine was built (True), or was not (False); None takes all.
    """

    ledger: Ledger
    search: Search
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    predict_trial: Foresee | None = None
    worker: str = ""
    built: bool | None = None
    _rows: dict[int, Row] = field(init=False, default_factory=dict, repr=False)
    _revision: int = field(init=False, default=0)
    standing: Ranking = field(init=False, repr=False)
    _proposals: Proposals = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.standing = Ranking(objectives=self.objectives, limits=self.limits)
        self._proposals = Proposals(self.search, self.standing, self.predict_trial)

    @property
    def name(self) -> str:
        return self.search.study

    def open(self, sweep: Mapping[str, Any]) -> None:
        """Begin the study or go on with it; ConfigError where it was begun with another definition.

        A new study gets the recipes of `search.enqueue` and the spread of the estimate to begin with.
        """
        self.ledger.open(
            {
                "objectives": [[o.metric, o.direction] for o in self.objectives],
                "limits": sorted([limit.metric, str(limit)] for limit in self.limits),
                "parameters": self.search.parameters,
            },
            sweep,
        )
        known = [self.search.space.normal(params) for params in self.search.enqueue]
        for params in known:
            self.ledger.add(params, origin="enqueued")
        if all(row.state == "waiting" for row in self.rows()):
            for params in self._proposals.spread(known):
                self.ledger.add(params, origin="spread")

    # what is known

    def rows(self) -> list[Row]:
        """All trials in order, as they are now."""
        self._sync()
        return list(self._rows.values())

    def result(self, number: int) -> TrialResult:
        return TrialResult.from_json(self.ledger.result(number))

    def ranks(self) -> dict[int, int]:
        """Pareto rank of every feasible trial whose objectives were all measured, by trial number."""
        return self.standing.ranks(self.rows())

    def front(self) -> list[Row]:
        """The feasible trials that no other dominates."""
        return self.standing.front(self.rows())

    def volumes(self) -> list[float]:
        """The hypervolume of the front after each evaluated trial, in the order in which they ended; from 0 to 1."""
        return self.standing.volumes(self.rows())

    def over(self) -> str:
        """Why no further trial begins; empty while some may."""
        search, rows = self.search, self.rows()
        count = sum(1 for row in rows if row.state in EVALUATED)
        if count >= search.trials:
            return f"{count} trials were evaluated"
        if search.time_s is not None and spent_s(rows) >= search.time_s:
            return f"{search.time} were spent"
        if search.energy_j is not None and spent_j(rows) >= search.energy_j:
            return f"{search.energy} were spent"
        if search.stagnation is not None and without_growth(self.standing.volumes(rows)) >= search.stagnation:
            return f"the front has not grown for {search.stagnation} trials"
        return ""

    # what is tried

    def ask(self) -> Row | None:
        """The next trial: running by this worker, or refused by the estimate; None where there is none now.

        Trials that wait come first. A new one is proposed as long as the open ones leave room in the budget.
        """
        if self.over():
            return None
        if any(row.state == "waiting" for row in self._rows.values()):
            waiting = self.ledger.claim(self.worker, built=self.built)
            if waiting is not None:
                return self._checked(waiting)
        if self.built:
            return None
        return self._proposed()

    def finish(self, row: Row, result: TrialResult) -> bool:
        """Keep a result; whether the trial still belonged to this worker."""
        return self.ledger.finish(row, state_of(result), Summary.of(result), result.to_json())

    def reclaim(self, member: Member) -> list[Row]:
        """Take over what a dead worker left; the trials that it had at work."""
        return self.ledger.reclaim(member, new_owner=self.worker, attempts=ATTEMPTS, given_up=_given_up)

    def unrecorded(self) -> list[Row]:
        """Trials that are over and of which the tracking server does not know all."""
        return [row for row in self.rows() if row.state in DONE and not row.recorded]

    def open_attempts(self) -> set[tuple[int, int]]:
        """Number and attempt of the trials that are at work, or wait to be measured or recorded."""
        at_work = [r for r in self.rows() if r.state == "running" or (r.state == "waiting" and r.built)]
        return {(row.number, row.attempt) for row in (*at_work, *self.unrecorded())}

    def settled(self) -> bool:
        """Whether nothing is left to do: no trial begins any more, and those that were begun are over and recorded."""
        if self.unrecorded() or any(row.state == "running" for row in self._rows.values()):
            return False
        return bool(self.over()) or not any(row.state == "waiting" for row in self._rows.values())

    # inside

    def _room(self) -> bool:
        return begun(self._rows.values()) < self.search.trials and self._refusals() < REFUSALS

    def _refusals(self) -> int:
        """How many of the latest trials the estimate refused in a row."""
        latest = itertools.takewhile(lambda row: row.state == "refused", reversed(self._rows.values()))
        return sum(1 for _ in latest)

    def _proposed(self) -> Row | None:
        """A new recipe, running or refused; None where every recipe was tried, or enough of them."""
        worker_index = len(self.ledger.members())
        while self._room() and (proposal := self._proposals.next(self.rows(), worker_index=worker_index)) is not None:
            row = self._added(proposal)
            if row is not None:  # else another worker was faster
                return row
        return None

    def _added(self, proposal: Proposal) -> Row | None:
        """A proposed trial, running by this worker or over because it is refused; None where it was tried meanwhile."""
        params, origin, hints = proposal
        refused = self._proposals.refused(params)
        return self.ledger.add(
            params,
            origin=origin,
            worker=self.worker,
            state="running" if refused is None else state_of(refused),
            hints=hints,
            summary=None if refused is None else Summary.of(refused),
            result=None if refused is None else refused.to_json(),
            budget=self.search.trials,
        )

    def _checked(self, row: Row) -> Row:
        """A claimed trial, which may turn out to be refused before any work."""
        refused = self._proposals.refused(row.params)
        if refused is None or not self.finish(row, refused):
            return row
        return next(r for r in self.rows() if r.number == row.number)

    def _sync(self) -> None:
        news = self.ledger.changes(self._revision)
        if not news:
            return
        self._rows |= {row.number: row for row in news}  # new numbers are the highest, so the order holds
        self._revision = max(row.revision for row in news)
        self._proposals.learn(news)


def state_of(result: TrialResult) -> State:
    """How a trial with such a result is over."""
    if result.failure is not None:
        return "failed"
    if result.refused:
        return "refused" if result.refused == PREDICTION else "stopped"
    return "finished"


def _given_up(row: Row) -> Summary:
    return Summary(failure=f"worker: it was begun {row.attempt} times, and each time its worker died")
