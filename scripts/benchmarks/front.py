"""How soon a search finds a front that is known: edgeopt, and samplers without its means."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.baselines import evaluation_windows, olive_runs_here, olive_search
from benchmarks.common import EDGEOPT, table
from edgeopt.config import assemble
from edgeopt.config.assemble import Request
from edgeopt.core.config_objects import canonical_json
from edgeopt.models.reference import ReferenceModel
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.pareto.ranking import EVALUATED, Ranking, bounds
from edgeopt.search.storage.summary import Summary
from edgeopt.studies.open_study import OpenStudy

SEEDS = (0, 1, 2)
REPLAYED_SEEDS = range(12)
SWEEP = """
defaults: [config, _self_]
target: {threads: 1}  # how long threads wait for one another depends on where a host puts its virtual cores meanwhile
measure: {probes: {continuations: null, parity: null, energy: null}}
limits:
  size: {engine_mib: 2.95 MiB}
  memory: {peak_rss_mib: 0.9 x baseline}
  latency: {decode_p50_ms: 1 s}
  quality: {perplexity_ratio: 1.08}
search:
  _target_: edgeopt.search.space.definition.Search
  study: front
  objectives: {quality/perplexity: minimize, size/engine_mib: minimize}
  parameters:
    recipe: {choices: [int8, int4, prune_int4, prune_lora_int4]}
    step.quantize.block_size: {choices: [32, 64, 128]}
    rounding: {choices: [rtn, k_quant, gptq]}
    step.prune.ratio: {choices: [0.16, 0.25, 0.33], when: {recipe: [prune_int4, prune_lora_int4]}}
    step.lora.rank: {choices: [4, 16], when: {recipe: [prune_lora_int4]}}
    step.lora.tokens: {choices: [20480], when: {recipe: [prune_lora_int4]}}
  enqueue: []
  sampler: surrogate
  seed: 0
  spread: 4
  refine: 0.25
  trials: 20
promote: null
"""
OFF = ("measure.stop_early=false", "search.spread=0", "search.refine=0", "search.trials=1000")
"""Without estimate, rungs, spread and refinement."""


def study(folder: Path, *overrides: str) -> OpenStudy:
    """The study that `overrides` make, with its state in `folder`."""
    own = folder.parent / "configs"
    own.mkdir(parents=True, exist_ok=True)
    (own / "front.yaml").write_text(SWEEP)
    request = Request(name="front", overrides=(f"state='{folder}'", *overrides), config_dir=own)
    return OpenStudy.of(request, request.compose())


def sweep(folder: Path, *overrides: str) -> OpenStudy:
    """Run `edgeopt sweep` until it is over; exit 3 is a study in which nothing is feasible."""
    opened = study(folder / ".edgeopt", *overrides)
    own = ["--config-dir", str(folder / "configs"), "--config-name", "front"]
    done = subprocess.run([EDGEOPT, "sweep", *own, *overrides, "--json"], cwd=folder, stdout=subprocess.DEVNULL)
    assert done.returncode in (0, 3)
    return opened


class Truth:
    """Every recipe's figures and seconds, from the study that evaluated them all."""

    def __init__(self, opened: OpenStudy) -> None:
        found = opened.study
        standing = Ranking(objectives=found.objectives, limits=found.limits)
        self.opened, self.predict_trial = opened, partial(assemble.predict_trial, opened.request)
        self.rows = {canonical_json(row.params): row for row in found.rows() if row.summary is not None}
        self.seconds = {key: _from_scratch_s(row.summary) for key, row in self.rows.items() if row.summary}
        self.points = {key: point for key, row in self.rows.items() if (point := standing.point(row)) is not None}
        columns = list(zip(*self.points.values(), strict=True))
        self.reference = [max(c) + 0.1 * (max(c) - min(c)) for c in columns]
        self.whole = hypervolume(list(self.points.values()), self.reference)

    def share(self, keys: Sequence[str]) -> float:
        """Of the whole front's hypervolume, what these recipes have."""
        return hypervolume([self.points[key] for key in keys if key in self.points], self.reference) / self.whole

    def reached(self, order: Sequence[tuple[str, float]], share: float = 0.95) -> float:
        """Seconds after which recipes, each with the second at which it was over, have `share` of the hypervolume."""
        for count in range(1, len(order) + 1):
            if self.share([key for key, _ in order[:count]]) >= share:
                return order[count - 1][1]
        return float("inf")


