"""Benchmark start-up, memory, repeatability, overhead, predictions and the gains of pruning."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import (
    EDGEOPT,
    BenchmarkModel,
    bench_interleaved,
    cli,
    compare,
    engine_folder,
    interval_of,
    make_random_llama,
    metrics_of,
    only,
    print_table,
    trained_models,
)
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial_storage import TrialStorage

ROUNDS = 3
"""Number of times that `estimate` profiles the machine and measures all engines."""


def startup(folder: Path) -> None:
    """Time of `edgeopt --help`."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        subprocess.run([EDGEOPT, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    print(f"`edgeopt --help`: median {statistics.median(times):.3f} s of {len(times)}\n")


def width(folder: Path) -> None:
    """Size, speed and perplexity after pruning 30 % of the MLP channels, and after recovery with LoRA."""
    pruned, lora = ["step.prune.ratio=0.3"], ["step.lora.rank=16"]
    uniform = [*pruned, "step.prune.distribution=uniform"]
    commands = {
        "uncompressed": ["recipe=baseline"],
        "pruned uniformly": ["recipe=prune", *uniform],
        "pruned uniformly, LoRA": ["recipe=prune_lora", *uniform, *lora],
        "pruned by sensitivity": ["recipe=prune", *pruned],
        "pruned by sensitivity, LoRA": ["recipe=prune_lora", *pruned, *lora],
        "int4": ["recipe=int4"],
        "pruned by sensitivity, LoRA, int4": ["recipe=prune_lora_int4", *pruned, *lora],
    }
    compare(folder, commands)
    perplexity = [metrics_of(cli(folder, "run", *command))["quality/perplexity"] for command in commands.values()]
    for original, after_pruning, after_lora in (perplexity[:3], [perplexity[0], *perplexity[3:5]]):
        loss, recovered = after_pruning - original, after_pruning - after_lora
        print(f"perplexity lost by pruning {loss:.3f}, recovered {recovered:.3f}: {recovered / loss:.0%}")
    print()


def width_246m(folder: Path) -> None:
    """The same pruning of a 246 M Llama with random weights, whose run time is dominated by arithmetic."""
    model = folder / "llama246m"
    make_random_llama(model)
    overrides = ["model=local", f"model.path={model}", "measure.probes.parity=null", "measure.max_windows=2"]
    compare(
        folder,
        {
            "uncompressed": [*overrides, "recipe=baseline"],
            "pruned by 30 %": [
                *overrides,
                "recipe=prune",
                "step.prune.ratio=0.3",
                "step.prune.windows=4",
                "step.prune.distribution=uniform",
            ],
        },
    )


def agreement(folder: Path) -> None:
    """Agreement of two measurements of one engine, and of both measuring orders of two engines."""
    first = cli(folder, "run", "recipe=int8")["engine"]["directory"]
    second = cli(folder, "run", "recipe=int4")["engine"]["directory"]
    order = [first, first, second, second, first]
    documents = [cli(folder, "bench", "--engine", str(folder / engine)) for engine in order]
    metrics = [
        m["metric"]
        for m in documents[0]["measurements"]
        if m["metric"].startswith(("latency/", "memory/", "throughput/"))
    ]
    rows = []
    for metric in metrics:
        (a_low, a_high), (b_low, b_high) = interval_of(documents[0], metric), interval_of(documents[1], metric)
        overlap = a_low <= b_high and b_low <= a_high
        rows.append(
            [metric, f"{a_low:.4g} … {a_high:.4g}", f"{b_low:.4g} … {b_high:.4g}", "agree" if overlap else "DIFFER"]
        )
    print_table(["metric", "first", "second", ""], rows)
    metric = "latency/decode_p50_ms"
    first_order = metrics_of(documents[1])[metric] < metrics_of(documents[2])[metric]
    second_order = metrics_of(documents[4])[metric] < metrics_of(documents[3])[metric]
    print(f"int8 faster than int4: {first_order} when measured first, {second_order} when measured last\n")


def memory(folder: Path) -> None:
    """Peak memory relative to engine size of the 246 M shape in 4 bits, by block size, context and cache type."""
    model = folder / "llama246m"
    make_random_llama(model)
    overrides = ["model=local", f"model.path={model}", "recipe=int4", *only("memory", "latency")]
    kv_8_bits = ["+step@step.kv_cache=kv_cache", "order=[quantize,kv_cache]"]
    rows = []
    for block, tokens, extra in ((128, 512, []), (256, 512, []), (256, 1024, []), (256, 1024, kv_8_bits)):
        sizes = [f"step.quantize.block_size={block}", f"target.context_length={tokens}"]
        metrics = metrics_of(cli(folder, "run", *overrides, *sizes, *extra))
        size, peak = metrics["size/engine_mib"], metrics["memory/peak_rss_mib"]
        cache = "8 bits" if extra else "fp32"
        rows.append([block, tokens, cache, size, peak, peak / size, metrics["latency/decode_p50_ms"]])
    print_table(["block", "context", "key-value cache", "engine MiB", "peak RSS MiB", "ratio", "decode p50 ms"], rows)


