"""Test `mlflow.models.evaluate` with `evaluators="edgeopt"` on engines and ONNX models."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import onnx
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from support import samples

from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.tracking import flavor

TEXTS = pd.DataFrame({"prompt": ["def f ( x ) : return x + 1 " * 6, "for x in range ( 1 ) : print ( x ) " * 6]})
QUICK_CONFIG = {
    "overrides": [
        "measure.prompt_lengths=[16]",
        "measure.window_tokens=32",
        "measure.retries=0",
        "measure.probes.energy=null",
        "measure.probes.parity=null",
        "target.context_length=64",
    ]
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def test_engine_is_measured_on_given_texts(store: Path) -> None:
    with mlflow.start_run() as run:
        logged = flavor.log_model(samples.engine(store / "engine").directory)
        result = mlflow.models.evaluate(
            logged.model_uri, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config=QUICK_CONFIG
        )
    assert result.metrics["latency/decode_p50_ms"] > 0
    assert result.metrics["memory/peak_rss_mib"] > 1
    assert result.metrics["quality/perplexity"] > 1
    run_metrics = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    assert run_metrics["quality/perplexity"] == pytest.approx(result.metrics["quality/perplexity"])
    datasets = {metric.key: metric.dataset_name for metric in mlflow.get_logged_model(logged.model_id).metrics}
    assert datasets["quality/perplexity"] is not None
    measurements = json.loads(
        Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/measurements.json")).read_text()
    )
    assert all(m["method"] and m["low"] <= m["value"] <= m["high"] for m in measurements)


def test_unsupported_model_is_rejected(store: Path) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match="must be an engine of edgeopt or an ONNX model"):
        mlflow.models.evaluate(lambda texts: texts, data=TEXTS, model_type="text", evaluators="edgeopt")


def test_unknown_config_key_is_rejected(store: Path) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match="'windows'"):
        mlflow.models.evaluate(
            lambda t: t, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config={"windows": 3}
        )


@pytest.fixture
def onnx_model_uri(store: Path, tiny_model: Path) -> str:
    """Return the URI of a decoder that `mlflow.onnx` logged."""
    (store / "checkpoint").mkdir()
    (store / "engine").mkdir()
    PortableOnnx().build(import_checkpoint(tiny_model, store / "checkpoint"), store / "engine", lambda _: None)
    with mlflow.start_run():
        logged = mlflow.onnx.log_model(onnx.load(store / "engine" / "model.onnx"), name="decoder")
    uri: str = logged.model_uri
    return uri


def test_onnx_decoder_is_measured_with_source_tokenizer(onnx_model_uri: str, tiny_model: Path) -> None:
    config = {**QUICK_CONFIG, "source": str(tiny_model)}
    with mlflow.start_run():
        result = mlflow.models.evaluate(
            onnx_model_uri, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config=config
        )
    assert result.metrics["latency/decode_p50_ms"] > 0
    assert 1 < result.metrics["quality/perplexity"] < 1000


def test_onnx_model_without_source_is_rejected(onnx_model_uri: str) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match=r'evaluator_config=\{"source": FOLDER\}'):
        mlflow.models.evaluate(
            onnx_model_uri, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config=QUICK_CONFIG
        )
