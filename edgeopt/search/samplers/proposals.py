"""Which recipe comes next, and whether arithmetic refuses it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from edgeopt.core.config_objects import canonical_json
from edgeopt.core.result import TrialResult
from edgeopt.search.pareto.ranking import EVALUATED, Ranking, begun, bounds
from edgeopt.search.prediction import Foresee, Prediction
from edgeopt.search.samplers.front_refinement import LISTED, Refinement, candidates, spread
from edgeopt.search.samplers.optuna_sampler import Sampler
from edgeopt.search.samplers.surrogate import Guide
from edgeopt.search.space.definition import Search
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import Origin, Row

REPEATS = 30
"""Proposals of a sampler in a row that were all tried before, after which chance proposes."""


class Proposal(NamedTuple):
    """A recipe that nobody has tried, why it is tried, and what its sampler wants to find again beside it."""

    params: Params
    origin: Origin
    hints: Mapping[str, Any]


class Proposals:
    """What one worker proposes, from all trials that it was told of.

    `foresee` is None where nothing is known by arithmetic: then there is no spread, no surrogate and no refinement.
    """

    def __init__(self, search: Search, standing: Ranking, predict_trial: Foresee | None) -> None:
        self._search, self._standing, self._foresee = search, standing, predict_trial
        self._chance = random.Random(search.seed)  # noqa: S311 - a search, no secret
        self._tried: set[str] = set()
        self._bounds: dict[str, float] = {}
        self._sampler: Sampler | None = None
        self._forecasts: dict[str, Prediction] = {}

    def learn(self, news: Sequence[Row]) -> None:
        """Take in trials that are new or have changed."""
        self._tried |= {canonical_json(row.params) for row in news}
        self._bounds |= bounds(news)
        if self._sampler is not None:
            self._sampler.learn(news)

    def spread(self, tried: Iterable[Params]) -> list[Params]:
        """The recipes that a search begins with, beside those `tried` anyway."""
        if self._foresee is None:
            return []
        known, space = list(tried), self._search.space
        foreseen = [(params, self._foreseen(params)) for params in self._candidates]
        room = min(self._search.spread, max(0, self._search.trials - len(known)))
        objectives, limits = self._standing.objectives, self._standing.limits
        return spread(foreseen, objectives, limits, room, space=space, tried=known)

    def refused(self, params: Params) -> TrialResult | None:
        """The result of a recipe that arithmetic refuses before any work; else None."""
        if self._foresee is None:
            return None
        return self._foreseen(params).refused(self._standing.limits, self._bounds)

    def next(self, rows: Sequence[Row], *, worker_index: int) -> Proposal | None:
        """A recipe that is in none of `rows`; None where all were tried.

        `place` tells workers apart that begin at the same time.
        """
        ways = (self._refined(rows), self._guided(rows), self._sampled(rows, worker_index), self._drawn())
        return next((proposal for way in ways for proposal in way), None)

    def _refined(self, rows: Sequence[Row]) -> Iterator[Proposal]:
        """The best neighbour of the front, once the budget is down to the share for it."""
        if self._foresee is None or begun(rows) < math.ceil(self._search.trials * (1 - self._search.refine)):
            return
        objectives, space = self._standing.objectives, self._search.space
        refinement = Refinement(objectives=objectives, space=space, predict_trial=self._foreseen)
        near = refinement.best(self._standing.front(rows), self._tried, self._chance)
        if near is not None:
            yield Proposal(near, "refined", {})

    def _guided(self, rows: Sequence[Row]) -> Iterator[Proposal]:
        """By a surrogate, of recipes looked at before and neighbours of the front."""
        if self._foresee is None or self._search.sampler != "surrogate":
            return
        space, fresh = self._search.space, dict[str, Params]()
        front = self._standing.front(rows)
        near = (params for row in front for params in space.neighbours(row.params, self._chance))
        for params in (*self._candidates, *near):
            key = canonical_json(params)
            if key not in self._tried and self.refused(params) is None:
                fresh[key] = params
        objectives, limits = self._standing.objectives, self._standing.limits
        guide = Guide(objectives=objectives, limits=limits, space=space, predict_trial=self._foreseen)
        evaluated = [row for row in rows if row.state in EVALUATED]
        best = guide.best(evaluated, list(fresh.values()), self._chance)
        if best is not None:
            yield Proposal(best, "sampled", {})

    def _sampled(self, rows: Sequence[Row], worker_index: int) -> Iterator[Proposal]:
        """By one of Optuna's samplers, which may propose what was tried."""
        if self._sampler is None:
            # neither a resumed study nor a second worker proposes what was proposed before
            seed = self._search.seed + len(rows) + 1_000 * worker_index
            self._sampler = Sampler(self._search, self._standing.objectives, self._standing.limits, seed=seed)
            self._sampler.learn(rows)
        for _ in range(REPEATS):
            params, hints = self._sampler.propose()
            if canonical_json(params) not in self._tried:
                yield Proposal(params, "sampled", hints)

    def _drawn(self) -> Iterator[Proposal]:
        """By chance; of a space that can be listed, as long as any is left."""
        space = self._search.space
        every = space.every(LISTED)
        if every is not None:
            rest = [params for params in every if canonical_json(params) not in self._tried]
            found = [self._chance.choice(rest)] if rest else []
        else:
            found = [space.draw(self._chance) for _ in range(REPEATS)]
        for params in found:
            if canonical_json(params) not in self._tried:
                yield Proposal(params, "sampled", {})

    @cached_property
    def _candidates(self) -> list[Params]:
        return candidates(self._search.space, random.Random(self._search.seed))  # noqa: S311 - a search, no secret

    def _foreseen(self, params: Params) -> Prediction:
        assert self._foresee is not None
        key = canonical_json(params)
        if key not in self._forecasts:
            self._forecasts[key] = self._foresee(params)
        return self._forecasts[key]
