"""Evaluate engines with edgeopt's probes in `mlflow.models.evaluate`: the `mlflow.model_evaluator` plugin.

    mlflow.models.evaluate("models:/edgeopt@champion", data=texts, model_type="text", evaluators="edgeopt")

The evaluator measures size, memory, latency, energy and quality on the texts of `data`, with the probes of a sweep in
fresh processes. `evaluator_config` accepts two keys:

- `overrides`: a list of Hydra overrides such as `measure.max_windows=8`.
- `source`: for a model that `mlflow.onnx` logged, a folder in Hugging Face layout with its `config.json` and tokenizer.
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
from edgeopt.tracking.flavor import Generator, parse_prompts

MEASUREMENTS_FILE = "measurements.json"
_CONFIG_KEYS = ("overrides", "source")


class Evaluator(ModelEvaluator):  # type: ignore[misc]
    """Evaluator that measures engines on this machine.

    It logs each metric to the run, and its interval and method to the artifact `measurements.json`.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str | None, evaluator_config: Mapping[str, Any], **_: Any) -> bool:
        """Return True: every model type is accepted."""
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
        """Measure the model and log the metrics to the run.

        Raises MlflowException if `evaluator_config` has an unknown key, or if the model is neither an engine of edgeopt
        nor an ONNX decoder.
        """
        from edgeopt.config import assemble

        settings = evaluator_config or {}
        unknown = sorted(settings.keys() - set(_CONFIG_KEYS))
        if unknown:
            raise _invalid(f"a key of `evaluator_config` must be one of {', '.join(_CONFIG_KEYS)}; got {unknown[0]!r}")
        request = assemble.Request(overrides=tuple(settings.get("overrides", ())))
        text = Text(name=dataset.name or "evaluation data", documents=tuple(parse_prompts(dataset.features_data)))
        bench = replace(assemble.build_bench(request.compose()), evaluation=text)
        with TemporaryDirectory(prefix="edgeopt-onnx-") as folder:
            engine = _open_engine(model, settings.get("source"), Path(folder))
            measurements = bench.measure_engine(engine, logging.getLogger(__name__).info)
        client, now = MlflowClient(), int(time.time() * 1000)
        client.log_batch(
            run_id, metrics=[Metric(m.metric, m.value, now, 0, model_id=model_id, run_id=run_id) for m in measurements]
        )
        client.log_text(run_id, json.dumps([asdict(m) for m in measurements], indent=1), MEASUREMENTS_FILE)
        return EvaluationResult(metrics={m.metric: m.value for m in measurements}, artifacts={})


def _open_engine(model: Any, source: str | None, folder: Path) -> Engine:
    """Return the engine of an edgeopt model, or import an ONNX model into the empty `folder` as an engine."""
    python_model = getattr(model, "_model_impl", None)
    if isinstance(python_model, Generator):
        return python_model.engine
    flavors = getattr(getattr(model, "metadata", None), "flavors", {})
    if "onnx" not in flavors:
        raise _invalid(
            "the model must be an engine of edgeopt or an ONNX model. Use its URI, such as models:/NAME@ALIAS"
        )
    if source is None:
        raise _invalid(
            "an ONNX model contains no tokenizer. Name a folder in Hugging Face layout with "
            'evaluator_config={"source": FOLDER}'
        )
    from edgeopt.runtimes.onnx.import_external import import_graph

    root = Path(mlflow.artifacts.download_artifacts(model.metadata.get_model_info().model_uri))
    try:
        return import_graph(root / flavors["onnx"]["data"], Path(source), folder)
    except InputError as error:
        raise _invalid(str(error)) from error


def _invalid(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)
