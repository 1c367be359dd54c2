"""Choose the next recipe of a search, and refuse recipes that are predicted to violate a limit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from edgeopt.core.config_objects import canonical_json
from edgeopt.core.result import TrialResult
from edgeopt.search.pareto.ranking import Ranking, count_started, limit_bounds
from edgeopt.search.prediction import Prediction, PredictTrial
from edgeopt.search.samplers.front_refinement import FrontRefinement
from edgeopt.search.samplers.optuna_sampler import OptunaSampler
from edgeopt.search.samplers.spread import MAX_LISTED, choose_spread, sample_candidates
from edgeopt.search.samplers.surrogate import SurrogateSampler
from edgeopt.search.space.definition import Search
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import EVALUATED_STATES, Origin, Trial

MAX_REPEATS = 30
"""Number of consecutive proposals of a sampler that were tried before, after which recipes are chosen at random."""


class Proposal(NamedTuple):
    """An untried recipe, its origin, and the attributes that its sampler must find again in the trial."""

    params: Params
    origin: Origin
    sampler_attrs: Mapping[str, Any]


class Proposer:
    """Source of proposals for one worker.

    Samplers are asked in order: refinement of the front, surrogate, Optuna, random choice.

    Args:
        search: the search.
        ranking: objectives and limits of the study.
        predict_trial: predicts recipes; None disables the spread, the surrogate and the refinement.
    """

    def __init__(self, search: Search, ranking: Ranking, predict_trial: PredictTrial | None) -> None:
        self._search, self._ranking, self._predict_trial = search, ranking, predict_trial
        self._rng = random.Random(search.seed)  # noqa: S311 - not used for cryptography
        self._tried: set[str] = set()
        self._bounds: dict[str, float] = {}
        self._optuna_sampler: OptunaSampler | None = None
        self._predictions: dict[str, Prediction] = {}

    def update(self, trials: Sequence[Trial]) -> None:
        """Learn from trials that are new or have changed."""
        self._tried |= {canonical_json(trial.params) for trial in trials}
        self._bounds |= limit_bounds(trials)
        if self._optuna_sampler is not None:
            self._optuna_sampler.update(trials)

    def initial_recipes(self, enqueued: Iterable[Params]) -> list[Params]:
        """Return the spread with which a search starts, in addition to the `enqueued` recipes."""
        if self._predict_trial is None:
            return []
        tried, space = list(enqueued), self._search.space
        predictions = [(params, self._predict(params)) for params in self._candidates]
        count = min(self._search.spread, max(0, self._search.trials - len(tried)))
        return choose_spread(
            predictions, self._ranking.objectives, self._ranking.limits, count, space=space, tried=tried
        )

    def refused_result(self, params: Params) -> TrialResult | None:
        """Return the result of a recipe that the prediction refuses before any work; None for any other."""
        if self._predict_trial is None:
            return None
        return self._predict(params).refused_result(self._ranking.limits, self._bounds)

    def propose(self, trials: Sequence[Trial], *, worker_index: int) -> Proposal | None:
        """Return a recipe that is in none of `trials`; None if all recipes were tried.

        Args:
            trials: all trials of the study.
            worker_index: distinguishes workers that start at the same time, so that their samplers differ.
        """
        samplers = (self._refine(trials), self._ask_surrogate(trials), self._ask_optuna(trials, worker_index))
        return next((proposal for sampler in (*samplers, self._draw()) for proposal in sampler), None)

    def _refine(self, trials: Sequence[Trial]) -> Iterator[Proposal]:
        """Yield the best neighbour of the front once only the budget reserved for refinement is left."""
        if self._predict_trial is None or count_started(trials) < math.ceil(
            self._search.trials * (1 - self._search.refine)
        ):
            return
        refinement = FrontRefinement(
            objectives=self._ranking.objectives, space=self._search.space, predict_trial=self._predict
        )
        params = refinement.propose(self._ranking.front(trials), self._tried, self._rng)
        if params is not None:
            yield Proposal(params, "refined", {})

    def _ask_surrogate(self, trials: Sequence[Trial]) -> Iterator[Proposal]:
        """Yield the best of the candidates and the neighbours of the front, according to the surrogate."""
        if self._predict_trial is None or self._search.sampler != "surrogate":
            return
        space, untried = self._search.space, dict[str, Params]()
        front = self._ranking.front(trials)
        neighbours = (params for trial in front for params in space.neighbours(trial.params, self._rng))
        for params in (*self._candidates, *neighbours):
            key = canonical_json(params)
            if key not in self._tried and self.refused_result(params) is None:
                untried[key] = params
        sampler = SurrogateSampler(
            objectives=self._ranking.objectives,
            limits=self._ranking.limits,
            space=space,
            predict_trial=self._predict,
        )
        evaluated = [trial for trial in trials if trial.state in EVALUATED_STATES]
        best = sampler.propose(evaluated, list(untried.values()), self._rng)
        if best is not None:
            yield Proposal(best, "sampled", {})

    def _ask_optuna(self, trials: Sequence[Trial], worker_index: int) -> Iterator[Proposal]:
        """Yield untried proposals of an Optuna sampler, which may repeat recipes."""
        if self._optuna_sampler is None:
            # a resumed study and a second worker need another seed, or they repeat earlier proposals
            seed = self._search.seed + len(trials) + 1_000 * worker_index
            self._optuna_sampler = OptunaSampler(
                self._search, self._ranking.objectives, self._ranking.limits, seed=seed
            )
            self._optuna_sampler.update(trials)
        for _ in range(MAX_REPEATS):
            params, sampler_attrs = self._optuna_sampler.propose()
            if canonical_json(params) not in self._tried:
                yield Proposal(params, "sampled", sampler_attrs)

    def _draw(self) -> Iterator[Proposal]:
        """Yield random untried recipes. In a space that can be listed, yield one as long as any remains."""
        space = self._search.space
        recipes = space.list_recipes(MAX_LISTED)
        if recipes is not None:
            untried = [params for params in recipes if canonical_json(params) not in self._tried]
            drawn = [self._rng.choice(untried)] if untried else []
        else:
            drawn = [space.sample(self._rng) for _ in range(MAX_REPEATS)]
        for params in drawn:
            if canonical_json(params) not in self._tried:
                yield Proposal(params, "sampled", {})

    @cached_property
    def _candidates(self) -> list[Params]:
        rng = random.Random(self._search.seed)  # noqa: S311 - not used for cryptography
        return sample_candidates(self._search.space, rng)

    def _predict(self, params: Params) -> Prediction:
        """Return the cached prediction of a recipe."""
        assert self._predict_trial is not None
        key = canonical_json(params)
        if key not in self._predictions:
            self._predictions[key] = self._predict_trial(params)
        return self._predictions[key]
