from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import samples
from support.studies import DECODE, FAILED, RATIO, RSS, SIZE, predicted

from edgeopt.search.storage.trial_summary import TrialSummary, VerdictSummary

floats = st.floats(allow_nan=True, allow_infinity=True)
names = st.text(max_size=8)
verdicts = st.builds(
    VerdictSummary,
    excess=st.none() | floats,
    satisfied=st.booleans(),
    predicted=st.booleans(),
    bound=st.none() | floats,
)
summaries = st.builds(
    TrialSummary,
    feasible=st.booleans(),
    metrics=st.dictionaries(names, floats, max_size=3),
    predicted=st.dictionaries(names, floats, max_size=3),
    verdicts=st.dictionaries(names, verdicts, max_size=3),
    refused=names,
    failure=st.none() | names,
    timings_s=st.dictionaries(names, floats, max_size=3),
    saved_s=st.dictionaries(names, floats, max_size=3),
    energy_j=floats,
)


@given(summary=summaries)
def test_summary_survives_json(summary: TrialSummary) -> None:
    assert repr(TrialSummary.from_json(summary.to_json())) == repr(summary)  # repr is equal also for NaN


def test_summary_of_a_result() -> None:
    result = replace(
        samples.result(decode_ms=2.08),
        predictions=(predicted(SIZE, 1.4),),
        timings_s={"build": 1.5, "measure": 0.5},
        saved_s={"compress": 9.0},
        energy_j=3.0,
    )
    summary = TrialSummary.from_result(result)
    assert not summary.feasible
    assert summary.metrics == {RATIO: 1.05, DECODE: 2.08, RSS: 70.0, SIZE: 1.5}
    assert summary.predicted == {SIZE: 1.4}
    assert summary.verdicts[DECODE] == VerdictSummary(
        excess=pytest.approx(1.0), satisfied=False, predicted=False, bound=1.04
    )
    assert (summary.refused, summary.failure) == ("", None)
    assert (summary.spent_s, summary.saved_s, summary.energy_j) == (2.0, {"compress": 9.0}, 3.0)


def test_failure_has_stage_and_message() -> None:
    assert TrialSummary.from_result(samples.result(failure=FAILED)).failure == "build: no"


def test_summary_is_small() -> None:
    result = replace(samples.result(), notes=("lint: " + "x" * 100_000,))
    assert len(TrialSummary.from_result(result).to_json()) < 2000


def test_empty_summary_is_infeasible() -> None:
    assert not TrialSummary().feasible
    assert TrialSummary().spent_s == 0.0
    assert TrialSummary().energy_j == 0.0
