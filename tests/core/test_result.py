"""Test that stored results are read, including those of older versions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support import samples

from edgeopt.core.artifact import ArtifactSummary
from edgeopt.core.corpus import Text
from edgeopt.core.result import Failure, TrialResult, UtilizationReading

FULL = replace(
    samples.result(),
    engine=ArtifactSummary(directory="e", digest="d", manifest_sha256="m", size_bytes=7),
    texts={"evaluation": Text(name="t", documents=("a", "b")).summary()},
    system=(UtilizationReading(at_s=1.5, values={"cpu_utilization_percentage": 50.0}),),
)


def stored(result: TrialResult) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(result.to_json()))
    return data


@pytest.mark.parametrize(
    "result",
    [FULL, samples.result(failure=Failure(stage="build", kind="BuildError", message="no"))],
    ids=["complete", "failed"],
)
def test_result_round_trips(result: TrialResult) -> None:
    assert TrialResult.from_json(stored(result)) == result


def test_older_utilization_readings_are_read() -> None:
    data = stored(FULL) | {"system": [{"at_s": 1.5, "cpu_utilization_percentage": 50.0}]}
    assert TrialResult.from_json(data).system == FULL.system


def test_properties_name_recipe_and_device() -> None:
    assert (FULL.recipe_text, FULL.recipe_digest, FULL.device_name) == (
        "prune_width → quantize",
        "d1ge57",
        "test machine",
    )
    unknown = replace(FULL, recipe={}, device={})
    assert (unknown.recipe_text, unknown.recipe_digest, unknown.device_name) == ("", "", "")
