"""Benchmark the time until a search finds a known front: edgeopt, and plain samplers."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.baselines import evaluation_windows, has_olive, run_olive_search
from benchmarks.common import EDGEOPT, print_table
from edgeopt.config import prediction
from edgeopt.config.assemble import Request
from edgeopt.core.config_objects import canonical_json
from edgeopt.models.reference import ReferenceModel
from edgeopt.search.pareto.hypervolume import hypervolume
from edgeopt.search.pareto.ranking import Ranking, limit_bounds
from edgeopt.search.storage.trial import EVALUATED_STATES
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.studies.open_study import OpenStudy

SEEDS = (0, 1, 2)
REPLAYED_SEEDS = range(12)
SWEEP = """
defaults: [config, _self_]
target: {threads: 1}  # the synchronization of threads depends on the host's placement of virtual cores
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
PLAIN = ("measure.stop_early=false", "search.spread=0", "search.refine=0", "search.trials=1000")
"""Overrides without prediction, early stopping, spread and refinement."""


def create_study(folder: Path, *overrides: str) -> OpenStudy:
    """Return the study of `overrides`, with its state in `folder`."""
    configs = folder.parent / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    (configs / "front.yaml").write_text(SWEEP)
    request = Request(name="front", overrides=(f"state='{folder}'", *overrides), config_dir=configs)
    return OpenStudy.from_config(request, request.compose())


def sweep(folder: Path, *overrides: str) -> OpenStudy:
    """Run `edgeopt sweep` to its end. It exits with 3 if no trial is feasible."""
    opened = create_study(folder / ".edgeopt", *overrides)
    config = ["--config-dir", str(folder / "configs"), "--config-name", "front"]
    process = subprocess.run([EDGEOPT, "sweep", *config, *overrides, "--json"], cwd=folder, stdout=subprocess.DEVNULL)
    assert process.returncode in (0, 3)
    return opened


class GridResults:
    """Metrics and evaluation time of every recipe, from a study that evaluated them all."""

    def __init__(self, opened: OpenStudy) -> None:
        study = opened.study
        ranking = Ranking(objectives=study.objectives, limits=study.limits)
        self.opened, self.predict_trial = opened, partial(prediction.predict_trial, opened.request)
        self.rows = {canonical_json(row.params): row for row in study.trials() if row.summary is not None}
        self.seconds = {key: _from_scratch_s(row.summary) for key, row in self.rows.items() if row.summary}
        self.points = {key: point for key, row in self.rows.items() if (point := ranking.point(row)) is not None}
        columns = list(zip(*self.points.values(), strict=True))
        self.reference = [max(c) + 0.1 * (max(c) - min(c)) for c in columns]
        self.hypervolume = hypervolume(list(self.points.values()), self.reference)

    def relative_hypervolume(self, keys: Sequence[str]) -> float:
        """Return the hypervolume of these recipes relative to that of the front."""
        return hypervolume([self.points[key] for key in keys if key in self.points], self.reference) / self.hypervolume

    def time_to(self, order: Sequence[tuple[str, float]], share: float = 0.95) -> float:
        """Return the seconds until the recipes reach `share` of the hypervolume; infinity if they never do.

        Args:
            order: recipes in the order of their evaluation, with the second at which each ended.
        """
        for count in range(1, len(order) + 1):
            if self.relative_hypervolume([key for key, _ in order[:count]]) >= share:
                return order[count - 1][1]
        return float("inf")


def _from_scratch_s(summary: TrialSummary) -> float:
    """Return the seconds of a trial without a cache and without the baseline, which every search measures once."""
    saved = sum(seconds for stage, seconds in summary.saved_s.items() if not stage.startswith("baseline"))
    return summary.spent_s - summary.timings_s.get("baseline", 0.0) + saved