def _from_scratch_s(summary: Summary) -> float:
    """What a trial takes without a cache; the baseline is measured once whoever searches."""
    saved = sum(seconds for stage, seconds in summary.saved_s.items() if not stage.startswith("baseline"))
    return summary.spent_s - summary.timings_s.get("baseline", 0.0) + saved


def latency_limit(opened: OpenStudy) -> str:
    """An override: a time of a token that about half of the recipes keep which keep the other limits.

    It is held against the worse ends of the intervals, as every limit is. It lies in the widest gap near the median, so
    that noise puts few on the wrong side, and no machine is too slow.
    """
    known = [row.summary for row in opened.study.rows() if row.summary is not None and row.summary.feasible]
    held = [summary.verdicts["latency/decode_p50_ms"] for summary in known]
    times = sorted((1 + h.excess) * h.bound for h in held if h.excess is not None and h.bound is not None)
    near = times[len(times) * 2 // 5 : len(times) * 7 // 10]
    below, above = max(pairwise(near), key=lambda pair: pair[1] / pair[0])
    return f"limits.latency.decode_p50_ms='{(below + above) / 2:.4f} ms'"


def replayed(folder: Path, truth: Truth, limit: str, sampler: str, seed: int) -> list[tuple[str, float]]:
    """What a sampler without edgeopt's means would evaluate, by the grid's own figures and seconds."""
    opened = study(folder / ".edgeopt", *OFF, limit, f"search.sampler={sampler}", f"search.seed={seed}")
    found, passed_s, order = opened.study, 0.0, []
    found.worker = "replay"
    opened.open()
    while (row := found.ask()) is not None:
        key = canonical_json(row.params)
        known = truth.rows[key].summary
        assert known is not None
        found.ledger.finish(row, truth.rows[key].state, known, {})
        passed_s += truth.seconds[key]
        order.append((key, passed_s))
    return order


def front(folder: Path) -> None:
    """Seconds to 95 % of a known hypervolume under four hard limits: edgeopt, and samplers without its means.

    All seconds are those of a command, from its start. edgeopt's commands are run; of the others the trials are taken
    from the grid, after a start and a baseline as edgeopt's commands have them.
    """
    begun = time.perf_counter()
    grid = (*OFF, "search.sampler=random")
    limit = latency_limit(sweep(folder / "grid", *grid))
    cached_s = time.perf_counter() - begun
    print(f"limit: {limit}", flush=True)
    truth = Truth(sweep(folder / "grid", *grid, "search.study=judged", limit))
    own = [_own(folder / f"own-{seed}", truth, limit, f"search.seed={seed}") for seed in SEEDS]
    start_s = statistics.median(run.start_s for run in own)
    grid_s = start_s + sum(truth.seconds.values())
    print(f"grid: {len(truth.rows)} recipes, {grid_s:.0f} s from scratch ({cached_s:.0f} s with the cache), ", end="")
    print(f"{len(truth.points)} keep every limit; {start_s:.0f} s are start and baseline\n", flush=True)
    refusals(truth)
    runs = {"edgeopt": own}
    for sampler in ("tpe", "nsga2", "random"):
        runs[f"{sampler}, without"] = [
            Run.of(truth, replayed(folder / f"{sampler}-{seed}", truth, limit, sampler, seed), start_s)
            for seed in REPLAYED_SEEDS
        ]
    rows = []
    for name, found in runs.items():
        reached = statistics.median(run.reached_s for run in found)
        ends = sorted(run.reached_s for run in found)
        trials = statistics.median(run.trials for run in found)
        rows.append([name, reached, reached / grid_s, trials, f"{ends[0]:.0f} … {ends[-1]:.0f}", len(found)])
    table(["search", "s to 95 %", "of the grid's time", "trials until then", "s, fewest … most", "seeds"], rows)
    print(f"edgeopt takes {rows[0][1] / rows[1][1]:.2f} of TPE's time\n")
    if olive_runs_here():
        olive(folder, truth)


def olive(folder: Path, truth: Truth) -> None:
    """Olive's own search on what of the space it knows: rounding in 4 bits. Limits that it cannot measure are kept."""
    quantized = [key for key, row in truth.rows.items() if row.params["recipe"] in ("int8", "int4")]
    print(f"rounding alone, all {len(quantized)} recipes: {truth.share(quantized):.3f} of the hypervolume")
    model = ReferenceModel().locate()
    bounds = {x.metric: x.absolute or 0.0 for x in truth.opened.study.limits}
    whole = [r.summary for r in truth.rows.values() if r.summary is not None]
    original = whole[0].metrics["quality/perplexity"] / whole[0].metrics["quality/perplexity_ratio"]
    for seed in SEEDS:
        own = folder / f"olive-{seed}"
        own.mkdir()
        found = olive_search(model, own, evaluation_windows(model, ()), seed)
        kept = [
            [f["perplexity"], f["mib"]]
            for f in found
            if f["mib"] <= bounds["size/engine_mib"]
            and f["perplexity"] <= original * bounds["quality/perplexity_ratio"]
        ]
        share = hypervolume(kept, truth.reference) / truth.whole
        different = {(f["perplexity"], f["mib"]) for f in found}
        print(
            f"Olive, seed {seed}: {len(found)} engines in {found[-1]['at']:.0f} s, {len(different)} different, ", end=""
        )
        print(f"the smallest {min(f['mib'] for f in found):.3f} MiB; {share:.3f} of the hypervolume")
    print()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A search: seconds until 95 %, how many trials were over by then, and the seconds of start and baseline."""

    reached_s: float
    trials: int
    start_s: float

    @classmethod
    def of(cls, truth: Truth, order: Sequence[tuple[str, float]], start_s: float) -> Run:
        """Of trials in order, each with the second after the start at which it was over."""
        reached = truth.reached(order)
        return cls(reached_s=start_s + reached, trials=sum(1 for _, s in order if s <= reached), start_s=start_s)


def _own(folder: Path, truth: Truth, *overrides: str) -> Run:
    begun = time.perf_counter()
    opened = sweep(folder, *overrides)
    ended_s = time.time()
    started_s = ended_s - (time.perf_counter() - begun)
    over = [row for row in opened.study.rows() if row.ended_s and row.summary and row.state in EVALUATED]
    over.sort(key=lambda row: row.ended_s or 0.0)
    first = over[0].summary
    assert first is not None
    baseline_s = first.timings_s["baseline"]
    start_s = (over[0].ended_s or 0.0) - started_s - first.spent_s + baseline_s
    order = [(canonical_json(row.params), (row.ended_s or 0.0) - started_s - start_s) for row in over]
    run = Run.of(truth, order, start_s)
    print(f"edgeopt: {run.reached_s:.0f} s, {run.trials} trials; {ended_s - started_s:.0f} s in all", flush=True)
    return run


def refusals(truth: Truth) -> None:
    """Of the recipes that break size or memory, how many the estimate refuses; and of those that keep all, how many."""
    limits, known, predict_trial = truth.opened.study.limits, bounds(truth.rows.values()), truth.predict_trial
    broken = refused = wrongly = kept = 0
    for row in truth.rows.values():
        assert row.summary is not None
        over = {m for m, h in row.summary.verdicts.items() if h.excess is not None and h.excess > 0}
        is_refused = predict_trial(row.params).refused(limits, known) is not None
        if over & {"size/engine_mib", "memory/peak_rss_mib"}:
            broken, refused = broken + 1, refused + is_refused
        elif row.summary.feasible:
            kept, wrongly = kept + 1, wrongly + is_refused
    print(f"refused at once: {refused} of {broken} that break size or memory, {wrongly} of {kept} that keep all\n")
