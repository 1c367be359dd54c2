"""`mlflow.models.evaluate(..., model_type="text", evaluators="edgeopt")`."""

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
FEW = {
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


def test_an_engine_is_measured_by_the_probes_of_a_sweep_on_the_given_texts(store: Path) -> None:
    with mlflow.start_run() as run:
        logged = flavor.log_model(samples.engine(store / "engine").directory)
        found = mlflow.models.evaluate(
            logged.model_uri, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config=FEW
        )
    assert found.metrics["latency/decode_p50_ms"] > 0
    assert found.metrics["memory/peak_rss_mib"] > 1
    assert found.metrics["quality/perplexity"] > 1
    kept = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    assert kept["quality/perplexity"] == pytest.approx(found.metrics["quality/perplexity"])
    of = {metric.key: metric.dataset_name for metric in mlflow.get_logged_model(logged.model_id).metrics}
    assert of["quality/perplexity"] is not None, "what it was judged on"
    told = json.loads(
        Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/measurements.json")).read_text()
    )
    assert all(m["method"] and m["low"] <= m["value"] <= m["high"] for m in told)


def test_what_is_no_engine_is_refused_by_name(store: Path) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match="no engine of edgeopt"):
        mlflow.models.evaluate(lambda texts: texts, data=TEXTS, model_type="text", evaluators="edgeopt")


def test_an_unknown_setting_is_named(store: Path) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match="'windows'"):
        mlflow.models.evaluate(
            lambda t: t, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config={"windows": 3}
        )


@pytest.fixture
def foreign(store: Path, tiny_model: Path) -> str:
    """The address of a decoder that `mlflow.onnx` logged."""
    (store / "checkpoint").mkdir()
    (store / "engine").mkdir()
    PortableOnnx().build(import_checkpoint(tiny_model, store / "checkpoint"), store / "engine", lambda _: None)
    with mlflow.start_run():
        logged = mlflow.onnx.log_model(onnx.load(store / "engine" / "model.onnx"), name="decoder")
    address: str = logged.model_uri
    return address


def test_a_foreign_onnx_decoder_is_measured_with_the_tokenizer_that_it_came_from(
    foreign: str, tiny_model: Path
) -> None:
    given = {**FEW, "source": str(tiny_model)}
    with mlflow.start_run():
        found = mlflow.models.evaluate(
            foreign, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config=given
        )
    assert found.metrics["latency/decode_p50_ms"] > 0
    assert 1 < found.metrics["quality/perplexity"] < 1000


def test_a_foreign_onnx_model_without_its_tokenizer_is_refused_with_the_mend(foreign: str) -> None:
    with mlflow.start_run(), pytest.raises(MlflowException, match=r'evaluator_config=\{"source": FOLDER\}'):
        mlflow.models.evaluate(foreign, data=TEXTS, model_type="text", evaluators="edgeopt", evaluator_config=FEW)
