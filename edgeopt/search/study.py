"""Run a study: hand out trials to workers, store their results and decide when the search ends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.core.result import PREDICTION, TrialResult
from edgeopt.core.study_snapshot import TrialState
from edgeopt.core.target import Limit
from edgeopt.search.pareto.front import Objective
from edgeopt.search.pareto.hypervolume import trials_without_growth
from edgeopt.search.pareto.ranking import Ranking, count_started, total_spent_j, total_spent_s
from edgeopt.search.prediction import PredictTrial
from edgeopt.search.samplers.proposer import Proposal, Proposer
from edgeopt.search.space.definition import Search
from edgeopt.search.storage.trial import ENDED_STATES, EVALUATED_STATES, Trial
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.storage.worker_record import WorkerRecord

MAX_CONSECUTIVE_REFUSALS = 200
"""Number of consecutive recipes refused by prediction after which no more are proposed."""
MAX_ATTEMPTS = 5
"""Number of attempts after which a trial whose worker dies every time is recorded as failed."""


@dataclass(slots=True, kw_only=True)
class Study:
    """A search in a trial storage, from the view of one worker.

    Attributes:
        predict_trial: predicts recipes in milliseconds; None disables predictions.
        worker: name under which trials are claimed.
        built: True to claim only trials whose engine is built, False to claim only those without; None for both.
        ranking: comparison of the trials.
    """

    storage: TrialStorage
    search: Search
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    predict_trial: PredictTrial | None = None
    worker: str = ""
    built: bool | None = None
    ranking: Ranking = field(init=False, repr=False)
    _trials: dict[int, Trial] = field(init=False, default_factory=dict, repr=False)
    _revision: int = field(init=False, default=0)
    _proposer: Proposer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.ranking = Ranking(objectives=self.objectives, limits=self.limits)
        self._proposer = Proposer(self.search, self.ranking, self.predict_trial)

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return self.search.study

    def open(self, sweep_info: Mapping[str, Any]) -> None:
        """Create the study, or continue it if it exists.

        A new study starts with the recipes of `search.enqueue` and an initial spread.

        Args:
            sweep_info: data from which another worker opens the study.

        Raises:
            ConfigError: the stored study has other objectives, limits or parameters.
        """
        self.storage.open(
            {
                "objectives": [[o.metric, o.direction] for o in self.objectives],
                "limits": sorted([limit.metric, str(limit)] for limit in self.limits),
                "parameters": self.search.parameters,
            },
            sweep_info,
        )
        enqueued = [self.search.space.normalize(params) for params in self.search.enqueue]
        for params in enqueued:
            self.storage.add(params, origin="enqueued")
        if all(trial.state == "waiting" for trial in self.trials()):
            for params in self._proposer.initial_recipes(enqueued):
                self.storage.add(params, origin="spread")

    # state

    def trials(self) -> list[Trial]:
        """Return all trials as they are now, by number."""
        self._sync()
        return list(self._trials.values())

    def load_result(self, number: int) -> TrialResult:
        """Return the complete result of an ended trial."""
        return TrialResult.from_json(self.storage.load_result(number))

    def ranks(self) -> dict[int, int]:
        """Return the Pareto rank of every feasible trial with all objectives measured, by trial number."""
        return self.ranking.ranks(self.trials())

    def front(self) -> list[Trial]:
        """Return the feasible trials that no other trial dominates."""
        return self.ranking.front(self.trials())

    def hypervolume_history(self) -> list[float]:
        """Return the hypervolume of the front after each evaluated trial, from 0 to 1, in the order of their ends."""
        return self.ranking.hypervolume_history(self.trials())

    def stop_reason(self) -> str:
        """Return the reason why no more trials start; empty while more may start."""
        search, trials = self.search, self.trials()
        evaluated = sum(1 for trial in trials if trial.state in EVALUATED_STATES)
        if evaluated >= search.trials:
            return f"budget of {search.trials} trials reached"
        if search.time_s is not None and total_spent_s(trials) >= search.time_s:
            return f"time budget of {search.time} spent"
        if search.energy_j is not None and total_spent_j(trials) >= search.energy_j:
            return f"energy budget of {search.energy} spent"
        if search.stagnation is not None:
            without_growth = trials_without_growth(self.ranking.hypervolume_history(trials))
            if without_growth >= search.stagnation:
                return f"no growth of the front for {search.stagnation} trials"
        return ""

    def unrecorded(self) -> list[Trial]:
        """Return the ended trials that the tracking server does not have completely."""
        return [trial for trial in self.trials() if trial.state in ENDED_STATES and not trial.recorded]

    def open_attempts(self) -> set[tuple[int, int]]:
        """Return number and attempt of the trials that run, wait to be measured, or wait to be recorded."""
        open_trials = [t for t in self.trials() if t.state == "running" or (t.state == "waiting" and t.built)]
        return {(trial.number, trial.attempt) for trial in (*open_trials, *self.unrecorded())}

    def is_complete(self) -> bool:
        """Return True if no trial runs, no more trials start, and all ended trials are recorded."""
        if self.unrecorded() or any(trial.state == "running" for trial in self._trials.values()):
            return False
        return bool(self.stop_reason()) or not any(trial.state == "waiting" for trial in self._trials.values())

    # trials

    def ask(self) -> Trial | None:
        """Return the next trial, claimed by this worker; None if there is none at the moment.

        Waiting trials come first. Otherwise a new recipe is proposed if the budget allows one more. The trial is
        running, or has ended already if its prediction violates a limit or its plan fails.
        """
        if self.stop_reason():
            return None
        if any(trial.state == "waiting" for trial in self._trials.values()):
            waiting = self.storage.claim(self.worker, built=self.built)
            if waiting is not None:
                return self._refuse_if_predicted(waiting)
        if self.built:
            return None
        return self._add_next()

    def finish(self, trial: Trial, result: TrialResult) -> bool:
        """Store a result. Return False if the trial does not belong to this worker any more."""
        return self.storage.finish(trial, final_state(result), TrialSummary.from_result(result), result.to_json())

    def reclaim(self, dead_worker: WorkerRecord) -> list[Trial]:
        """Take over the trials of a dead worker and return those that it was running."""
        return self.storage.reclaim(
            dead_worker, new_owner=self.worker, max_attempts=MAX_ATTEMPTS, summarize_failure=_summarize_dead_workers
        )

    def _may_propose(self) -> bool:
        return (
            count_started(self._trials.values()) < self.search.trials
            and self._consecutive_refusals() < MAX_CONSECUTIVE_REFUSALS
        )

    def _consecutive_refusals(self) -> int:
        """Return the number of latest trials that were refused without another trial in between."""
        refused = itertools.takewhile(lambda trial: trial.state == "refused", reversed(self._trials.values()))
        return sum(1 for _ in refused)

    def _add_next(self) -> Trial | None:
        """Propose a recipe and add it as a trial; return None if all recipes were tried or the budget is used up."""
        worker_index = len(self.storage.active_workers())
        while (
            self._may_propose()
            and (proposal := self._proposer.propose(self.trials(), worker_index=worker_index)) is not None
        ):
            trial = self._add(proposal)
            if trial is not None:  # None: another worker added the same recipe first
                return trial
        return None

    def _add(self, proposal: Proposal) -> Trial | None:
        """Add a proposal as a running trial, or as an ended one if it is refused; None if the recipe exists."""
        refused = self._proposer.refused_result(proposal.params)
        return self.storage.add(
            proposal.params,
            origin=proposal.origin,
            worker=self.worker,
            state="running" if refused is None else final_state(refused),
            sampler_attrs=proposal.sampler_attrs,
            summary=None if refused is None else TrialSummary.from_result(refused),
            result=None if refused is None else refused.to_json(),
            budget=self.search.trials,
        )

    def _refuse_if_predicted(self, trial: Trial) -> Trial:
        """End a claimed trial if its prediction refuses it; return the trial as it is then."""
        refused = self._proposer.refused_result(trial.params)
        if refused is None or not self.finish(trial, refused):
            return trial
        return next(t for t in self.trials() if t.number == trial.number)

    def _sync(self) -> None:
        """Load the trials that changed since the last call."""
        changed = self.storage.trials_since(self._revision)
        if not changed:
            return
        self._trials |= {trial.number: trial for trial in changed}  # stays sorted: new trials have the highest numbers
        self._revision = max(trial.revision for trial in changed)
        self._proposer.update(changed)


def final_state(result: TrialResult) -> TrialState:
    """Return the state of a trial that ended with this result."""
    if result.failure is not None:
        return "failed"
    if result.refused:
        return "refused" if result.refused == PREDICTION else "stopped"
    return "finished"


def _summarize_dead_workers(trial: Trial) -> TrialSummary:
    return TrialSummary(failure=f"worker: the worker died in all {trial.attempt} attempts")
