"""Optuna as the one who proposes: an in-memory study that is told what the ledger holds.

Nothing that must last is kept here, so a worker that dies, or joins late, loses nothing, and a trial that is begun
again starts with clean constraints.
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
from edgeopt.search.storage.summary import Summary
from edgeopt.search.storage.trial import DONE, Row

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

UNMEASURED_EXCESS = 1.0
"""Constraint of a limit whose metric was not measured: as bad as twice the limit."""
UNPROVEN_EXCESS = 0.01
"""Least constraint of a limit that is not proven kept although its figure lies within."""


class Sampler:
    """Proposals by the sampler that a search names, from all trials that it was told of."""

    def __init__(self, search: Search, objectives: Sequence[Objective], limits: Sequence[Limit], *, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._objectives, self._limits = search.space, objectives, limits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experimental arguments
            self._study: Any = optuna.create_study(
                sampler=_sampler(search.sampler, seed), directions=[o.direction for o in objectives]
            )
        self._running: dict[int, int] = {}
        self._over: set[tuple[int, int]] = set()

    def learn(self, rows: Iterable[Row]) -> None:
        """Take in trials that are new or have changed; those that wait are not told, and what is over is told once."""
        for row in rows:
            known = self._running.pop(row.number, None)
            if known is not None:  # from now on its place in memory tells nothing
                self._withdraw(known)
            if row.state == "running":
                self._study.add_trial(self._frozen(row))
                self._running[row.number] = len(self._study.get_trials(deepcopy=False)) - 1
            elif row.state in DONE and (row.number, row.attempt) not in self._over:
                self._study.add_trial(self._frozen(row))
                self._over.add((row.number, row.attempt))

    def propose(self) -> tuple[Params, Mapping[str, Any]]:
        """A recipe, and what the sampler wants to find again beside it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask()
            params = self._space.suggest(trial)
            hints = dict(self._study.get_trials(deepcopy=False)[trial.number].system_attrs)
            self._withdraw(trial.number)
        return params, hints

    def _withdraw(self, number: int) -> None:
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL)

    def _frozen(self, row: Row) -> FrozenTrial:
        """Constraints and values; a trial without all values is pruned, from which TPE still learns."""
        from optuna.trial import TrialState, create_trial

        state, values = TrialState.RUNNING, None
        constraints: dict[str, float] = {}
        if row.summary is not None:
            figures = [row.summary.metrics.get(o.metric, math.nan) for o in self._objectives]
            whole = not (row.summary.failure or row.summary.refused) and all(map(math.isfinite, figures))
            state, values = (TrialState.COMPLETE, figures) if whole else (TrialState.PRUNED, None)
            constraints = excesses(row.summary, self._limits)
        dists = self._space.distributions(row.params)
        return create_trial(
            state=state,
            values=values,
            params={key: row.params[key] for key in dists},
            distributions=dists,
            system_attrs=dict(row.hints),
            constraints=constraints or None,
        )


def excesses(summary: Summary, limits: Sequence[Limit]) -> dict[str, float]:
    """How far each limit is broken (above zero) or kept, as a share of it, for a sampler that adds these up.

    Of a trial that a rung stopped, limits that nobody looked at count as just kept: it is infeasible by the others,
    and what is not known must not mislead. Of any other trial what was not measured is broken.
    """
    found = {}
    for limit in limits:
        held = summary.verdicts.get(limit.metric)
        if held is None or held.excess is None:
            found[limit.metric] = 0.0 if summary.refused else UNMEASURED_EXCESS
        elif held.satisfied or held.predicted or (summary.refused and held.excess <= 0):
            found[limit.metric] = held.excess
        else:
            found[limit.metric] = max(held.excess, UNPROVEN_EXCESS)
    return found


def _sampler(name: str, seed: int) -> BaseSampler:
    from optuna import samplers

    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=8, warn_independent_sampling=False)
    return samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=8)
