"""Build invented trials with the spread of a real sweep, and toy engines that generate text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeopt.core.artifact import Engine
from edgeopt.core.config_objects import to_config
from edgeopt.core.result import Failure, Measurement, TrialResult, Verdict
from edgeopt.core.study_snapshot import LimitSnapshot, ObjectiveSnapshot, StudySnapshot, TrialSnapshot
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from support import specs

OBJECTIVES = (
    ObjectiveSnapshot(metric="quality/perplexity_ratio", unit="", direction="minimize"),
    ObjectiveSnapshot(metric="latency/decode_p50_ms", unit="ms", direction="minimize"),
    ObjectiveSnapshot(metric="memory/peak_rss_mib", unit="MiB", direction="minimize"),
)
LIMITS = (
    LimitSnapshot(metric="quality/perplexity_ratio", text="at most 1.15", bound=1.15, unit=""),
    LimitSnapshot(metric="latency/decode_p50_ms", text="at most 0.8 x baseline", bound=1.04, unit="ms"),
    LimitSnapshot(metric="memory/peak_rss_mib", text="at most 90 MiB", bound=90.0, unit="MiB"),
)
BASELINE = {"quality/perplexity_ratio": 1.0, "latency/decode_p50_ms": 1.3, "memory/peak_rss_mib": 100.0}


def snapshot(
    trials: Sequence[TrialSnapshot] | None = None,
    *,
    study: str = "s",
    objectives: Sequence[ObjectiveSnapshot] = OBJECTIVES,
    limits: Sequence[LimitSnapshot] = LIMITS,
) -> StudySnapshot:
    """Return a study with invented trials, or with the given ones."""
    return StudySnapshot(
        study=study,
        objectives=tuple(objectives),
        limits=tuple(limits),
        trials=tuple(invented_trials() if trials is None else trials),
    )


def invented_trials(count: int = 28, seed: int = 3) -> list[TrialSnapshot]:
    """Return `count` trials with their Pareto ranks. The last trial failed."""
    draw, trials = random.Random(seed), []
    for number in range(count):
        bits, ratio, lora = draw.choice([4, 4, 8, 32]), draw.choice([0.0, 0.1, 0.2, 0.3, 0.4]), draw.random() < 0.6
        error = {4: 0.075, 8: 0.008, 32: 0.0}[bits] + ratio**2 * (0.6 if lora else 1.4)
        metrics = {
            "quality/perplexity_ratio": 1 + error * draw.uniform(0.8, 1.2),
            "latency/decode_p50_ms": ({4: 0.6, 8: 0.8, 32: 1.3}[bits] * (1 - 0.5 * ratio)) * draw.uniform(0.95, 1.1),
            "memory/peak_rss_mib": (60 + {4: 8, 8: 14, 32: 40}[bits] * (1 - 0.4 * ratio)) * draw.uniform(0.98, 1.03),
        }
        excess = {limit.metric: metrics[limit.metric] / (limit.bound or 1.0) - 1 for limit in LIMITS}
        trials.append(
            TrialSnapshot(
                number=number,
                state="finished",
                feasible=all(e <= 0 for e in excess.values()),
                pareto_rank=None,
                params={"step.quantize.bits": bits, "step.prune.ratio": ratio, "lora": lora},
                metrics=metrics,
                excess=excess,
            )
        )
    trials[-1] = replace(
        trials[-1],
        state="failed",
        feasible=False,
        metrics={},
        failure="build: BuildError: out of memory",
        excess={limit.metric: None for limit in LIMITS},
    )
    return ranked(trials)


def ranked(trials: Sequence[TrialSnapshot]) -> list[TrialSnapshot]:
    """Return the trials with the Pareto ranks of feasible trials; other trials have none."""
    ranks: dict[int, int] = {}
    rank, left = 1, [trial for trial in trials if trial.feasible]
    while left:
        front = [trial for trial in left if not any(_dominates(other, trial) for other in left)]
        ranks |= {trial.number: rank for trial in front}
        rank, left = rank + 1, [trial for trial in left if trial.number not in ranks]
    return [replace(trial, pareto_rank=ranks.get(trial.number)) for trial in trials]


def _dominates(a: TrialSnapshot, b: TrialSnapshot) -> bool:
    pairs = [(a.metrics[o.metric], b.metrics[o.metric]) for o in OBJECTIVES]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


WORDS = ("def", "f", "(", "x", ")", ":", "return", "+", "1", "if", "else", "for", "in", "range", "print", "<unk>")


def engine(folder: Path, *, seed: int = 0) -> Engine:
    """Build a toy engine of FakeRuntime: a bigram table over WORDS."""
    folder.mkdir(parents=True)
    table = np.random.default_rng(seed).standard_normal((len(WORDS), len(WORDS))).astype(np.float32)
    np.save(folder / "table.npy", table)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = specs.llama(vocabulary=len(WORDS), hidden=16, intermediate=64, heads=1, kv_heads=1, layers=1, context=64)
    made_by = {"runtime": to_config(FakeRuntime()), "versions": {}}
    return Engine.seal(folder, format=FakeRuntime.format, spec=spec, made_by=made_by)


def result(
    built: Engine | None = None,
    *,
    decode_ms: float = 0.7,
    ratio: float = 1.05,
    rss_mib: float = 70.0,
    failure: Failure | None = None,
    **more: Any,
) -> TrialResult:
    """Return the result of a trial. With the default values it satisfies LIMITS."""
    metrics = {
        "quality/perplexity_ratio": ratio,
        "latency/decode_p50_ms": decode_ms,
        "memory/peak_rss_mib": rss_mib,
        "size/engine_mib": 1.5,
    }
    unit = {limit.metric: limit.unit for limit in LIMITS} | {"size/engine_mib": "MiB"}
    measured = (
        ()
        if failure
        else tuple(
            Measurement(metric=m, unit=str(unit[m]), value=v, low=v, high=v, count=3, method="invented")
            for m, v in metrics.items()
        )
    )
    verdicts = () if failure else tuple(_verdict(limit, metrics) for limit in LIMITS)
    return TrialResult(
        recipe={"text": "prune_width → quantize", "digest": "d1ge57"},
        target="sbc_4gib",
        device={"name": "test machine"},
        emulated=True,
        measurements=measured,
        verdicts=verdicts,
        timings_s={"build": 1.5},
        failure=failure,
        engine=None if built is None else built.summary(),
        **more,
    )


def _verdict(limit: LimitSnapshot, metrics: dict[str, float]) -> Verdict:
    assert limit.bound is not None
    excess = metrics[limit.metric] / limit.bound - 1
    return Verdict(
        metric=limit.metric,
        limit=limit.text,
        bound=limit.bound,
        value=metrics[limit.metric],
        excess=excess,
        satisfied=excess <= 0,
        reason="" if excess <= 0 else "above",
    )


def trial(number: int, outcome: TrialResult, run_id: str | None, rank: int | None) -> TrialSnapshot:
    """Return the snapshot of a trial with this result."""
    return TrialSnapshot(
        number=number,
        state="failed" if outcome.failure else "finished",
        feasible=outcome.feasible,
        pareto_rank=rank,
        params={"bits": 4},
        metrics=outcome.metrics,
        predicted={m.metric: m.value for m in outcome.predictions},
        excess={v.metric: v.excess for v in outcome.verdicts},
        rung=outcome.refused,
        run_id=run_id,
        failure=f"{outcome.failure.stage}: {outcome.failure.message}" if outcome.failure else None,
    )
