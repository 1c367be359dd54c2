"""The `mlflow.model_evaluator` plugin: `mlflow.models.evaluate(..., evaluators="edgeopt")` measures as a sweep does.

    mlflow.models.evaluate("models:/edgeopt@champion", data=texts, model_type="text", evaluators="edgeopt")

Size, memory, latency, energy and quality on the texts of `data`, by the same probes in fresh processes. Of
`evaluator_config`, `overrides` is a list of Hydra overrides, such as `measure.max_windows=8`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from edgeopt.text import Text
from edgeopt.tracking.flavor import Generator, prompts

MEASUREMENTS = "measurements.json"
_KNOWN = {"overrides"}


class Evaluator(ModelEvaluator):  # type: ignore[misc]
    """Measures engines on this machine, each metric with its interval and method in MEASUREMENTS."""

    @classmethod
    def can_evaluate(cls, *, model_type: str | None, evaluator_config: Mapping[str, Any], **_: Any) -> bool:
        return True

    def evaluate(
        self,
        *,
        model_type: str | None,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        model_id: str | None = None,
        **_: Any,
    ) -> EvaluationResult:
        """The figures, which are logged to the run too. MlflowException for what is no engine of edgeopt."""
        from edgeopt import assembly

        unknown = sorted(set(evaluator_config or {}) - _KNOWN)
        if unknown:
            raise _refused(f"evaluator_config has the unknown key {unknown[0]!r}; known is overrides")
        generator = getattr(model, "_model_impl", None)
        if not isinstance(generator, Generator):
            raise _refused("it is no engine of edgeopt: give models:/NAME@ALIAS of one that edgeopt promote registered")
        request = assembly.Request(overrides=tuple((evaluator_config or {}).get("overrides", ())))
        text = Text(name=dataset.name or "evaluation data", documents=tuple(prompts(dataset.features_data)))
        bench = replace(assembly.bench(request.compose()), evaluation=text)
        found = bench.alone(generator.engine, logging.getLogger(__name__).info)
        client, now = MlflowClient(), int(time.time() * 1000)
        client.log_batch(
            run_id, metrics=[Metric(m.metric, m.value, now, 0, model_id=model_id, run_id=run_id) for m in found]
        )
        client.log_text(run_id, json.dumps([asdict(m) for m in found], indent=1), MEASUREMENTS)
        return EvaluationResult(metrics={m.metric: m.value for m in found}, artifacts={})


def _refused(what: str) -> MlflowException:
    return MlflowException(what, error_code=INVALID_PARAMETER_VALUE)
