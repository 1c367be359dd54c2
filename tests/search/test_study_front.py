from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support import samples
from support.studies import (
    DECODE,
    FAILED,
    RATIO,
    SIZE,
    finish_next,
    open_study,
)

STOPPED = replace(samples.result(decode_ms=9.0), refused="quality")


def test_only_feasible_trials_are_ranked(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    good = finish_next(study, samples.result(decode_ms=0.5))
    finish_next(study, samples.result(decode_ms=0.1, ratio=9.0))
    finish_next(study, samples.result(failure=FAILED))
    finish_next(study, STOPPED)
    assert study.ranks() == {good.number: 1}
    assert study.front() == [good]
    assert [trial.state for trial in study.trials()] == ["finished", "finished", "failed", "stopped"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_objective_is_not_on_the_front(tmp_path: Path, value: float) -> None:
    result = samples.result()
    measurements = tuple(replace(m, value=value) if m.metric == DECODE else m for m in result.measurements)
    study = open_study(tmp_path, limits=())
    trial = finish_next(study, replace(result, measurements=measurements, verdicts=()))
    assert trial.state == "finished"
    assert study.ranks() == {}
    assert study.hypervolume_history() == [0.0]
    assert study.ask() is not None, "the search continues"


def test_maximized_objective_grows_upwards(tmp_path: Path) -> None:
    study = open_study(tmp_path, limits=(), objectives={SIZE: "minimize", DECODE: "maximize"})
    slow, fast = (finish_next(study, samples.result(decode_ms=ms)) for ms in (0.2, 0.8))
    assert study.ranks() == {slow.number: 2, fast.number: 1}
    first, second = study.hypervolume_history()
    assert 0 < first < second <= 1


def test_hypervolume_history_follows_the_order_of_ends(tmp_path: Path) -> None:
    first, second = open_study(tmp_path, worker="w1"), open_study(tmp_path, worker="w2")
    early, late = first.ask(), second.ask()
    assert early is not None
    assert late is not None
    second.finish(late, samples.result(decode_ms=0.9, ratio=1.1))
    first.finish(early, samples.result(failure=FAILED))
    finish_next(second, samples.result(decode_ms=0.2, ratio=1.0))
    volumes = first.hypervolume_history()
    assert 0 < volumes[0] == volumes[1] < volumes[2] <= 1


def test_later_trials_do_not_change_hypervolume_history(tmp_path: Path) -> None:
    study = open_study(tmp_path, limits=(), objectives={SIZE: "minimize", DECODE: "maximize", RATIO: "minimize"})
    previous: list[float] = []
    for ms, ratio in ((0.2, 1.0), (0.001, 50.0), (0.8, 0.2), (0.4, 0.0)):
        finish_next(study, samples.result(decode_ms=ms, ratio=ratio))
        volumes = study.hypervolume_history()
        assert volumes[:-1] == previous
        assert all(a <= b for a, b in itertools.pairwise(volumes))
        previous = volumes


def test_hypervolume_is_relative_to_the_limits(tmp_path: Path) -> None:
    study = open_study(tmp_path, objectives={DECODE: "minimize", RATIO: "minimize"})
    finish_next(study, samples.result(decode_ms=0.5, ratio=1.0))
    assert study.hypervolume_history() == pytest.approx([(1 - 0.5 / 1.04) * (1 - 1.0 / 1.15)])


def test_hypervolume_of_a_maximized_rate(tmp_path: Path) -> None:
    study = open_study(tmp_path, limits=(), objectives={DECODE: "maximize"})
    for rate in (0.2, 0.8):
        finish_next(study, samples.result(decode_ms=rate))
    assert study.hypervolume_history() == pytest.approx([1 - 1 / 2, 1 - 1 / 8])
