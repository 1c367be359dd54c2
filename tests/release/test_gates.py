"""Each gate, asked about one candidate with one defect."""

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
from edgeopt.release.candidate import Candidate, Gate, Trial
from edgeopt.release.gates.champion import NotWorse
from edgeopt.release.gates.limits import LimitsKept, Within
from edgeopt.release.gates.lint import LintClean
from edgeopt.release.gates.metrics import RequiredMetrics
from edgeopt.release.gates.remeasured import Remeasured

DECODE, RATIO, RSS = "latency/decode_p50_ms", "quality/perplexity_ratio", "memory/peak_rss_mib"
ENERGY = "energy/measured/cpu_j_per_token"
DAY_S = 86_400.0

Change = Callable[[Measurement], Measurement]


def figure(metric: str, value: float, spread: float = 0.0, **more: Any) -> Measurement:
    known = {"unit": "", "count": 5, "method": "invented", "low": value - spread, "high": value + spread}
    return Measurement(metric=metric, value=value, **(known | more))


def trial(*figures: Measurement, ended_s: float | None = None, run_id: str = "r", **tagged: str) -> Trial:
    known = {tags.DEVICE: "board", tags.EMULATED: "false"}
    return Trial(
        run_id=run_id,
        run_tags=known | tagged,
        ended_s=time.time() if ended_s is None else ended_s,
        result=replace(samples.result(), measurements=figures),
    )


def member(given: Trial, **more: Any) -> Candidate:
    found = given.result.measurements if given.result is not None else ()
    snapshot = replace(samples.trial(0, samples.result(), given.run_id, 1), metrics={m.metric: m.value for m in found})
    known = {"snapshot": snapshot, "limits": samples.LIMITS, "model_id": "m", "folder": None, "missing": "not fetched"}
    return Candidate(trial=given, **(known | more))


USUAL = (figure(DECODE, 0.7, 0.05), figure(RATIO, 1.05, 0.01), figure(RSS, 70.0), figure(ENERGY, 0.1))
STRICT = RequiredMetrics(metrics=(DECODE, ENERGY), count=3, device="board", emulated=False, max_age_days=30)
CHAMPION = trial(figure(DECODE, 0.7, 0.05), figure(RATIO, 1.05, 0.01), run_id="c")
BETTER = NotWorse(metrics={RATIO: "minimize"}, better={DECODE: "minimize"})


def challenger(decode: Measurement, ratio: Measurement) -> Candidate:
    return member(trial(decode, ratio), aliases=("champion",), champion=CHAMPION)


ANEW = Remeasured(metrics={DECODE: "minimize"}, tolerance=0.1)


class Whole(Candidate):
    """A member whose engine is there."""

    __slots__ = ()

    def engine(self) -> Any:
        return "the engine"


def there(figure: Measurement | None) -> Candidate:
    """A member that would be champion, with what measuring it anew says; None where nothing can measure."""
    bare = member(trial(*USUAL), aliases=("champion",))
    known = {name: getattr(bare, name) for name in Candidate.__slots__}
    if figure is not None:
        known["remeasure"] = lambda engine, metrics: (figure,)
    return Whole(**known)


def without(metric: str, *instead: Measurement) -> Candidate:
    return member(trial(*(m for m in USUAL if m.metric != metric), *instead))


REFUSED: dict[str, tuple[Gate, Candidate, str]] = {
    "a metric is missing": (STRICT, without(DECODE), f"{DECODE} was not measured"),
    "the run holds no result": (STRICT, member(replace(trial(), result=None)), f"{DECODE} was not measured"),
    "energy is only estimated": (
        STRICT,
        without(ENERGY, figure("energy/estimated/cpu_j_per_token", 0.1)),
        f"{ENERGY} was not measured, only estimated",
    ),
    "a figure is called measured and was not": (
        STRICT,
        without(ENERGY, figure(ENERGY, 0.1, kind="estimated")),
        f"{ENERGY} is estimated, not measured",
    ),
    "too few samples": (STRICT, without(DECODE, figure(DECODE, 0.7, count=2)), "has 2 samples, asked for are 3"),
    "a disturbed figure": (STRICT, without(DECODE, figure(DECODE, 0.7, noisy=True)), "was disturbed"),
    "a stale measurement": (
        STRICT,
        member(trial(*USUAL, ended_s=time.time() - 40 * DAY_S)),
        "measured 40 days ago, allowed are 30",
    ),
    "a run that never ended": (STRICT, member(trial(*USUAL, ended_s=0.0)), "days ago"),
    "the wrong device": (
        STRICT,
        member(trial(*USUAL, **{tags.DEVICE: "laptop"})),
        "measured on laptop, asked for is board",
    ),
    "an emulated device": (STRICT, member(trial(*USUAL, **{tags.EMULATED: "true"})), "another kind of machine"),
    "a limit of the study is broken": (
        LimitsKept(),
        member(trial(*USUAL), snapshot=samples.trial(0, samples.result(decode_ms=5.0), "r", None)),
        f"{DECODE} is 380.8% beyond its limit",
    ),
    "a limit of the policy is broken": (
        Within(limits={RSS: "64 MiB"}),
        without(RSS, figure(RSS, 70.0, unit="MiB")),
        f"{RSS} is 70 MiB (70 to 70), allowed is at most 64 MiB",
    ),
    "an interval reaches beyond a limit": (
        Within(limits={DECODE: "0.72 ms"}),
        without(DECODE, figure(DECODE, 0.7, 0.05, unit="ms")),
        "0.7 ms (0.65 to 0.75)",
    ),
    "a limit from below is broken": (
        Within(limits={"tasks/accuracy": "at least 0.6"}),
        member(trial(figure("tasks/accuracy", 0.62, 0.05))),
        "0.62 (0.57 to 0.67), allowed is at least 0.6",
    ),
    "a limit on what was not measured": (Within(limits={"x": "1"}), member(trial()), "x was not measured"),
    "worse than the champion beyond its interval": (
        BETTER,
        challenger(figure(DECODE, 0.5, 0.05), figure(RATIO, 1.07, 0.02)),
        f"{RATIO} is 1.07, the champion has 1.04 to 1.06",
    ),
    "not surely better than the champion": (
        BETTER,
        challenger(figure(DECODE, 0.62, 0.05), figure(RATIO, 1.05)),
        f"{DECODE} is 0.57 to 0.67, not better than the champion's 0.65 to 0.75",
    ),
    "not to be compared with the champion": (
        NotWorse(metrics={RSS: "minimize"}),
        challenger(figure(DECODE, 0.5), figure(RATIO, 1.0)),
        f"{RSS} was not measured of this trial",
    ),
    "nothing can measure it anew": (ANEW, there(None), "nothing here can measure it"),
    "slower than its trial said": (
        ANEW,
        there(figure(DECODE, 0.9, 0.05)),
        f"{DECODE} is 0.85 to 0.95 now, it was 0.65 to 0.75",
    ),
    "measured anew and disturbed": (ANEW, there(figure(DECODE, 0.7, noisy=True)), "was disturbed"),
    "not measured anew": (ANEW, there(figure(RSS, 70.0)), f"{DECODE} was not measured now"),
    "beyond a limit of the study here": (
        Remeasured(metrics={DECODE: "minimize"}, tolerance=9.0),
        there(figure(DECODE, 3.0, 0.05)),
        f"{DECODE} is 3 now, beyond its limit",
    ),
    "no engine to lint": (LintClean(), member(trial(*USUAL)), "it cannot be linted: not fetched"),
}


