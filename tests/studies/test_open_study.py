from __future__ import annotations

from dataclasses import replace

from support import samples

from edgeopt.core.study_snapshot import ObjectiveSnapshot
from edgeopt.studies.open_study import nothing_feasible


def test_error_names_most_exceeded_limit() -> None:
    trials = [samples.trial(n, samples.result(decode_ms=9.0), None, None) for n in range(3)]
    message = str(nothing_feasible(samples.snapshot(trials)))
    assert "no trial satisfies every limit: 3 of 3 do not satisfy latency/decode_p50_ms" in message


def test_error_counts_disturbed_trials() -> None:
    disturbed = samples.trial(0, samples.result(), None, None)
    disturbed = replace(disturbed, feasible=False, excess=dict.fromkeys(disturbed.excess, -0.5))
    slow = samples.trial(1, samples.result(decode_ms=9.0), None, None)
    assert (disturbed.is_disturbed, slow.is_disturbed) == (True, False)
    message = str(nothing_feasible(samples.snapshot([disturbed, replace(disturbed, number=2), slow])))
    assert "1 of 3 do not satisfy latency/decode_p50_ms, 2 of 3 were disturbed by other processes" in message
    assert "Stop other programs" in message


def test_error_names_unmeasured_objective() -> None:
    objectives = (*samples.OBJECTIVES, ObjectiveSnapshot(metric="tasks/accuracy", unit="", direction="maximize"))
    snapshot = samples.snapshot([samples.trial(0, samples.result(), None, None)], objectives=objectives)
    message = str(nothing_feasible(snapshot))
    assert "no feasible trial measured every objective: tasks/accuracy is missing" in message
    assert "search.objectives" in message
