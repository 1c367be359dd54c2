from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import samples
from support.studies import DECODE, FAILED, RATIO, RSS, SIZE, predicted

from edgeopt.search.storage.trial_summary import TrialSummary, VerdictSummary

figures = st.floats(allow_nan=True, allow_infinity=True)
names = st.text(max_size=8)
helds = st.builds(
    VerdictSummary,
    excess=st.none() | figures,
    satisfied=st.booleans(),
    predicted=st.booleans(),
    bound=st.none() | figures,
)
summaries = st.builds(
    TrialSummary,
    feasible=st.booleans(),
    metrics=st.dictionaries(names, figures, max_size=3),
    predicted=st.dictionaries(names, figures, max_size=3),
    verdicts=st.dictionaries(names, helds, max_size=3),
    refused=names,
    failure=st.none() | names,
    timings_s=st.dictionaries(names, figures, max_size=3),
    saved_s=st.dictionaries(names, figures, max_size=3),
    energy_j=figures,
)


@given(summary=summaries)
def test_a_summary_survives_its_text(summary: TrialSummary) -> None:
    assert repr(TrialSummary.from_json(summary.to_json())) == repr(summary)  # equal also where figures are NaN


def test_a_summary_says_what_the_search_needs_of_a_result() -> None:
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


def test_a_failure_is_told_by_stage_and_message() -> None:
    assert TrialSummary.from_result(samples.result(failure=FAILED)).failure == "build: no"


def test_a_summary_is_small() -> None:
    noted = replace(samples.result(), notes=("lint: " + "x" * 100_000,))
    assert len(TrialSummary.from_result(noted).to_json()) < 2000


def test_an_empty_summary_is_infeasible_and_cost_nothing() -> None:
    assert not TrialSummary().feasible
    assert TrialSummary().spent_s == 0.0
    assert not math.isnan(TrialSummary().energy_j)
