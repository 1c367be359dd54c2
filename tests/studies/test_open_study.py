from __future__ import annotations

from support import samples

from edgeopt.studies.open_study import nothing_feasible


def test_the_limit_that_most_break_is_named() -> None:
    rows = [samples.row(n, samples.result(decode_ms=9.0), None, None) for n in range(3)]
    told = str(nothing_feasible({"study": "s", "trials": rows, "objectives": samples.OBJECTIVES}))
    assert "no trial keeps every limit: 3 of 3 break latency/decode_p50_ms" in told


def test_an_objective_that_nothing_measured_is_named_where_limits_are_kept() -> None:
    rows = [samples.row(0, samples.result(), None, None)]
    objectives = [*samples.OBJECTIVES, {"metric": "tasks/accuracy", "unit": "", "direction": "maximize"}]
    told = str(nothing_feasible({"study": "s", "trials": rows, "objectives": objectives}))
    assert "1 trials keep every limit, and tasks/accuracy was not measured" in told
    assert "search.objectives" in told
