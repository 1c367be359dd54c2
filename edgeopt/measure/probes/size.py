"""Read the deployed size and the parameter count from the manifest of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgeopt.core.protocols import FILES_GROUP, ProbeContext, Samples
from edgeopt.core.result import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Size of the files of an engine and number of parameters."""

    METRICS: ClassVar[Mapping[str, str]] = {"size/engine_mib": "MiB", "size/parameters": "count"}
    GROUP: ClassVar[str] = FILES_GROUP
    TIMING_SENSITIVE: ClassVar[bool] = False
    processes: int = 1

    def collect(self, context: ProbeContext) -> Samples:
        """Return bytes and parameters from the manifest."""
        return {"engine_bytes": context.engine.size_bytes, "parameters": context.engine.spec.parameters}

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return both sizes; they are exact."""
        (run,) = {(run["engine_bytes"], run["parameters"]) for run in runs}
        return [
            self._exact("size/engine_mib", run[0] / 2**20, "sum of the engine's files without the manifest"),
            self._exact(
                "size/parameters", float(run[1]), "parameters of matrices and norms in the engine's model spec"
            ),
        ]

    def _exact(self, metric: str, value: float, method: str) -> Measurement:
        unit = self.METRICS[metric]
        return Measurement(metric=metric, unit=unit, value=value, low=value, high=value, count=1, method=method)
