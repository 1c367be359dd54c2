from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.result import Measurement, TrialResult, Verdict
from edgeopt.tracking import mlflow_fields, run_descriptions


@pytest.mark.parametrize(
    ("config", "flat"),
    [
        ({"a": {"b": 1, "c": {"d": None}}}, {"a.b": "1", "a.c.d": "null"}),
        ({"a": [1, 2.5, "x"]}, {"a": '[1, 2.5, "x"]'}),
        ({"a": [{"b": True}, {"b": False}]}, {"a.0.b": "true", "a.1.b": "false"}),
        ({}, {}),
        ({"a": {}, "b": []}, {"a": "{}", "b": "[]"}),
        ({"a": "plain", "b": "µ"}, {"a": "plain", "b": "µ"}),
    ],
)
def test_flatten(config: dict[str, Any], flat: dict[str, str]) -> None:
    assert mlflow_fields.flatten(config) == flat


@given(st.dictionaries(st.text(string.printable, min_size=1, max_size=400), st.text(max_size=50), max_size=4))
def test_params_are_valid_in_mlflow(values: dict[str, str]) -> None:
    from mlflow.utils.validation import _validate_param

    kept, _ = mlflow_fields.fit_params(values)
    for key, value in kept.items():
        _validate_param(key, value)


def test_long_names_stay_distinct() -> None:
    kept, _ = mlflow_fields.fit_params({"a" * 300 + "1": "x", "a" * 300 + "2": "y"})
    assert len(kept) == 2
    assert all(len(name) <= mlflow_fields.KEY_LENGTH for name in kept)


def test_plain_is_strict_json() -> None:
    assert mlflow_fields.to_json_types({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": ["nan", 1.0, ["inf"]]}


def stopped(rung: str, verdict: Verdict, *measurements: Measurement) -> TrialResult:
    return TrialResult(
        recipe={"text": "int4"},
        target="t",
        device={},
        emulated=False,
        refused=rung,
        verdicts=(verdict,),
        measurements=measurements,
        saved_s={"compress/lora": 20.5},
    )


SIZE = Measurement(metric="size/engine_mib", unit="MiB", value=9.0, low=9.0, high=9.0, count=1, method="bytes")
BROKEN = Verdict(
    metric=SIZE.metric,
    limit="at most 5 MiB",
    bound=5.0,
    value=9.0,
    excess=0.8,
    satisfied=False,
    reason="is above 5 MiB",
)


def test_time_saved_by_cache_is_logged() -> None:
    found, _ = mlflow_fields.trial_metrics(stopped("build", BROKEN, SIZE))
    assert found["time_saved/compress/lora_s"] == 20.5
    assert found["excess/size/engine_mib"] == 0.8


def test_description_names_rung_and_predictions() -> None:
    late = run_descriptions.trial_description(stopped("build", BROKEN, SIZE))
    assert "**Stopped early** at build: nothing was measured after build" in late
    assert "| 9 MiB |" in late
    early = run_descriptions.trial_description(stopped("divergence", replace(BROKEN, predicted=True)))
    assert "no engine was built" in early
    assert "(predicted, best case) |" in early
    hopeful = run_descriptions.trial_description(stopped("build", replace(BROKEN, predicted=True, satisfied=True)))
    assert "(predicted, best case) | not excluded |" in hopeful
    assert "**Refused by prediction**: nothing was built" in run_descriptions.trial_description(
        stopped("prediction", replace(BROKEN, predicted=True))
    )
