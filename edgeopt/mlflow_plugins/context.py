"""The `mlflow.run_context_provider` plugin: runs that are logged inside a trial say of which trial.

An application that `hydra/sweeper=edgeopt` sweeps and that logs to MLflow by itself has thereby the study, the trial,
its recipe, the device and the commit on its runs, without a line of its own.
"""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

from edgeopt.core import mlflow_tags as tags
from edgeopt.core import trial_context


class Context(RunContextProvider):  # type: ignore[misc]
    """Tags of the trial that this process works on."""

    def in_context(self) -> bool:
        return bool(trial_context.known())

    def tags(self) -> dict[str, str]:
        from edgeopt.machine.inventory import detect_device
        from edgeopt.tracking.mlflow_fields import surroundings

        return surroundings() | trial_context.known() | {tags.DEVICE: detect_device(measure_rates=False).name}
