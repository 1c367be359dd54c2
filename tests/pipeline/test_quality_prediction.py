"""Check that the quality predicted from a checkpoint in PyTorch covers the measured quality of its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.cache import StageCache
from edgeopt.config import assemble
from edgeopt.config.assemble import Request
from edgeopt.measure.quality_prediction import QualityPredictor
from edgeopt.pipeline.evaluate import evaluate

BENCH = (
    "target.context_length=96",
    "measure.prompt_lengths=[16]",
    "measure.window_tokens=64",
    "measure.max_windows=24",
    *(f"measure.probes.{name}=null" for name in ("memory", "latency", "continuations", "parity", "energy")),
    "limits.quality.perplexity_ratio=1000",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StageCache:
    return StageCache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("recipe", ["int8", "int4", "prune_int4"])
def test_checkpoint_prediction_covers_engine_measurement(recipe: str, tiny_model: Path, store: StageCache) -> None:
    chosen = ("model=local", f"model.path={tiny_model}", f"recipe={recipe}")
    job = assemble.build_job(Request(overrides=(*BENCH, *chosen)).compose(), None)
    result = evaluate(job, store, lambda line: None)
    assert result.failure is None
    measured = {m.metric: m for m in result.measurements}
    predicted = {m.metric: m for m in result.predictions if m.metric in QualityPredictor.metrics}
    assert predicted.keys() == set(QualityPredictor.metrics)
    for metric, prediction in predicted.items():
        assert prediction.low <= measured[metric].value <= prediction.high, metric
        assert prediction.unit == measured[metric].unit
