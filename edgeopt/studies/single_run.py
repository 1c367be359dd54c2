"""Evaluate one recipe and log it to MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.config import assemble, parse, trial_process
from edgeopt.core.result import TrialResult, skipped_work
from edgeopt.errors import ConfigError, EdgeoptError, InfeasibleError, InputError
from edgeopt.pipeline.evaluate import evaluate

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request
    from edgeopt.studies.progress import Reporter

STUDY = "single-runs"
"""Study in which single runs are logged."""
_LIMIT_HINT = "Compress further, or set wider limits"


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleRun:
    """A recipe that was evaluated outside a sweep.

    Attributes:
        run_id: id of the MLflow run.
    """

    result: TrialResult
    run_id: str

    @property
    def error(self) -> EdgeoptError | None:
        """Return the error of a failed or infeasible run; None if the run is feasible."""
        result = self.result
        if result.failure is not None:
            kind = {"ConfigError": ConfigError, "InputError": InputError}.get(result.failure.kind, EdgeoptError)
            return kind(result.failure.message)
        if result.refused:
            return InfeasibleError(f"{skipped_work(result.refused)}: {result.violated[0].message}", hint=_LIMIT_HINT)
        unsatisfied = [verdict for verdict in result.verdicts if not verdict.satisfied]
        if unsatisfied:
            return InfeasibleError(
                f"{len(unsatisfied)} of {len(result.verdicts)} limits are not satisfied: {unsatisfied[0].message}",
                hint=_LIMIT_HINT,
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the document of `edgeopt run --json`."""
        return {**self.result.to_json(), "feasible": self.result.feasible, "run_id": self.run_id}


def evaluate_recipe(request: Request, reporter: Reporter) -> SingleRun:
    """Check, evaluate and log the recipe of a request.

    Raises ConfigError or InputError before any work if the request is invalid. A failed evaluation is logged and
    returned.
    """
    config = request.compose()
    trial_process.silence_libraries()
    job = assemble.build_checked_job(config, request.config_dir)
    recorder = parse.instantiate_group(config, "tracking")
    recorder.connect()
    recorder.open_study(STUDY, config, {})
    number = max(recorder.runs(STUDY), default=-1) + 1
    recorder.begin(STUDY, number, {}, config)
    store = assemble.open_cache(config)
    with store.protect():
        try:
            with reporter.step(str(job.recipe)) as progress:
                result = trial_process.with_utilization(lambda: evaluate(job, store, progress))
        except KeyboardInterrupt:
            recorder.kill(STUDY, number, "interrupted by Ctrl-C")
            raise
        run_id = recorder.record(STUDY, number, {}, config, result)
    return SingleRun(result=result, run_id=run_id)
