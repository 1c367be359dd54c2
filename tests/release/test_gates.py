"""Test that each gate refuses a candidate with one defect and passes one without."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import samples

from edgeopt.core import config_objects
from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate, Gate, RecordedTrial
from edgeopt.release.gates.champion import NotWorse
from edgeopt.release.gates.limits import LimitsKept, Within
from edgeopt.release.gates.lint import LintClean
from edgeopt.release.gates.metrics import RequiredMetrics
from edgeopt.release.gates.remeasured import Remeasured

DECODE, RATIO, RSS = "latency/decode_p50_ms", "quality/perplexity_ratio", "memory/peak_rss_mib"
ENERGY = "energy/measured/cpu_j_per_token"
DAY_S = 86_400.0


def measurement(metric: str, value: float, spread: float = 0.0, **overrides: Any) -> Measurement:
    defaults = {"unit": "", "count": 5, "method": "fake", "low": value - spread, "high": value + spread}
    return Measurement(metric=metric, value=value, **(defaults | overrides))


def recorded_trial(
    *measurements: Measurement, ended_s: float | None = None, run_id: str = "r", **run_tags: str
) -> RecordedTrial:
    defaults = {tags.DEVICE: "board", tags.EMULATED: "false"}
    return RecordedTrial(
        run_id=run_id,
        run_tags=defaults | run_tags,
        ended_s=time.time() if ended_s is None else ended_s,
        result=replace(samples.result(), measurements=measurements),
    )


def candidate(trial: RecordedTrial, **overrides: Any) -> Candidate:
    measurements = trial.result.measurements if trial.result is not None else ()
    snapshot = replace(
        samples.trial(0, samples.result(), trial.run_id, 1), metrics={m.metric: m.value for m in measurements}
    )
    defaults = {
        "snapshot": snapshot,
        "limits": samples.LIMITS,
        "model_id": "m",
        "model_folder": None,
        "missing_reason": "not fetched",
    }
    return Candidate(trial=trial, **(defaults | overrides))


MEASUREMENTS = (
    measurement(DECODE, 0.7, 0.05),
    measurement(RATIO, 1.05, 0.01),
    measurement(RSS, 70.0),
    measurement(ENERGY, 0.1),
)
STRICT_METRICS = RequiredMetrics(metrics=(DECODE, ENERGY), count=3, device="board", emulated=False, max_age_days=30)
CHAMPION = recorded_trial(measurement(DECODE, 0.7, 0.05), measurement(RATIO, 1.05, 0.01), run_id="c")
NOT_WORSE = NotWorse(metrics={RATIO: "minimize"}, better={DECODE: "minimize"})


def challenger(decode: Measurement, ratio: Measurement) -> Candidate:
    return candidate(recorded_trial(decode, ratio), aliases=("champion",), champion=CHAMPION)


REMEASURED = Remeasured(metrics={DECODE: "minimize"}, tolerance=0.1)


class CandidateWithEngine(Candidate):
    """A candidate whose engine can be opened."""

    __slots__ = ()

    def engine(self) -> Any:
        return "the engine"


def remeasured_candidate(measurement: Measurement | None) -> Candidate:
    """Return a future champion whose new measurement is `measurement`; None if nothing can measure it."""
    base = candidate(recorded_trial(*MEASUREMENTS), aliases=("champion",))
    fields = {name: getattr(base, name) for name in Candidate.__slots__}
    if measurement is not None:
        fields["remeasure"] = lambda engine, metrics: (measurement,)
    return CandidateWithEngine(**fields)


def candidate_without(metric: str, *added: Measurement) -> Candidate:
    return candidate(recorded_trial(*(m for m in MEASUREMENTS if m.metric != metric), *added))


REFUSALS: dict[str, tuple[Gate, Candidate, str]] = {
    "metric is missing": (STRICT_METRICS, candidate_without(DECODE), f"{DECODE} was not measured"),
    "run has no result": (
        STRICT_METRICS,
        candidate(replace(recorded_trial(), result=None)),
        f"{DECODE} was not measured",
    ),
    "energy is only estimated": (
        STRICT_METRICS,
        candidate_without(ENERGY, measurement("energy/estimated/cpu_j_per_token", 0.1)),
        f"{ENERGY} was not measured, only estimated",
    ),
    "metric named measured is an estimate": (
        STRICT_METRICS,
        candidate_without(ENERGY, measurement(ENERGY, 0.1, kind="estimated")),
        f"{ENERGY} is estimated, not measured",
    ),
    "too few samples": (
        STRICT_METRICS,
        candidate_without(DECODE, measurement(DECODE, 0.7, count=2)),
        "has 2 samples, the minimum is 3",
    ),
    "disturbed measurement": (
        STRICT_METRICS,
        candidate_without(DECODE, measurement(DECODE, 0.7, noisy=True)),
        "was disturbed",
    ),
    "old measurement": (
        STRICT_METRICS,
        candidate(recorded_trial(*MEASUREMENTS, ended_s=time.time() - 40 * DAY_S)),
        "measured 40 days ago, the maximum is 30",
    ),
    "run did not end": (STRICT_METRICS, candidate(recorded_trial(*MEASUREMENTS, ended_s=0.0)), "days ago"),
    "other device": (
        STRICT_METRICS,
        candidate(recorded_trial(*MEASUREMENTS, **{tags.DEVICE: "laptop"})),
        "measured on laptop, but the policy requires board",
    ),
    "emulated device": (
        STRICT_METRICS,
        candidate(recorded_trial(*MEASUREMENTS, **{tags.EMULATED: "true"})),
        "another kind of machine",
    ),
    "limit of the study exceeded": (
        LimitsKept(),
        candidate(recorded_trial(*MEASUREMENTS), snapshot=samples.trial(0, samples.result(decode_ms=5.0), "r", None)),
        f"{DECODE} is 380.8% beyond its limit",
    ),
    "limit of the policy exceeded": (
        Within(limits={RSS: "64 MiB"}),
        candidate_without(RSS, measurement(RSS, 70.0, unit="MiB")),
        f"{RSS} is 70 MiB, but must be at most 64 MiB",
    ),
    "interval exceeds a limit": (
        Within(limits={DECODE: "0.72 ms"}),
        candidate_without(DECODE, measurement(DECODE, 0.7, 0.05, unit="ms")),
        "0.7 ms (0.65 to 0.75)",
    ),
    "lower limit not reached": (
        Within(limits={"tasks/accuracy": "at least 0.6"}),
        candidate(recorded_trial(measurement("tasks/accuracy", 0.62, 0.05))),
        "0.62 (0.57 to 0.67), but must be at least 0.6",
    ),
    "limit on a missing metric": (Within(limits={"x": "1"}), candidate(recorded_trial()), "x was not measured"),
    "worse than the champion's interval": (
        NOT_WORSE,
        challenger(measurement(DECODE, 0.5, 0.05), measurement(RATIO, 1.07, 0.02)),
        f"{RATIO} is 1.07, the champion has 1.04 to 1.06",
    ),
    "interval overlaps the champion's": (
        NOT_WORSE,
        challenger(measurement(DECODE, 0.62, 0.05), measurement(RATIO, 1.05)),
        f"{DECODE} is 0.57 to 0.67, not better than the champion's 0.65 to 0.75",
    ),
    "champion lacks the metric": (
        NotWorse(metrics={RSS: "minimize"}),
        challenger(measurement(DECODE, 0.5), measurement(RATIO, 1.0)),
        f"{RSS} was not measured for this trial",
    ),
    "nothing can measure again": (REMEASURED, remeasured_candidate(None), "this command cannot measure engines"),
    "slower than in its trial": (
        REMEASURED,
        remeasured_candidate(measurement(DECODE, 0.9, 0.05)),
        f"{DECODE} is 0.85 to 0.95 now, it was 0.65 to 0.75",
    ),
    "new measurement disturbed": (
        REMEASURED,
        remeasured_candidate(measurement(DECODE, 0.7, noisy=True)),
        "was disturbed",
    ),
    "not measured again": (REMEASURED, remeasured_candidate(measurement(RSS, 70.0)), f"{DECODE} was not measured now"),
    "new measurement exceeds a limit": (
        Remeasured(metrics={DECODE: "minimize"}, tolerance=9.0),
        remeasured_candidate(measurement(DECODE, 3.0, 0.05)),
        f"{DECODE} is 3 now (at least 2.95), beyond its limit",
    ),
    "no engine to lint": (
        LintClean(),
        candidate(recorded_trial(*MEASUREMENTS)),
        "the engine cannot be linted: not fetched",
    ),
}


@pytest.mark.parametrize("defect", REFUSALS)
def test_gate_refuses_with_evidence(defect: str) -> None:
    gate, defective, evidence = REFUSALS[defect]
    verdict = gate.check(defective)
    assert not verdict.passed
    assert evidence in verdict.evidence


PASSES: dict[str, tuple[Gate, Candidate]] = {
    "all conditions satisfied": (STRICT_METRICS, candidate(recorded_trial(*MEASUREMENTS))),
    "estimate is accepted": (
        RequiredMetrics(metrics=(ENERGY,), estimated=True),
        candidate_without(ENERGY, measurement(ENERGY, 0.1, kind="estimated")),
    ),
    "limits of the study": (LimitsKept(), candidate(recorded_trial(*MEASUREMENTS))),
    "limits of the policy": (
        Within(limits={DECODE: "0.75 ms"}),
        candidate_without(DECODE, measurement(DECODE, 0.7, 0.05, unit="ms")),
    ),
    "as fast as in its trial": (REMEASURED, remeasured_candidate(measurement(DECODE, 0.75, 0.02))),
    "faster than in its trial": (REMEASURED, remeasured_candidate(measurement(DECODE, 0.1, 0.02))),
    "gets no alias": (REMEASURED, replace(remeasured_candidate(None), aliases=())),
    "better than the champion": (NOT_WORSE, challenger(measurement(DECODE, 0.5, 0.05), measurement(RATIO, 1.06, 0.02))),
    "does not become champion": (
        NOT_WORSE,
        replace(challenger(measurement(DECODE, 9.0), measurement(RATIO, 9.0)), aliases=("smallest",)),
    ),
    "first champion": (
        NOT_WORSE,
        replace(challenger(measurement(DECODE, 9.0), measurement(RATIO, 9.0)), champion=None),
    ),
    "metrics to maximize": (
        NotWorse(metrics={DECODE: "maximize"}, better={RATIO: "maximize"}),
        challenger(measurement(DECODE, 0.66), measurement(RATIO, 1.1, 0.01)),
    ),
}


@pytest.mark.parametrize("case", PASSES)
def test_gate_passes(case: str) -> None:
    gate, passing = PASSES[case]
    verdict = gate.check(passing)
    assert verdict.passed, verdict.evidence
    assert verdict.evidence


@pytest.mark.parametrize(
    "create_gate",
    [
        lambda: RequiredMetrics(metrics=()),
        lambda: RequiredMetrics(metrics=("x",), count=0),
        lambda: RequiredMetrics(metrics=("x",), max_age_days=0),
        lambda: Within(limits={}),
        lambda: Within(limits={"x": "0.5 x baseline"}),
        lambda: NotWorse(metrics={}),
        lambda: Remeasured(metrics={}),
        lambda: Remeasured(metrics={DECODE: "minimize"}, tolerance=-1.0),
    ],
)
def test_gate_without_condition_is_rejected(create_gate: Callable[[], Gate]) -> None:
    with pytest.raises(ConfigError):
        create_gate()


def readme_gates() -> list[Gate]:
    """Load the gates of the example policy in registry/README.md."""
    text = (Path(__file__).parents[2] / "registry" / "README.md").read_text()
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "gates:" in block)
    return [config_objects.instantiate(entry) for entry in yaml.safe_load(example)["gates"]]


def test_readme_gates_load() -> None:
    assert [type(gate) for gate in readme_gates()] == [RequiredMetrics, Within, NotWorse, LintClean, Remeasured]


@pytest.mark.parametrize(("parity_error", "passed"), [(0.049, True), (0.051, False)])
def test_limit_gate_accepts_bare_number(parity_error: float, passed: bool) -> None:
    [gate] = [gate for gate in readme_gates() if isinstance(gate, Within)]
    assert gate.limits["quality/parity_error"] == 0.05
    measured = candidate(
        recorded_trial(measurement("quality/parity_error", parity_error), measurement(RSS, 500.0, unit="MiB"))
    )
    assert gate.check(measured).passed == passed


def test_limit_gate_requires_unit_for_bytes() -> None:
    gate = config_objects.instantiate(
        {"_target_": "edgeopt.release.gates.limits.Within", "limits": {RSS: 512}}, location="gates[0]"
    )
    verdict = gate.check(candidate(recorded_trial(measurement(RSS, 500.0, unit="MiB"))))
    assert not verdict.passed
    assert "must have a unit" in verdict.evidence
