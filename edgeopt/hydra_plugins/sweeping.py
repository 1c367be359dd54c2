"""What the Hydra sweeper does with a study: read its space, be a worker for an application, tell the front."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeopt.core.judge import judge
from edgeopt.core.result import Failure, Measurement, TrialResult
from edgeopt.core.target import Limit
from edgeopt.core.trial_context import trial_environment
from edgeopt.errors import ConfigError, InfeasibleError
from edgeopt.search.pareto.front import Objective
from edgeopt.search.snapshot import snapshot
from edgeopt.search.space.definition import Search
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.space import overrides
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial import Row
from edgeopt.search.storage.trial_store import Ledger
from edgeopt.search.study import Study
from edgeopt.search.workers import loop

DEVICE: Mapping[str, Any] = {"name": "hydra"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A search over a Hydra application.

    Attributes:
        fixed: overrides of the command line that every job has.
    """

    url: str
    search: Search
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    fixed: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], arguments: Sequence[str], folder: Path) -> Sweep:
        """From `hydra.sweeper` and the command line, whose sweeping overrides join the parameters."""
        own = ("_target_", "store", "workers", "limits")
        fixed, swept = _told(arguments)
        given = {key: value for key, value in settings.items() if key not in own}
        given["objectives"] = given["objectives"] or {"objective": "minimize"}
        search = Search(**{**given, "parameters": {**given["parameters"], **swept}, "spread": 0, "refine": 0.0})
        if settings["workers"] < 1:
            raise ConfigError(f"{settings['workers']} workers cannot work", location="hydra.sweeper.workers")
        names = {*search.directions, *settings["limits"]}
        known = dict.fromkeys(names, "")
        sweep = cls(
            url=settings["store"] or file_url(folder / "studies.db"),
            search=search,
            objectives=tuple(Objective.parse(m, direction, known) for m, direction in search.directions.items()),
            limits=tuple(Limit.parse(metric, text, known) for metric, text in settings["limits"].items()),
            fixed=fixed,
        )
        sweep.study().open({})
        return sweep

    def study(self) -> Study:
        ledger = Ledger(self.url, self.search.study)
        return Study(ledger=ledger, search=self.search, objectives=self.objectives, limits=self.limits)

    def worker(self, task: Callable[[Any], Any], hydra_context: Any, config: Any) -> Worker:
        return Worker(sweep=self, task=task, hydra_context=hydra_context, config=config)

    def front(self) -> dict[str, Any]:
        """The trials and which of them are on the front. InfeasibleError where none keeps every limit."""
        found = snapshot(self.study(), {})
        if not found.front:
            raise InfeasibleError(
                "no trial satisfies every limit", location=f"study {found.study}", hint="Search longer"
            )
        document = found.to_json()
        return {key: document[key] for key in ("study", "trials", "front")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The task of a job: it evaluates trial after trial of the application, and goes to other hosts by pickle."""

    sweep: Sweep
    task: Callable[[Any], Any]
    hydra_context: Any
    config: Any

    def __call__(self, _: Any) -> list[int]:
        """The numbers of the trials that this worker evaluated."""
        trials = _Trials(self)
        study = self.sweep.study()
        loop.run(loop.Sweep(study=study, evaluator=trials, log=_Unlogged(), watcher=trials, blank=_blank))
        return trials.numbers


class _Trials:
    """The trials of one worker: each is a job of the application, in a folder named after its number."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._now = -1
        self.numbers: list[int] = []

    def started(self, row: Row) -> None:
        self._now = row.number

    def progress(self, line: str) -> None: ...

    def finished(self, row: Row, result: TrialResult) -> None:
        self.numbers.append(row.number)

    def told(self, line: str) -> None:
        logging.getLogger(__name__).warning(line)

    def run(self, params: Params, progress: Callable[[str], None]) -> TrialResult | Failure:
        """The figures that the application returns for a trial, held against the limits."""
        from hydra.core.utils import run_job
        from omegaconf import open_dict

        sweep, context = self._worker.sweep, self._worker.hydra_context
        given = [*sweep.fixed, *overrides(params)]
        config = context.config_loader.load_sweep_config(copy.deepcopy(self._worker.config), given)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self._now
        try:
            with trial_environment(sweep.search.study, self._now, " ".join(overrides(params))):
                answer = run_job(
                    hydra_context=context,
                    task_function=self._worker.task,
                    config=config,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                    configure_logging=False,
                ).return_value
            figures = _figures(answer, [objective.metric for objective in sweep.objectives])
        except Exception as error:  # whatever the application raises is this trial's outcome, told with its cause
            return Failure(stage="task", kind=type(error).__name__, message=str(error))
        found = tuple(
            Measurement(metric=m, unit="", value=v, low=v, high=v, count=1, method="returned by the application")
            for m, v in figures.items()
        )
        return replace(_blank(params), measurements=found, verdicts=judge(found, sweep.limits, {}))


def _figures(answer: Any, names: Sequence[str]) -> dict[str, float]:
    """What an application returned, by metric."""
    if isinstance(answer, Mapping):
        return {str(metric): float(value) for metric, value in answer.items()}
    values = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    if len(values) != len(names) or any(not isinstance(v, (int, float)) or math.isnan(v) for v in values):
        raise ConfigError(
            f"the application returned {answer!r}",
            location="hydra.sweeper.objectives",
            hint=f"Return a mapping by metric, or {len(names)} numbers: {', '.join(names)}",
        )
    return dict(zip(names, map(float, values), strict=True))


class _Unlogged:
    """No tracking server: the ledger and the application's own logs have it all."""

    def begin(self, row: Row) -> str:
        return ""

    def record(self, row: Row, result: TrialResult, front: Collection[int]) -> str:
        return ""

    def kill(self, number: int, attempt: int, why: str) -> None: ...

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None: ...

    def publish(self) -> None: ...

    def open_attempts(self) -> set[tuple[int, int]]:
        return set()


def _blank(params: Params) -> TrialResult:
    return TrialResult(recipe={"text": " ".join(overrides(params))}, target="hydra", device=DEVICE, emulated=False)


def _told(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The fixed overrides of a command line, and the parameters that its sweeping ones describe.

    As in Hydra's grammar: `choice(a,b)` and `a,b` are choices, `range(1,9)` whole numbers, `interval(0,1)` any between.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep, Transformer

    fixed, swept = [], {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
            continue
        value, key = override.value(), override.get_key_element()
        if isinstance(value, IntervalSweep):
            swept[key] = {"low": value.start, "high": value.end, **({"log": True} if "log" in value.tags else {})}
        elif isinstance(value, (ChoiceSweep, RangeSweep)):
            swept[key] = {"choices": list(override.sweep_iterator(transformer=Transformer.identity))}
    return tuple(fixed), swept
