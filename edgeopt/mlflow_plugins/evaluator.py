"""The `mlflow.model_evaluator` plugin: `mlflow.models.evaluate(..., evaluators="edgeopt")` measures as a sweep does.

    mlflow.models.evaluate("models:/edgeopt@champion", data=texts, model_type="text", evaluators="edgeopt")

Size, memory, latency, energy and quality on the texts of `data`, by the same probes in fresh processes. Of
`evaluator_config`, `overrides` is a list of Hydra overrides, such as `measure.max_windows=8`, and `source` the folder
in Hugging Face layout whose `config.json` and tokenizer belong to a model that `mlflow.onnx` logged.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from edgeopt.core.artifact import Engine
from edgeopt.core.corpus import Text
from edgeopt.errors import InputError
from edgeopt.tracking.flavor import Generator, prompts

MEASUREMENTS = "measurements.json"
_KNOWN = ("overrides", "source")


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
        """The figures, which are logged to the run too. MlflowException for what is no engine and no ONNX decoder."""
        from edgeopt.config import assemble

        settings = evaluator_config or {}
        unknown = sorted(settings.keys() - set(_KNOWN))
        if unknown:
            raise _refused(f"evaluator_config has the unknown key {unknown[0]!r}; known are {' and '.join(_KNOWN)}")
        request = assemble.Request(overrides=tuple(settings.get("overrides", ())))
        text = Text(name=dataset.name or "evaluation data", documents=tuple(prompts(dataset.features_data)))
        bench = replace(assemble.bench(request.compose()), evaluation=text)
        with TemporaryDirectory(prefix="edgeopt-onnx-") as folder:
            engine = _engine(model, settings.get("source"), Path(folder))
            found = bench.alone(engine, logging.getLogger(__name__).info)
        client, now = MlflowClient(), int(time.time() * 1000)
        client.log_batch(
            run_id, metrics=[Metric(m.metric, m.value, now, 0, model_id=model_id, run_id=run_id) for m in found]
        )
        client.log_text(run_id, json.dumps([asdict(m) for m in found], indent=1), MEASUREMENTS)
        return EvaluationResult(metrics={m.metric: m.value for m in found}, artifacts={})


def _engine(model: Any, source: str | None, folder: Path) -> Engine:
    """The engine that `model` is, or the one that is made of it in the empty `folder`."""
    inside = getattr(model, "_model_impl", None)
    if isinstance(inside, Generator):
        return inside.engine
    flavors = getattr(getattr(model, "metadata", None), "flavors", {})
    if "onnx" not in flavors:
        raise _refused("it is no engine of edgeopt and no ONNX model: give models:/NAME@ALIAS of one of them")
    if source is None:
        raise _refused(
            "an ONNX model says nothing of its tokenizer: name a folder in Hugging Face layout by "
            'evaluator_config={"source": FOLDER}'
        )
    from edgeopt.runtimes.onnx.import_external import import_graph

    root = Path(mlflow.artifacts.download_artifacts(model.metadata.get_model_info().model_uri))
    try:
        return import_graph(root / flavors["onnx"]["data"], Path(source), folder)
    except InputError as error:
        raise _refused(str(error)) from error


def _refused(what: str) -> MlflowException:
    return MlflowException(what, error_code=INVALID_PARAMETER_VALUE)
