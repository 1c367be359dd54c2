"""A study: its trials, what to try next, what is best, and when it is over."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.part import canonical
from edgeopt.result import TrialResult
from edgeopt.search.definition import Search
from edgeopt.search.forecast import ESTIMATE, Forecast, Foresee
from edgeopt.search.front import Objective, pareto_front, pareto_ranks
from edgeopt.search.hypervolume import Archive, without_growth
from edgeopt.search.ledger import DONE, Ledger, Member, Origin, Row, State
from edgeopt.search.sampling import Sampler
from edgeopt.search.space import Params
from edgeopt.search.strategy import LISTED, Refinement, candidates, spread
from edgeopt.search.summary import Summary
from edgeopt.search.surrogate import Guide
from edgeopt.target import Limit

EVALUATED = ("finished", "stopped", "failed")
"""States of trials that count against the budget."""
REPEATS = 30
"""Proposals of a sampler in a row that were all tried before, after which chance proposes."""
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
        built: takes trials alone whose engine was built (True), or was not (False); None takes all.
    """

    ledger: Ledger
    search: Search
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    foresee: Foresee | None = None
    worker: str = ""
    built: bool | None = None
    _rows: dict[int, Row] = field(init=False, default_factory=dict, repr=False)
    _tried: set[str] = field(init=False, default_factory=set, repr=False)
    _bounds: dict[str, float] = field(init=False, default_factory=dict, repr=False)
    _revision: int = field(init=False, default=0)
    _sampler: Sampler | None = field(init=False, default=None, repr=False)
    _chance: random.Random = field(init=False, repr=False)
    _forecasts: dict[str, Forecast] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.search.seed)  # noqa: S311 - a search, no secret

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
        if self.foresee is not None and all(row.state == "waiting" for row in self.rows()):
            chance = random.Random(self.search.seed)  # noqa: S311 - a search, no secret
            foreseen = [(params, self._foreseen(params)) for params in candidates(self.search.space, chance)]
            room = min(self.search.spread, max(0, self.search.trials - len(known)))
            for params in spread(foreseen, self.objectives, self.limits, room, space=self.search.space, tried=known):
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
        points = {row.number: self._point(row) for row in self.rows()}
        kept = {number: point for number, point in points.items() if point is not None}
        return dict(zip(kept, pareto_ranks(list(kept.values())), strict=True))

    def front(self) -> list[Row]:
        """The feasible trials that no other dominates."""
        kept = [(row, point) for row in self.rows() if (point := self._point(row)) is not None]
        return [kept[place][0] for place in pareto_front([point for _, point in kept])]

    def volume(self) -> float:
        """The hypervolume of the front, as a share of the box that all feasible trials and the limits span."""
        archive = self._archive()
        return (
            0.0 if archive is None else max(archive.add(point) for row in self.front() if (point := self._point(row)))
        )

    def volumes(self) -> list[float]:
        """The hypervolume of the front after each evaluated trial, in the order in which they ended; from 0 to 1."""
        ended = sorted((r for r in self.rows() if r.state in EVALUATED), key=lambda r: (r.ended_s or 0.0, r.number))
        archive = self._archive()
        if archive is None:
            return [0.0] * len(ended)
        points = [self._point(row) for row in ended]
        return [archive.volume if point is None else archive.add(point) for point in points]

    def _archive(self) -> Archive | None:
        """Empty, and in the scale of all feasible trials; None while there is none."""
        points = [point for row in self.rows() if (point := self._point(row)) is not None]
        bounds = {x.metric: bound for x in self.limits if (bound := self._bounds.get(x.metric, x.absolute))}
        scale = [o.sign * bounds[o.metric] if o.metric in bounds else None for o in self.objectives]
        return Archive(points, scale) if points else None

    def spent_s(self) -> float:
        """Seconds of all trials together, whoever evaluated them."""
        return sum(row.summary.spent_s for row in self.rows() if row.summary is not None)

    def spent_j(self) -> float:
        return sum(row.summary.energy_j for row in self.rows() if row.summary is not None)

    def over(self) -> str:
        """Why no further trial begins; empty while some may."""
        search, rows = self.search, self.rows()
        count = sum(1 for row in rows if row.state in EVALUATED)
        if count >= search.trials:
            return f"{count} trials were evaluated"
        if search.time_s is not None and self.spent_s() >= search.time_s:
            return f"{search.time} were spent"
        if search.energy_j is not None and self.spent_j() >= search.energy_j:
            return f"{search.energy} were spent"
        if search.stagnation is not None and without_growth(self.volumes()) >= search.stagnation:
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
                return self._settled(waiting)
        if self.built or not self._room():
            return None
        return self._proposed()

    def refusals(self) -> int:
        """How many of the latest trials the estimate refused in a row."""
        count = 0
        for row in reversed(self.rows()):
            if row.state != "refused" or row.summary is None or row.summary.refused != ESTIMATE:
                break
            count += 1
        return count

    def finish(self, row: Row, result: TrialResult) -> bool:
        """Keep a result; whether the trial still belonged to this worker."""
        return self.ledger.finish(row, state_of(result), Summary.of(result), result.to_json())

    def bury(self, member: Member) -> list[Row]:
        """Take over what a dead worker left; the trials that it had at work."""
        return self.ledger.bury(member, heir=self.worker, attempts=ATTEMPTS, given_up=_given_up)

    def unrecorded(self) -> list[Row]:
        """Trials that are over and whose recording is this worker's."""
        return [r for r in self.rows() if r.worker == self.worker and _ended(r) and not r.recorded]

    def open_attempts(self) -> set[tuple[int, int]]:
        """Number and attempt of the trials that are at work, or wait to be measured or recorded."""
        return {
            (row.number, row.attempt)
            for row in self.rows()
            if row.state == "running" or (row.state == "waiting" and row.built) or (_ended(row) and not row.recorded)
        }

    def settled(self) -> bool:
        """Whether nothing is left to do: no trial begins any more, and those that were begun are over and recorded."""
        at_work = any(row.state == "running" or (_ended(row) and not row.recorded) for row in self.rows())
        waiting = any(row.state == "waiting" for row in self._rows.values())
        return not at_work and (bool(self.over()) or not waiting)

    # inside

    def _room(self) -> bool:
        return self._begun() < self.search.trials and self.refusals() < REFUSALS

    def _proposed(self) -> Row | None:
        """A new recipe, running or refused; None where every recipe was tried."""
        while True:
            found = self._propose()
            if found is None:
                return None
            params, origin, hints = found
            refused = self._refused(params)
            if refused is None:
                row = self.ledger.add(params, origin=origin, worker=self.worker, state="running", hints=hints)
            else:
                row = self.ledger.add(
                    params,
                    origin=origin,
                    worker=self.worker,
                    state=state_of(refused),
                    hints=hints,
                    summary=Summary.of(refused),
                    result=refused.to_json(),
                )
            if row is not None:  # else another worker was faster
                return row

    def _settled(self, row: Row) -> Row:
        """A claimed trial, which may turn out to be refused before any work."""
        refused = self._refused(row.params)
        if refused is None or not self.finish(row, refused):
            return row
        return next(r for r in self.rows() if r.number == row.number)

    def _refused(self, params: Params) -> TrialResult | None:
        if self.foresee is None:
            return None
        return self._foreseen(params).refused(self.limits, self._bounds)

    def _propose(self) -> tuple[Params, Origin, Mapping[str, Any]] | None:
        self._sync()
        if self.foresee is not None and self._begun() >= math.ceil(self.search.trials * (1 - self.search.refine)):
            refinement = Refinement(objectives=self.objectives, space=self.search.space, foresee=self._foreseen)
            near = refinement.best(self.front(), self._tried, self._chance)
            if near is not None:
                return near, "refined", {}
        if self.foresee is not None and self.search.sampler == "surrogate":
            guided = self._guided()
            if guided is not None:
                return guided, "sampled", {}
        sampler = self._told()
        for _ in range(REPEATS):
            params, hints = sampler.propose()
            if canonical(params) not in self._tried:
                return params, "sampled", hints
        rest = self._untried()
        return None if rest is None else (rest, "sampled", {})

    def _guided(self) -> Params | None:
        """By a surrogate, of recipes looked at before and neighbours of the front; None where none promises growth."""
        space, seen = self.search.space, dict[str, Params]()
        near = (params for row in self.front() for params in space.neighbours(row.params, self._chance))
        for params in (*candidates(space, random.Random(self.search.seed)), *near):  # noqa: S311 - a search, no secret
            key = canonical(params)
            if key not in self._tried and self._refused(params) is None:
                seen[key] = params
        guide = Guide(objectives=self.objectives, limits=self.limits, space=space, foresee=self._foreseen)
        evaluated = [row for row in self._rows.values() if row.state in EVALUATED]
        return guide.best(evaluated, list(seen.values()), self._chance)

    def _begun(self) -> int:
        """Trials that have or will have cost work."""
        return sum(1 for row in self.rows() if row.state != "refused")

    def _untried(self) -> Params | None:
        """A recipe by chance; None where all were tried, or chance finds no other."""
        space = self.search.space
        every = space.every(LISTED)
        if every is not None:
            rest = [params for params in every if canonical(params) not in self._tried]
            return self._chance.choice(rest) if rest else None
        drawn = (space.draw(self._chance) for _ in range(REPEATS))
        return next((params for params in drawn if canonical(params) not in self._tried), None)

    def _told(self) -> Sampler:
        """The sampler, which knows all trials."""
        if self._sampler is None:
            # neither a resumed study nor a second worker proposes what was proposed before
            seed = self.search.seed + len(self._rows) + 1_000 * len(self.ledger.members())
            self._sampler = Sampler(self.search, self.objectives, self.limits, seed=seed)
            self._sampler.learn(self._rows.values())
        return self._sampler

    def _sync(self) -> None:
        news = self.ledger.changes(self._revision)
        if not news:
            return
        self._rows |= {row.number: row for row in news}  # new numbers are the highest, so the order holds
        self._revision = max(row.revision for row in news)
        for row in news:
            self._tried.add(canonical(row.params))
            held = row.summary.verdicts if row.summary is not None else {}
            self._bounds |= {metric: h.bound for metric, h in held.items() if h.bound is not None}
        if self._sampler is not None:
            self._sampler.learn(news)

    def _foreseen(self, params: Params) -> Forecast:
        assert self.foresee is not None
        key = canonical(params)
        if key not in self._forecasts:
            self._forecasts[key] = self.foresee(params)
        return self._forecasts[key]

    def _point(self, row: Row) -> list[float] | None:
        """The objectives of a feasible trial, all minimized; None of any other."""
        if row.summary is None or not row.summary.feasible:
            return None
        values = [o.sign * row.summary.metrics.get(o.metric, math.nan) for o in self.objectives]
        return values if all(map(math.isfinite, values)) else None


def _ended(row: Row) -> bool:
    return row.state in DONE


def state_of(result: TrialResult) -> State:
    """How a trial with such a result is over."""
    if result.failure is not None:
        return "failed"
    if result.refused:
        return "refused" if result.refused == ESTIMATE else "stopped"
    return "finished"


def _given_up(row: Row) -> Summary:
    return Summary(failure=f"worker: it was begun {row.attempt} times, and each time its worker died")