def latency_limit(opened: OpenStudy) -> str:
    """Return an override with a latency limit that about half of the otherwise feasible recipes satisfy.

    As for every limit, the worse end of an interval counts. The limit is in the widest gap near the median, so that
    noise misclassifies few recipes, and so that it suits every machine.
    """
    feasible = [row.summary for row in opened.study.trials() if row.summary is not None and row.summary.feasible]
    verdicts = [summary.verdicts["latency/decode_p50_ms"] for summary in feasible]
    times = sorted((1 + h.excess) * h.bound for h in verdicts if h.excess is not None and h.bound is not None)
    near = times[len(times) * 2 // 5 : len(times) * 7 // 10]
    below, above = max(pairwise(near), key=lambda pair: pair[1] / pair[0])
    return f"limits.latency.decode_p50_ms='{(below + above) / 2:.4f} ms'"


def replay(folder: Path, results: GridResults, limit: str, sampler: str, seed: int) -> list[tuple[str, float]]:
    """Run a plain sampler on the results of the grid. Return its recipes with the seconds at which they would end."""
    opened = create_study(folder / ".edgeopt", *PLAIN, limit, f"search.sampler={sampler}", f"search.seed={seed}")
    replayed, elapsed_s, order = opened.study, 0.0, []
    replayed.worker = "replay"
    opened.open()
    while (row := replayed.ask()) is not None:
        key = canonical_json(row.params)
        summary = results.rows[key].summary
        assert summary is not None
        replayed.storage.finish(row, results.rows[key].state, summary, {})
        elapsed_s += results.seconds[key]
        order.append((key, elapsed_s))
    return order


def front(folder: Path) -> None:
    """Seconds to 95 % of a known hypervolume under four hard limits: edgeopt, and plain samplers.

    All times are those of a command, from its start. edgeopt's commands are run. The other samplers take the results of
    their trials from the grid, after the same start and baseline.
    """
    start = time.perf_counter()
    grid = (*PLAIN, "search.sampler=random")
    limit = latency_limit(sweep(folder / "grid", *grid))
    cached_s = time.perf_counter() - start
    print(f"limit: {limit}", flush=True)
    results = GridResults(sweep(folder / "grid", *grid, "search.study=judged", limit))
    edgeopt_runs = [_run_edgeopt(folder / f"edgeopt-{seed}", results, limit, f"search.seed={seed}") for seed in SEEDS]
    start_s = statistics.median(run.start_s for run in edgeopt_runs)
    grid_s = start_s + sum(results.seconds.values())
    print(
        f"grid: {len(results.rows)} recipes, {grid_s:.0f} s from scratch ({cached_s:.0f} s with the cache), ",
        end="",
    )
    print(f"{len(results.points)} satisfy every limit; start and baseline take {start_s:.0f} s\n", flush=True)
    print_rejections(results)
    runs = {"edgeopt": edgeopt_runs}
    for sampler in ("tpe", "nsga2", "random"):
        runs[f"plain {sampler}"] = [
            SearchRun.from_order(results, replay(folder / f"{sampler}-{seed}", results, limit, sampler, seed), start_s)
            for seed in REPLAYED_SEEDS
        ]
    rows = []
    for name, search_runs in runs.items():
        times = sorted(run.reached_s for run in search_runs)
        median_s = statistics.median(times)
        trials = statistics.median(run.trials for run in search_runs)
        rows.append([name, median_s, median_s / grid_s, trials, f"{times[0]:.0f} … {times[-1]:.0f}", len(search_runs)])
    print_table(["search", "s to 95 %", "s / grid", "trials to 95 %", "s, min … max", "seeds"], rows)
    edgeopt_s, tpe_s = (statistics.median(run.reached_s for run in runs[name]) for name in ("edgeopt", "plain tpe"))
    print(f"edgeopt / plain TPE: {edgeopt_s / tpe_s:.2f}\n")
    if has_olive():
        print_olive(folder, results)


def print_olive(folder: Path, results: GridResults) -> None:
    """Print the results of Olive's own search over 4-bit quantization, the part of the space that it supports.

    Limits that Olive cannot measure count as satisfied.
    """
    quantized = [key for key, row in results.rows.items() if row.params["recipe"] in ("int8", "int4")]
    share = results.relative_hypervolume(quantized)
    print(f"quantization alone, all {len(quantized)} recipes: {share:.3f} of the hypervolume")
    model = ReferenceModel().locate()
    bounds = {x.metric: x.absolute or 0.0 for x in results.opened.study.limits}
    summaries = [r.summary for r in results.rows.values() if r.summary is not None]
    original = summaries[0].metrics["quality/perplexity"] / summaries[0].metrics["quality/perplexity_ratio"]
    for seed in SEEDS:
        directory = folder / f"olive-{seed}"
        directory.mkdir()
        evaluations = run_olive_search(model, directory, evaluation_windows(model, ()), seed)
        feasible = [
            [f["perplexity"], f["mib"]]
            for f in evaluations
            if f["mib"] <= bounds["size/engine_mib"]
            and f["perplexity"] <= original * bounds["quality/perplexity_ratio"]
        ]
        share = hypervolume(feasible, results.reference) / results.hypervolume
        distinct = {(f["perplexity"], f["mib"]) for f in evaluations}
        print(f"Olive, seed {seed}: {len(evaluations)} engines, {len(distinct)} distinct, ", end="")
        smallest_mib = min(f["mib"] for f in evaluations)
        print(f"in {evaluations[-1]['at']:.0f} s; smallest {smallest_mib:.3f} MiB; {share:.3f} of the hypervolume")
    print()


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRun:
    """Result of one search.

    Attributes:
        reached_s: seconds until 95 % of the hypervolume.
        trials: number of trials that had ended by then.
        start_s: seconds of start and baseline.
    """

    reached_s: float
    trials: int
    start_s: float

    @classmethod
    def from_order(cls, results: GridResults, order: Sequence[tuple[str, float]], start_s: float) -> SearchRun:
        """Return the run of trials in order, each with the second after the start at which it ended."""
        reached_s = results.time_to(order)
        return cls(reached_s=start_s + reached_s, trials=sum(1 for _, s in order if s <= reached_s), start_s=start_s)


def _run_edgeopt(folder: Path, results: GridResults, *overrides: str) -> SearchRun:
    """Run a sweep and return its time to 95 % of the hypervolume."""
    start = time.perf_counter()
    opened = sweep(folder, *overrides)
    ended_s = time.time()
    started_s = ended_s - (time.perf_counter() - start)
    ended = [row for row in opened.study.trials() if row.ended_s and row.summary and row.state in EVALUATED_STATES]
    ended.sort(key=lambda row: row.ended_s or 0.0)
    first = ended[0].summary
    assert first is not None
    baseline_s = first.timings_s["baseline"]
    start_s = (ended[0].ended_s or 0.0) - started_s - first.spent_s + baseline_s
    order = [(canonical_json(row.params), (row.ended_s or 0.0) - started_s - start_s) for row in ended]
    run = SearchRun.from_order(results, order, start_s)
    print(f"edgeopt: {run.reached_s:.0f} s, {run.trials} trials; {ended_s - started_s:.0f} s in total", flush=True)
    return run


def print_rejections(results: GridResults) -> None:
    """Print the number of infeasible recipes that prediction rejects, and of feasible ones that it rejects wrongly."""
    limits, known_bounds, predict_trial = (
        results.opened.study.limits,
        limit_bounds(results.rows.values()),
        results.predict_trial,
    )
    infeasible = rejected = wrongly_rejected = feasible = 0
    for row in results.rows.values():
        assert row.summary is not None
        violated = {m for m, h in row.summary.verdicts.items() if h.excess is not None and h.excess > 0}
        is_rejected = predict_trial(row.params).refused_result(limits, known_bounds) is not None
        if violated & {"size/engine_mib", "memory/peak_rss_mib"}:
            infeasible, rejected = infeasible + 1, rejected + is_rejected
        elif row.summary.feasible:
            feasible, wrongly_rejected = feasible + 1, wrongly_rejected + is_rejected
    print(f"rejected by prediction: {rejected} of {infeasible} recipes that violate size or memory, ", end="")
    print(f"{wrongly_rejected} of {feasible} feasible recipes\n")
