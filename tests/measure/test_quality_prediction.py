"""Test that predicted quality intervals contain the observed ones, and which models the predictor covers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import specs, toy_bench

from edgeopt.core.model_spec import KvCacheScheme, QuantizationScheme
from edgeopt.core.result import Measurement
from edgeopt.measure import quality_prediction
from edgeopt.measure.probes.quality import Quality
from edgeopt.measure.quality_prediction import (
    KL_MEAN,
    PERPLEXITY,
    PERPLEXITY_RATIO,
    QualityPredictor,
    restrict_to_quality,
)

PREDICTOR = QualityPredictor(bench=None)
INTERVALS = st.tuples(*[st.floats(0.0, 1e4)] * 3).map(sorted)


def observed(metric: str, low: float, value: float, high: float) -> Measurement:
    unit = Quality.METRICS[metric]
    return Measurement(metric=metric, unit=unit, value=value, low=low, high=high, count=4088, method="in PyTorch")


@given(ratio=INTERVALS, kl=INTERVALS, baseline=st.floats(1.0, 1e4))
def test_predicted_intervals_contain_the_observed_ones(ratio, kl, baseline):
    measurements = [observed(PERPLEXITY_RATIO, *ratio), observed(KL_MEAN, *kl)]
    predicted = {m.metric: m for m in PREDICTOR.predict(measurements, {PERPLEXITY: baseline})}
    assert set(predicted) == set(PREDICTOR.metrics)
    for interval, metric, scale in ((ratio, PERPLEXITY_RATIO, 1.0), (kl, KL_MEAN, 1.0), (ratio, PERPLEXITY, baseline)):
        prediction = predicted[metric]
        assert prediction.kind == "predicted"
        assert prediction.unit == Quality.METRICS[metric]
        assert prediction.value == scale * interval[1]
        assert 0 <= prediction.low <= scale * interval[0]
        assert prediction.high >= scale * interval[2]


def test_perplexity_prediction_needs_the_baseline_perplexity():
    measurements = [observed(PERPLEXITY_RATIO, 1.0, 1.1, 1.2), observed(KL_MEAN, 0.1, 0.2, 0.3)]
    assert {m.metric for m in PREDICTOR.predict(measurements, {})} == {PERPLEXITY_RATIO, KL_MEAN}


def test_predicted_metrics_are_quality_metrics():
    assert set(PREDICTOR.metrics) <= set(Quality.METRICS)


WEIGHTS = QuantizationScheme(bits=4, block_size=32, symmetric=False)


@pytest.mark.parametrize(
    ("changes", "covered"),
    [
        ({}, True),
        ({"weight_dtype": "fp16"}, True),
        ({"weight_dtype": "Q4_K_M"}, False),
        ({"schemes": {"lm_head": WEIGHTS}}, True),
        ({"schemes": {"lm_head": WEIGHTS, "layers.0.o": replace(WEIGHTS, bits=8, inputs="dynamic")}}, False),
        ({"schemes": {"layers.0.o": replace(WEIGHTS, bits=8, inputs="static")}}, False),
        ({"kv_cache": KvCacheScheme(bits=8, per_channel=True)}, False),
    ],
)
def test_predictor_covers_weight_rounding_only(changes, covered):
    assert PREDICTOR.covers(replace(specs.llama(), **changes)) == covered


def test_prediction_bench_has_only_quality_and_few_windows():
    probes = {"renamed": Quality(kl_tokens=100), "size": toy_bench.make_bench("size").probes["size"]}
    bench = toy_bench.make_bench(probes=probes, max_windows=24)
    restricted = restrict_to_quality(bench)
    assert restricted is not None
    assert (list(restricted.probes), restricted.max_windows) == (["renamed"], quality_prediction.MAX_WINDOWS)
    assert restricted.probes["renamed"] == probes["renamed"]
    fewer = restrict_to_quality(replace(bench, max_windows=3))
    assert fewer is not None
    assert fewer.max_windows == 3
    assert restrict_to_quality(toy_bench.make_bench("size", "memory")) is None
