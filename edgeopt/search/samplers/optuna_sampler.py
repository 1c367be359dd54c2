"""Propose recipes with a sampler of Optuna.

The Optuna study lives in memory and is filled from the trial storage. It holds no state of its own, so a worker that
dies or joins late loses nothing, and a new attempt of a trial starts without constraints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective
from edgeopt.search.space.definition import Search
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.trial import ENDED_STATES, Trial
from edgeopt.search.storage.trial_summary import TrialSummary

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

UNMEASURED_EXCESS = 1.0
"""Constraint value of a limit whose metric was not measured: twice the limit."""
MIN_UNPROVEN_EXCESS = 0.01
"""Smallest constraint value of a limit that is not satisfied although the measured value is within it."""


class OptunaSampler:
    """Sampler of Optuna that learns from the trials of the study.

    Args:
        search: search with the name of the sampler and the search space.
        objectives: objectives of the study.
        limits: limits of the study, which become constraints.
        seed: seed of the sampler.
    """

    def __init__(self, search: Search, objectives: Sequence[Objective], limits: Sequence[Limit], *, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._objectives, self._limits = search.space, objectives, limits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about experimental arguments
            self._study: Any = optuna.create_study(
                sampler=_create_sampler(search.sampler, seed), directions=[o.direction for o in objectives]
            )
        self._running: dict[int, int] = {}
        """Number in the Optuna study by number of the running trial."""
        self._ended: set[tuple[int, int]] = set()
        """Number and attempt of the ended trials in the Optuna study."""

    def update(self, trials: Iterable[Trial]) -> None:
        """Add trials that are new or have changed. Waiting trials are ignored; each ended attempt is added once."""
        for trial in trials:
            optuna_number = self._running.pop(trial.number, None)
            if optuna_number is not None:
                self._discard(optuna_number)
            if trial.state == "running":
                self._study.add_trial(self._to_frozen_trial(trial))
                self._running[trial.number] = len(self._study.get_trials(deepcopy=False)) - 1
            elif trial.state in ENDED_STATES and (trial.number, trial.attempt) not in self._ended:
                self._study.add_trial(self._to_frozen_trial(trial))
                self._ended.add((trial.number, trial.attempt))

    def propose(self) -> tuple[Params, Mapping[str, Any]]:
        """Return a recipe and the attributes that the sampler must find again in its trial."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna_trial = self._study.ask()
            params = self._space.suggest(optuna_trial)
            sampler_attrs = dict(self._study.get_trials(deepcopy=False)[optuna_trial.number].system_attrs)
            self._discard(optuna_trial.number)
        return params, sampler_attrs

    def _discard(self, optuna_number: int) -> None:
        """Set a trial of the Optuna study to failed, so that samplers ignore it."""
        from optuna.trial import TrialState

        self._study.tell(optuna_number, state=TrialState.FAIL)

    def _to_frozen_trial(self, trial: Trial) -> FrozenTrial:
        """Return the trial for Optuna. An ended trial without all objectives is pruned: TPE still learns from it."""
        from optuna.trial import TrialState, create_trial

        state, values = TrialState.RUNNING, None
        constraints: dict[str, float] = {}
        if trial.summary is not None:
            metrics = [trial.summary.metrics.get(o.metric, math.nan) for o in self._objectives]
            is_complete = not (trial.summary.failure or trial.summary.refused) and all(map(math.isfinite, metrics))
            state, values = (TrialState.COMPLETE, metrics) if is_complete else (TrialState.PRUNED, None)
            constraints = constraint_values(trial.summary, self._limits)
        distributions = self._space.distributions(trial.params)
        return create_trial(
            state=state,
            values=values,
            params={key: trial.params[key] for key in distributions},
            distributions=distributions,
            system_attrs=dict(trial.sampler_attrs),
            constraints=constraints or None,
        )


def constraint_values(summary: TrialSummary, limits: Sequence[Limit]) -> dict[str, float]:
    """Return the relative excess of each limit, above 0 if it is not satisfied, as constraints for a sampler.

    Samplers add these values up. For a trial that ended early, a limit that was not judged counts as just satisfied:
    other limits make the trial infeasible already. For any other trial it counts as violated.
    """
    values = {}
    for limit in limits:
        verdict = summary.verdicts.get(limit.metric)
        if verdict is None or verdict.excess is None:
            values[limit.metric] = 0.0 if summary.refused else UNMEASURED_EXCESS
        elif verdict.satisfied or verdict.predicted or (summary.refused and verdict.excess <= 0):
            values[limit.metric] = verdict.excess
        else:
            values[limit.metric] = max(verdict.excess, MIN_UNPROVEN_EXCESS)
    return values


def _create_sampler(name: str, seed: int) -> BaseSampler:
    from optuna import samplers

    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=8, warn_independent_sampling=False)
    return samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=8)
