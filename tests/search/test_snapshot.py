from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support import samples
from support.studies import FAILED, SIZE, finish_next, open_study, predicted

from edgeopt.core.study_snapshot import StudySnapshot
from edgeopt.search.snapshot import snapshot_trial, take_snapshot


def test_failed_and_waiting_trials_have_no_metrics(tmp_path: Path) -> None:
    study = open_study(tmp_path, enqueue=({"bits": 4}, {"bits": 8}))
    failed = snapshot_trial(finish_next(study, samples.result(failure=FAILED)), None)
    assert (failed.number, failed.state, failed.feasible, failed.pareto_rank) == (0, "failed", False, None)
    assert (failed.origin, failed.params, failed.metrics, failed.excess) == ("enqueued", {"bits": 4}, {}, {})
    assert (failed.rung, failed.run_id, failed.failure) == ("", None, "build: no")
    waiting = snapshot_trial(study.trials()[1], None)
    assert (waiting.state, waiting.feasible, waiting.failure) == ("waiting", False, None)


def test_finished_trial_keeps_every_metric(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    result = replace(samples.result(), predictions=(predicted(SIZE, 1.4),), baseline=samples.BASELINE)
    measured = tuple(replace(m, low=m.value - 0.1) for m in result.measurements)
    trial = finish_next(study, replace(result, measurements=measured))
    study.storage.mark_recorded(trial, run_id="r")
    snapshot = snapshot_trial(study.trials()[0], 1)
    assert (snapshot.feasible, snapshot.pareto_rank, snapshot.run_id) == (True, 1, "r")
    assert snapshot.metrics == samples.result().metrics
    assert snapshot.predicted == {SIZE: 1.4}
    assert snapshot.excess == {v.metric: v.excess for v in samples.result().verdicts}
    assert snapshot.baseline == {m: v for m, v in samples.BASELINE.items() if m in snapshot.metrics}
    assert snapshot.intervals == {m.metric: (m.low, m.high) for m in measured}


def test_snapshot_survives_json(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    finish_next(study, samples.result())
    snapshot = take_snapshot(study, {"latency/decode_p50_ms": "ms"})
    assert StudySnapshot.from_json(snapshot.to_json()) == snapshot
    assert [trial.number for trial in snapshot.front] == [0]
