"""A resumable study: Optuna proposes recipes, finished results are kept on disk and recorded once.

The order of writes makes a kill at any moment harmless: a result is stored before it is recorded, and
recorded before Optuna is told. What a dead process left is completed or undone when the study opens again.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.errors import ConfigError, StoreError
from edgeopt.part import digest
from edgeopt.result import TrialResult
from edgeopt.search.front import Objective, ranked
from edgeopt.search.space import Params, Space
from edgeopt.store.uses import using
from edgeopt.target import Limit

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

State = Literal["waiting", "running", "finished", "refused", "failed", "interrupted"]

UNMEASURED_EXCESS = 1.0
"""Constraint of a limit whose metric was not measured: as bad as twice the limit."""
UNPROVEN_EXCESS = 0.01
"""Least constraint of a limit that is not proven kept although its figure lies within."""
DONE = ("finished", "refused", "failed")
"""States of trials that count."""
REPEATS = 30
"""Proposals in a row that were all tried before, after which a space is taken for exhausted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a sweep file says under `search`.

    Attributes:
        objectives: direction by metric.
        enqueue: recipes known to be good, tried first.
        trials: finished trials, failed ones included, after which the sweep ends.
        trial_timeout_s: a trial that takes longer is ended and recorded as failed.
    """

    study: str
    objectives: Mapping[str, str]
    parameters: Mapping[str, Any]
    enqueue: tuple[Mapping[str, Any], ...] = ()
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    seed: int = 0
    trials: int = 24
    trial_timeout_s: float = 900.0

    def __post_init__(self) -> None:
        if not self.study or "/" in self.study:
            raise ConfigError(f"{self.study!r} is no name", place="study", mend="Give a name without slashes")
        if self.trials < 1:
            raise ConfigError(f"{self.trials} trials are too few", place="trials", mend="Give 1 or more")
        if not self.trial_timeout_s > 0:
            raise ConfigError(f"{self.trial_timeout_s} s is no time", place="trial_timeout_s", mend="Give more than 0")
        if not self.objectives:
            raise ConfigError(
                "there is no objective", place="objectives", mend="Give at least one metric and its direction"
            )
        space = self.space
        for params in self.enqueue:
            space.require(dict(params))

    @property
    def space(self) -> Space:
        return Space.parse(self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A trial of a study: what was tried, and what came of it."""

    number: int
    params: Params
    state: State
    result: TrialResult | None


