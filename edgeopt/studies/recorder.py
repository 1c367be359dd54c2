"""Record the trials of one study in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt.config.compose import Config
from edgeopt.core.result import TrialResult
from edgeopt.errors import ConfigError
from edgeopt.search.storage.trial import Trial

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request
    from edgeopt.core.study_snapshot import StudySnapshot
    from edgeopt.tracking.recorder import MlflowRecorder


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLog:
    """MLflow recorder bound to one study. Implements `TrackingLog`.

    Attributes:
        take_snapshot: returns the current snapshot of the study.
    """

    recorder: MlflowRecorder
    study: str
    request: Request
    take_snapshot: Callable[[], StudySnapshot]
    _composed: dict[tuple[int, int], Config] = field(default_factory=dict, init=False)

    def begin(self, trial: Trial) -> str:
        """Create the MLflow run of an attempt and return its id."""
        config = self._composed[trial.number, trial.attempt] = self._config(trial.params)
        return self.recorder.begin(self.study, trial.number, trial.params, config, trial.attempt)

    def record(self, trial: Trial, result: TrialResult, front: Collection[int]) -> str:
        """Log a result and return its run id. Release the engines of trials outside `front`."""
        on_front = trial.number in front
        config = self._composed.pop((trial.number, trial.attempt), None) or self._config(trial.params)
        run_id = self.recorder.record(
            self.study,
            trial.number,
            trial.params,
            config,
            result,
            attempt=trial.attempt,
            run_id=trial.run_id,
            ended_s=trial.ended_s,
            keep_engine=on_front,
        )
        if on_front:  # the new trial may dominate others: release their engines
            self.recorder.release(self.study, front)
        return run_id

    def kill(self, number: int, attempt: int, reason: str) -> None:
        """End the run of an attempt as KILLED."""
        self.recorder.kill(self.study, number, reason, attempt)

    def progress(self, values: Mapping[str, float], step: int, at_s: float) -> None:
        """Log metrics of the study after `step` ended trials, at a time in Unix seconds."""
        self.recorder.progress(self.study, values, step, at_s)

    def publish(self) -> None:
        """Upload the current snapshot of the study."""
        self.recorder.publish(self.take_snapshot())

    def open_attempts(self) -> set[tuple[int, int]]:
        """Return number and attempt of the trials whose MLflow run has not ended."""
        return set(self.recorder.open_runs(self.study))

    def _config(self, params: Mapping[str, Any]) -> Config:
        try:
            return self.request.compose(dict(params))
        except ConfigError:
            return self.request.compose()  # invalid parameters are recorded as the failure of the trial