@pytest.mark.parametrize("defect", REFUSED)
def test_a_single_defect_is_refused_with_its_own_words(defect: str) -> None:
    gate, candidate, message = REFUSED[defect]
    verdict = gate.check(candidate)
    assert not verdict.passed
    assert message in verdict.evidence


PASSED: dict[str, tuple[Gate, Candidate]] = {
    "all that is asked for": (STRICT, member(trial(*USUAL))),
    "an estimate where it is allowed": (
        RequiredMetrics(metrics=(ENERGY,), estimated=True),
        without(ENERGY, figure(ENERGY, 0.1, kind="estimated")),
    ),
    "limits of the study": (LimitsKept(), member(trial(*USUAL))),
    "limits of the policy": (Within(limits={DECODE: "0.75 ms"}), without(DECODE, figure(DECODE, 0.7, 0.05, unit="ms"))),
    "as fast as its trial said": (ANEW, there(figure(DECODE, 0.75, 0.02))),
    "faster than its trial said": (ANEW, there(figure(DECODE, 0.1, 0.02))),
    "no alias would point at it": (ANEW, replace(there(None), aliases=())),
    "a better challenger": (BETTER, challenger(figure(DECODE, 0.5, 0.05), figure(RATIO, 1.06, 0.02))),
    "not to be champion": (BETTER, replace(challenger(figure(DECODE, 9.0), figure(RATIO, 9.0)), aliases=("smallest",))),
    "the first champion": (BETTER, replace(challenger(figure(DECODE, 9.0), figure(RATIO, 9.0)), champion=None)),
    "more is better": (
        NotWorse(metrics={DECODE: "maximize"}, better={RATIO: "maximize"}),
        challenger(figure(DECODE, 0.66), figure(RATIO, 1.1, 0.01)),
    ),
}


@pytest.mark.parametrize("case", PASSED)
def test_what_is_as_it_should_be_passes(case: str) -> None:
    gate, candidate = PASSED[case]
    verdict = gate.check(candidate)
    assert verdict.passed, verdict.evidence
    assert verdict.evidence


@pytest.mark.parametrize(
    "wrong",
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
def test_a_gate_that_asks_for_nothing_is_no_gate(wrong: Callable[[], Gate]) -> None:
    with pytest.raises(ConfigError):
        wrong()


def readme_gates() -> list[Gate]:
    """Load the gates of the example policy in registry/README.md."""
    text = (Path(__file__).parents[2] / "registry" / "README.md").read_text()
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "gates:" in block)
    return [config_objects.instantiate(entry) for entry in yaml.safe_load(example)["gates"]]


def test_readme_gates_load() -> None:
    assert [type(gate) for gate in readme_gates()] == [RequiredMetrics, Within, NotWorse, LintClean, Remeasured]


@pytest.mark.parametrize(("parity_error", "passed"), [(0.0009, True), (0.0011, False)])
def test_limit_gate_accepts_bare_number(parity_error: float, passed: bool) -> None:
    [gate] = [gate for gate in readme_gates() if isinstance(gate, Within)]
    assert gate.limits["quality/parity_error"] == 0.001
    candidate = member(trial(figure("quality/parity_error", parity_error), figure(RSS, 500.0, unit="MiB")))
    assert gate.check(candidate).passed == passed


def test_limit_gate_requires_unit_for_bytes() -> None:
    gate = config_objects.instantiate(
        {"_target_": "edgeopt.release.gates.limits.Within", "limits": {RSS: 512}}, location="gates[0]"
    )
    verdict = gate.check(member(trial(figure(RSS, 500.0, unit="MiB"))))
    assert not verdict.passed
    assert "must have a unit" in verdict.evidence