def overhead(folder: Path) -> None:
    """Share of the time of trials and of the sweep that is outside the stages of compression, build and measurement."""
    from mlflow import MlflowClient

    start = time.perf_counter()
    document = cli(folder, "sweep", "search.study=overhead", "search.trials=8", "promote=null")
    elapsed_s = time.perf_counter() - start
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    storage = TrialStorage(file_url(folder / ".edgeopt" / "studies.db"), "overhead")
    trials_s = stages_s = 0.0
    for trial in document["trials"]:
        run = client.get_run(trial["run_id"]).info
        trials_s += (run.end_time - run.start_time) / 1e3
        stages_s += sum(storage.load_result(trial["number"])["timings_s"].values())
    print(f"8 trials: {trials_s:.0f} s, {1 - stages_s / trials_s:.1%} outside their stages")
    print(f"sweep: {elapsed_s:.0f} s, {1 - stages_s / elapsed_s:.1%} outside stages, including start and end\n")


def estimate(folder: Path) -> None:
    """Predictions of `edgeopt predict` relative to measurements, for 30 recipes on a target profiled in this run.

    The machine's speed changes by the hour, so each of three rounds profiles it and measures all engines right after.
    One thread is used, because the synchronization of threads depends on the host's placement of virtual cores. Each
    ratio is the median of the three rounds.
    """
    profile_path = str(folder / "here" / "target" / "here.yaml")
    model = folder / "llama246m"
    make_random_llama(model)
    large = BenchmarkModel(title="246 M shape", folder=model, overrides=("model=local", f"model.path={model}"))
    quantized = [
        [f"recipe={weights}", f"step.quantize.block_size={block}"]
        for weights, block in (("int8", 32), ("int8", 64), ("int4", 16), ("int4", 32), ("int4", 64))
    ]
    int4_tables = ["step.quantize.lm_head=int4", "step.quantize.embedding=int4"]
    int8_activations = ["recipe=baseline", "+step@step.quantize=int8_activations", "order=[quantize]"]
    pruned = ["step.prune.ratio=0.3", "step.prune.distribution=uniform", "step.prune.windows=4"]
    recipes = [
        *quantized,
        ["recipe=fp16"],
        [*quantized[3], *int4_tables],
        int8_activations,
        ["recipe=prune", *pruned],
        ["recipe=prune_int4", *pruned, "step.quantize.block_size=16"],
    ]
    metrics = ("size/engine_mib", "memory/peak_rss_mib", "latency/decode_p50_ms")
    overrides = {
        (trained.title, " ".join(recipe).replace("step.", "")): [*trained.overrides, *only(), *recipe]
        for trained in (*trained_models(), large)
        for recipe in recipes
    }
    engines = {name: engine_folder(folder, cli(folder, "run", *command)) for name, command in overrides.items()}
    target = ["--config-dir", str(folder / "here"), "target=here"]
    ratios: dict[tuple[str, str], list[list[float]]] = {name: [] for name in overrides}
    for _ in range(ROUNDS):
        cli(folder, "profile", "--name", "here", "--threads", "1", "--out", profile_path)
        predicted = {name: cli(folder, "predict", *target, *command) for name, command in overrides.items()}
        measured = bench_interleaved(folder, engines, rounds=1, target=target)
        for name, rounds in ratios.items():
            values = predicted[name]["predictions"]
            rounds.append([values[metric]["value"] / measured[name][metric] for metric in metrics])
    rows = [[*name, *map(statistics.median, zip(*rounds, strict=True))] for name, rounds in ratios.items()]
    print_table(["model", "recipe", *(f"{metric}, predicted / measured" for metric in metrics)], rows)
    for index, metric in enumerate(metrics):
        by_round = [_describe_errors(rounds[n][index] for rounds in ratios.values()) for n in range(ROUNDS)]
        overall = _describe_errors(row[2 + index] for row in rows)
        print(f"{metric}: error {overall}; by round {', '.join(by_round)}")
    print()


def _describe_errors(ratios: Iterable[float]) -> str:
    """Return the median and the maximum of the relative errors."""
    errors = sorted(abs(ratio - 1) for ratio in ratios)
    return f"{statistics.median(errors):.1%} (maximum {errors[-1]:.1%})"


def decode(folder: Path) -> None:
    """Decode latency of the 246 M shape in 4 bits, beside an engine of ONNX Runtime's builder with its RTN."""
    from benchmarks.baselines import build_onnx_runtime

    model = folder / "llama246m"
    make_random_llama(model)
    overrides = [
        "model=local",
        f"model.path={model}",
        *only(),
    ]
    for block in (32, 128):
        baseline = folder / f"onnx-runtime-{block}"
        baseline.mkdir()
        build_onnx_runtime(model, baseline, "rtn", block_size=block)
        document = cli(
            folder, "run", *overrides, "recipe=int4", "step.quantize.lm_head=int4", f"step.quantize.block_size={block}"
        )
        medians = bench_interleaved(
            folder, {"ONNX Runtime": baseline, "edgeopt": engine_folder(folder, document)}, rounds=5
        )
        metrics = ("latency/decode_p50_ms", "latency/ttft_256_ms", "memory/peak_rss_mib", "size/engine_mib")
        rows = [[name, *(values[metric] for metric in metrics)] for name, values in medians.items()]
        ratio = medians["edgeopt"]["latency/decode_p50_ms"] / medians["ONNX Runtime"]["latency/decode_p50_ms"]
        print(f"blocks of {block}: decode {ratio:.3f} of ONNX Runtime's\n")
        print_table(["engine", *metrics], rows)
