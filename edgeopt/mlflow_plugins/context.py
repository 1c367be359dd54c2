"""Tag MLflow runs with the trial to which they belong: the `mlflow.run_context_provider` plugin.

An application swept by `hydra/sweeper=edgeopt` may log its own MLflow runs. This plugin adds the study, trial, recipe,
device and commit to their tags, without changes to the application.
"""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

from edgeopt.core import mlflow_tags as tags
from edgeopt.core import trial_context


class Context(RunContextProvider):  # type: ignore[misc]
    """Provider of the tags of the trial that this process evaluates."""

    def in_context(self) -> bool:
        """Return True if this process evaluates a trial."""
        return bool(trial_context.current_trial_tags())

    def tags(self) -> dict[str, str]:
        """Return the tags of the trial, of this environment and of this device."""
        from edgeopt.machine.inventory import detect_device
        from edgeopt.tracking.mlflow_fields import environment_tags

        return (
            environment_tags()
            | trial_context.current_trial_tags()
            | {tags.DEVICE: detect_device(measure_rates=False).name}
        )
