from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support import samples
from support.studies import FAILED, SIZE, finish, predicted, study

from edgeopt.core.study_snapshot import StudySnapshot
from edgeopt.search.snapshot import snapshot_trial, take_snapshot


def test_failed_and_waiting_trials_have_no_figures(tmp_path: Path) -> None:
    opened = study(tmp_path, enqueue=({"bits": 4}, {"bits": 8}))
    failed = snapshot_trial(finish(opened, samples.result(failure=FAILED)), None)
    assert (failed.number, failed.state, failed.feasible, failed.pareto_rank) == (0, "failed", False, None)
    assert (failed.origin, failed.params, failed.metrics, failed.excess) == ("enqueued", {"bits": 4}, {}, {})
    assert (failed.rung, failed.run_id, failed.failure) == ("", None, "build: no")
    waiting = snapshot_trial(opened.trials()[1], None)
    assert (waiting.state, waiting.feasible, waiting.failure) == ("waiting", False, None)


def test_finished_trial_keeps_every_figure(tmp_path: Path) -> None:
    opened = study(tmp_path)
    outcome = replace(samples.result(), predictions=(predicted(SIZE, 1.4),), baseline=samples.BASELINE)
    measured = tuple(replace(m, low=m.value - 0.1) for m in outcome.measurements)
    trial = finish(opened, replace(outcome, measurements=measured))
    opened.storage.mark_recorded(trial, run_id="r")
    found = snapshot_trial(opened.trials()[0], 1)
    assert (found.feasible, found.pareto_rank, found.run_id) == (True, 1, "r")
    assert found.metrics == samples.result().metrics
    assert found.predicted == {SIZE: 1.4}
    assert found.excess == {v.metric: v.excess for v in samples.result().verdicts}
    assert found.baseline == {m: v for m, v in samples.BASELINE.items() if m in found.metrics}
    assert found.intervals == {m.metric: (m.low, m.high) for m in measured}


def test_snapshot_survives_json(tmp_path: Path) -> None:
    opened = study(tmp_path)
    finish(opened, samples.result())
    found = take_snapshot(opened, {"latency/decode_p50_ms": "ms"})
    assert StudySnapshot.from_json(found.to_json()) == found
    assert [trial.number for trial in found.front] == [0]
