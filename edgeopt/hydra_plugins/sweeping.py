"""Run a study for a Hydra application: read the search space, evaluate trials in workers, return the front."""

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
from edgeopt.search.snapshot import take_snapshot
from edgeopt.search.space.definition import Search
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import to_overrides
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial import Trial
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.study import Study
from edgeopt.search.workers import loop

DEVICE: Mapping[str, Any] = {"name": "hydra"}
_OWN_FIELDS = ("_target_", "store", "workers", "limits")
"""Fields of `hydra.sweeper` that are not fields of Search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Study of a Hydra application.

    Attributes:
        url: URL of the trial storage.
        search: search space, budget and sampler.
        objectives: metrics to minimize or maximize.
        limits: hard limits on the metrics that the application returns.
        fixed_overrides: overrides of the command line that apply to every trial.
    """

    url: str
    search: Search
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    fixed_overrides: tuple[str, ...]

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], arguments: Sequence[str], folder: Path) -> Sweep:
        """Create or continue the study that `hydra.sweeper` describes.

        Args:
            settings: fields of `hydra.sweeper`.
            arguments: overrides of the command line. Sweep overrides add parameters to the search space.
            folder: folder of the trial storage if `store` is not set.

        Raises:
            ConfigError: a setting or an override is invalid, or the stored study has other settings.
        """
        fixed_overrides, swept_parameters = _split_overrides(arguments)
        fields = {key: value for key, value in settings.items() if key not in _OWN_FIELDS}
        fields["objectives"] = fields["objectives"] or {"objective": "minimize"}
        parameters = {**fields["parameters"], **swept_parameters}
        search = Search(**{**fields, "parameters": parameters, "spread": 0, "refine": 0.0})
        if settings["workers"] < 1:
            raise ConfigError(
                f"`workers` must be a positive integer, got {settings['workers']}", location="hydra.sweeper.workers"
            )
        metric_units = dict.fromkeys({*search.directions, *settings["limits"]}, "")
        sweep = cls(
            url=settings["store"] or file_url(folder / "studies.db"),
            search=search,
            objectives=tuple(Objective.parse(m, direction, metric_units) for m, direction in search.directions.items()),
            limits=tuple(Limit.parse(metric, text, metric_units) for metric, text in settings["limits"].items()),
            fixed_overrides=fixed_overrides,
        )
        sweep.study().open({})
        return sweep

    def study(self) -> Study:
        """Return the study in its trial storage."""
        storage = TrialStorage(self.url, self.search.study)
        return Study(storage=storage, search=self.search, objectives=self.objectives, limits=self.limits)

    def worker(self, task: Callable[[Any], Any], hydra_context: Any, config: Any) -> Worker:
        """Return a worker that evaluates trials with the application's task function."""
        return Worker(sweep=self, task=task, hydra_context=hydra_context, config=config)

    def front(self) -> dict[str, Any]:
        """Return all trials and the numbers of those on the Pareto front.

        Raises InfeasibleError if no trial satisfies every limit.
        """
        study = take_snapshot(self.study(), {})
        if not study.front:
            raise InfeasibleError(
                "no trial satisfies every limit",
                location=f"study {study.study}",
                hint="Run more trials or relax the limits",
            )
        document = study.to_json()
        return {key: document[key] for key in ("study", "trials", "front")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Task function of a launched job, which evaluates trials until the search ends. Launchers pickle it."""

    sweep: Sweep
    task: Callable[[Any], Any]
    hydra_context: Any
    config: Any

    def __call__(self, _: Any) -> list[int]:
        """Evaluate trials and return their numbers."""
        evaluator = _HydraEvaluator(self)
        study = self.sweep.study()
        loop.run_worker(
            loop.WorkerContext(
                study=study, evaluator=evaluator, log=_NoTracking(), watcher=evaluator, empty_result=_empty_result
            )
        )
        return evaluator.numbers


class _HydraEvaluator:
    """Evaluator and watcher of trials that run as Hydra jobs, each in a folder named after the trial's number."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._current_number = -1
        self.numbers: list[int] = []

    def started(self, trial: Trial) -> None:
        self._current_number = trial.number

    def progress(self, line: str) -> None: ...

    def finished(self, trial: Trial, result: TrialResult) -> None:
        self.numbers.append(trial.number)

    def message(self, line: str) -> None:
        logging.getLogger(__name__).warning(line)

    def run(self, params: Params, progress: Callable[[str], None]) -> TrialResult | Failure:
        """Run the application with the parameters and compare the metrics that it returns with the limits."""
        from hydra.core.utils import run_job
        from omegaconf import open_dict

        sweep, context = self._worker.sweep, self._worker.hydra_context
        job_overrides = [*sweep.fixed_overrides, *to_overrides(params)]
        config = context.config_loader.load_sweep_config(copy.deepcopy(self._worker.config), job_overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self._current_number
        try:
            with trial_environment(sweep.search.study, self._current_number, " ".join(to_overrides(params))):
                return_value = run_job(
                    hydra_context=context,
                    task_function=self._worker.task,
                    config=config,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                    configure_logging=False,
                ).return_value
            metrics = _parse_metrics(return_value, [objective.metric for objective in sweep.objectives])
        except Exception as error:  # any exception of the application is recorded as the failure of this trial
            return Failure(stage="task", kind=type(error).__name__, message=str(error))
        measurements = tuple(
            Measurement(
                metric=metric,
                unit="",
                value=value,
                low=value,
                high=value,
                count=1,
                method="returned by the application",
            )
            for metric, value in metrics.items()
        )
        verdicts = judge(measurements, sweep.limits, {})
        return replace(_empty_result(params), measurements=measurements, verdicts=verdicts)


def _parse_metrics(return_value: Any, metrics: Sequence[str]) -> dict[str, float]:
    """Return the application's return value as values by metric.

    Numbers without names are the values of `metrics`, in order. Raises ConfigError if their count differs or one of
    them is not a number.
    """
    if isinstance(return_value, Mapping):
        return {str(metric): float(value) for metric, value in return_value.items()}
    values = list(return_value) if isinstance(return_value, (list, tuple)) else [return_value]
    if len(values) != len(metrics) or any(not isinstance(v, (int, float)) or math.isnan(v) for v in values):
        raise ConfigError(
            f"the application must return a mapping of metrics or {len(metrics)} numbers, got {return_value!r}",
            location="hydra.sweeper.objectives",
            hint=f"Return values for {', '.join(metrics)}",
        )
    return dict(zip(metrics, map(float, values), strict=True))


class _NoTracking:
    """Tracking log that records nothing: the trial storage has the results, and the application logs its own runs."""

    def begin(self, trial: Trial) -> str:
        return ""

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        return ""

    def kill(self, number: int, attempt: int, reason: str) -> None: ...

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None: ...

    def publish(self) -> None: ...

    def open_attempts(self) -> set[tuple[int, int]]:
        return set()


def _empty_result(params: Params) -> TrialResult:
    return TrialResult(recipe={"text": " ".join(to_overrides(params))}, target="hydra", device=DEVICE, emulated=False)


def _split_overrides(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Split a command line into fixed overrides and the parameters of its sweep overrides.

    Hydra defines the syntax: `choice(a,b)`, `a,b` and `range(1,9)` list choices, and `interval(0,1)` is a range of
    numbers. Raises ConfigError for `glob`.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep, Transformer

    fixed_overrides, parameters = [], {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if not override.is_sweep_override():
            fixed_overrides.append(str(override.input_line))
            continue
        value, key = override.value(), override.get_key_element()
        if isinstance(value, IntervalSweep):
            parameters[key] = {"low": value.start, "high": value.end, **({"log": True} if "log" in value.tags else {})}
        elif isinstance(value, (ChoiceSweep, RangeSweep)):
            parameters[key] = {"choices": list(override.sweep_iterator(transformer=Transformer.identity))}
        else:
            raise ConfigError(
                f"a sweep override must be a choice, a range or an interval, got {override.input_line!r}",
                location="arguments",
                hint=f"List the choices: {key}=A,B",
            )
    return tuple(fixed_overrides), parameters