@dataclass(slots=True, kw_only=True)
class Study:
    """The trials of one search in one folder, beside Optuna's own storage."""

    folder: Path
    search: Search
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    _optuna: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._optuna = _open(self.folder, self.search, self.objectives)
        self._require_same_definition()

    def entries(self) -> list[Entry]:
        """All trials but those that repeat another one's parameters, in order."""
        return [self._entry(t) for t in self._optuna.get_trials(deepcopy=False) if "repeats" not in t.user_attrs]

    def finished(self) -> dict[int, TrialResult]:
        """Results by trial number, failed trials included."""
        return {e.number: e.result for e in self.entries() if e.result is not None and e.state in DONE}

    def ranks(self) -> dict[int, int]:
        return ranked(self.finished(), self.objectives)

    def recover(self, record: Callable[[int, Params, TrialResult], None]) -> None:
        """Complete what a dead process had finished, and queue what it had not, once more.

        A result whose engine or files the cache has evicted cannot be recorded: its recipe is queued too.
        """
        from optuna.trial import Trial, TrialState

        trials = self._optuna.get_trials(deepcopy=False)
        retried = {t.user_attrs.get("retry_of") for t in trials}
        for frozen in trials:
            if frozen.state != TrialState.RUNNING:
                continue
            entry, evicted = self._entry(frozen), False
            if entry.result is not None:
                with using(entry.result.paths) as there:
                    if there:
                        record(entry.number, entry.params, entry.result)
                        self._tell(Trial(self._optuna, frozen._trial_id), entry.result)
                        continue
                self._path(entry.number).unlink()
                evicted = True
            once = evicted or "retry_of" not in frozen.user_attrs
            if once and frozen.number not in retried and entry.params:
                self._optuna.enqueue_trial(entry.params, user_attrs={"retry_of": frozen.number})
            self._optuna.tell(frozen.number, state=TrialState.FAIL)

    def enqueue_known(self) -> None:
        """Queue the recipes of `search.enqueue`, once in the life of the study."""
        if not self._optuna.get_trials(deepcopy=False):
            for params in self.search.enqueue:
                self._optuna.enqueue_trial(dict(params))

    def ask(self) -> tuple[Trial, Params] | None:
        """The next recipe to try; None where the budget is spent or every proposal was tried before."""
        from optuna.trial import TrialState

        done = {digest(e.params): e for e in self.entries() if e.state in DONE}
        if len(done) >= self.search.trials:
            return None
        for _ in range(REPEATS):
            trial = self._optuna.ask()
            params = self.search.space.suggest(trial)
            trial.set_user_attr("params", params)
            known = done.get(digest(params))
            if known is None:
                return trial, params
            trial.set_user_attr("repeats", known.number)
            if known.result is None:
                self._optuna.tell(trial, state=TrialState.FAIL)
            else:
                self._tell(trial, known.result)
        return None

    def save(self, number: int, result: TrialResult) -> None:
        """Keep a result on disk, whole or not at all."""
        path = self._path(number)
        scratch = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            scratch.write_text(json.dumps(result.to_json(), indent=1) + "\n")
            scratch.replace(path)
        except OSError as error:
            raise StoreError(
                f"the result of trial {number} cannot be written ({error.strerror})",
                place=str(path.parent),
                mend="Free space and run the same command again",
            ) from error

    def tell(self, trial: Trial, result: TrialResult) -> None:
        self._tell(trial, result)

    def interrupt(self, trial: Trial) -> None:
        """Give an unfinished trial up and queue its recipe for the next run of the study."""
        from optuna.trial import TrialState

        self._optuna.enqueue_trial(trial.user_attrs["params"], user_attrs={"retry_of": trial.number})
        self._optuna.tell(trial, state=TrialState.FAIL)

    def _tell(self, trial: Trial, result: TrialResult) -> None:
        """Constraints first, then values; a trial without all values is pruned, from which TPE still learns."""
        from optuna.trial import TrialState

        verdicts = {v.metric: v for v in result.verdicts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constraint set before a kill keeps its value, and Optuna says so
            for limit in self.limits:
                verdict = verdicts.get(limit.metric)
                excess = verdict.excess if verdict is not None else None
                if excess is None or verdict is None:
                    excess = UNMEASURED_EXCESS
                elif not verdict.kept:
                    excess = max(excess, UNPROVEN_EXCESS)
                trial.set_constraint(limit.metric, excess)
        values = [result.metrics.get(o.metric, math.nan) for o in self.objectives]
        if result.failure is not None or not all(map(math.isfinite, values)):
            self._optuna.tell(trial, state=TrialState.PRUNED)
        else:
            self._optuna.tell(trial, values)

    def _entry(self, frozen: FrozenTrial) -> Entry:
        from optuna.trial import TrialState

        path = self._path(frozen.number)
        result = TrialResult.from_json(json.loads(path.read_text())) if path.is_file() else None
        state: State = "finished"
        if frozen.state == TrialState.WAITING:
            state = "waiting"
        elif frozen.state == TrialState.RUNNING:
            state = "running"
        elif frozen.state == TrialState.FAIL:
            state = "interrupted"
        elif result is None or result.failure is not None:
            state = "failed"
        elif result.refused:
            state = "refused"
        return Entry(number=frozen.number, params=dict(frozen.user_attrs.get("params", {})), state=state, result=result)

    def _path(self, number: int) -> Path:
        return self.folder / "trials" / f"{number}.json"

    def _require_same_definition(self) -> None:
        """ConfigError where the study was begun with other objectives, limits or parameters."""
        definition = {
            "objectives": [[o.metric, o.direction] for o in self.objectives],
            "limits": sorted([limit.metric, str(limit)] for limit in self.limits),
            "parameters": json.loads(json.dumps(self.search.parameters)),
        }
        before = self._optuna.user_attrs.get("definition")
        if before is None:
            self._optuna.set_user_attr("definition", definition)
        elif before != definition:
            changed = [key for key in definition if before.get(key) != definition[key]]
            raise ConfigError(
                f"study {self.search.study!r} was begun with other {' and '.join(changed)}",
                place="search.study",
                mend="Give the new sweep a name: search.study=NAME, or undo the change",
            )


def _open(folder: Path, search: Search, objectives: Sequence[Objective]) -> Any:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "optuna.db"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=f"sqlite:///{path}",
                study_name=search.study,
                load_if_exists=True,
                directions=[o.direction for o in objectives],
            )
            study.sampler = _sampler(search, search.seed + len(study.get_trials(deepcopy=False)))
            return study
    except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StoreError(
            f"the study cannot be opened ({str(error).splitlines()[0]})",
            place=str(path),
            mend="Set state to a writable folder",
        ) from error


def _sampler(search: Search, seed: int) -> BaseSampler:
    """A resumed study goes on with another seed, so that it does not propose its first trials again."""
    from optuna import samplers

    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=8)
