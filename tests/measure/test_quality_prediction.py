"""Predictions of an engine's quality hold what it is later measured to be, and promise no more than torch can know."""

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
from edgeopt.measure.quality_prediction import KL, PERPLEXITY, RATIO, QualityPredictor, restrict_to_quality

FORESIGHT = QualityPredictor(bench=None)
ENDS = st.tuples(*[st.floats(0.0, 1e4)] * 3).map(sorted)


def observed(metric: str, low: float, value: float, high: float) -> Measurement:
    unit = Quality.METRICS[metric]
    return Measurement(metric=metric, unit=unit, value=value, low=low, high=high, count=4088, method="in torch")


@given(ratio=ENDS, kl=ENDS, original=st.floats(1.0, 1e4))
def test_every_prediction_is_wider_than_what_was_observed_and_named_as_the_measurement(ratio, kl, original):
    seen = [observed(RATIO, *ratio), observed(KL, *kl)]
    found = {m.metric: m for m in FORESIGHT.predict(seen, {PERPLEXITY: original})}
    assert set(found) == set(FORESIGHT.metrics)
    for given_, metric, scale in ((ratio, RATIO, 1.0), (kl, KL, 1.0), (ratio, PERPLEXITY, original)):
        figure = found[metric]
        assert figure.kind == "predicted"
        assert figure.unit == Quality.METRICS[metric]
        assert figure.value == scale * given_[1]
        assert 0 <= figure.low <= scale * given_[0]
        assert figure.high >= scale * given_[2]


def test_perplexity_is_not_predicted_while_that_of_the_original_engine_is_unknown():
    seen = [observed(RATIO, 1.0, 1.1, 1.2), observed(KL, 0.1, 0.2, 0.3)]
    assert {m.metric for m in FORESIGHT.predict(seen, {})} == {RATIO, KL}


def test_metrics_are_those_that_quality_measures():
    assert set(FORESIGHT.metrics) <= set(Quality.METRICS)


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
def test_what_an_engine_rounds_beside_its_weights_is_not_foreseen(changes, covered):
    assert FORESIGHT.covers(replace(specs.llama(), **changes)) == covered


def test_few_windows_of_the_probe_of_quality_alone_are_looked_at():
    probes = {"how_well": Quality(kl_tokens=100), "size": toy_bench.bench("size").probes["size"]}
    bench = toy_bench.bench(probes=probes, max_windows=24)
    short = restrict_to_quality(bench)
    assert short is not None
    assert (list(short.probes), short.max_windows) == (["how_well"], quality_prediction.WINDOWS)
    assert short.probes["how_well"] == probes["how_well"]
    fewer = restrict_to_quality(replace(bench, max_windows=3))
    assert fewer is not None
    assert fewer.max_windows == 3
    assert restrict_to_quality(toy_bench.bench("size", "memory")) is None
