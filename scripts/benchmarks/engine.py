"""Benchmarks of the product itself: start, memory, agreement of measurements, overhead, and what a cut gains."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import (
    EDGEOPT,
    ProbeContext,
    cli,
    compare,
    engine_of,
    figures,
    in_turn,
    intervals,
    make_random_llama,
    only,
    subjects,
    table,
)

ROUNDS = 3
"""How often the machine is profiled and everything measured then."""


def startup(folder: Path) -> None:
    """Time until `edgeopt --help` has printed."""
    times = []
    for _ in range(11):
        begun = time.perf_counter()
        subprocess.run([EDGEOPT, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begun)
    print(f"`edgeopt --help`: median {statistics.median(times):.3f} s of {len(times)}\n")


def width(folder: Path) -> None:
    """What pruning 30 % of the MLP channels costs and gains, and what LoRA wins back."""
    cut, trained = ["step.prune.ratio=0.3"], ["step.lora.rank=16"]
    alike = [*cut, "step.prune.distribution=uniform"]
    commands = {
        "uncompressed": ["recipe=baseline"],
        "30 % narrower, layers alike": ["recipe=prune", *alike],
        "the same, LoRA": ["recipe=prune_lora", *alike, *trained],
        "30 % narrower, by sensitivity": ["recipe=prune", *cut],
        "by sensitivity, LoRA": ["recipe=prune_lora", *cut, *trained],
        "int4": ["recipe=int4"],
        "by sensitivity, LoRA, int4": ["recipe=prune_lora_int4", *cut, *trained],
    }
    compare(folder, commands)
    perplexity = [figures(cli(folder, "run", *command))["quality/perplexity"] for command in commands.values()]
    for whole, narrow, won in (perplexity[:3], [perplexity[0], *perplexity[3:5]]):
        share = (narrow - won) / (narrow - whole)
        print(f"perplexity lost by pruning {narrow - whole:.3f}, won back {narrow - won:.3f}: {share:.0%}")
    print()


def width_246m(folder: Path) -> None:
    """The same cut of a 246 M Llama shape with random weights, where arithmetic outweighs the calls around it."""
    model = folder / "llama246m"
    make_random_llama(model)
    whole = ["model=local", f"model.path={model}", "measure.probes.parity=null", "measure.max_windows=2"]
    compare(
        folder,
        {
            "uncompressed": [*whole, "recipe=baseline"],
            "30 % narrower": [
                *whole,
                "recipe=prune",
                "step.prune.ratio=0.3",
                "step.prune.windows=4",
                "step.prune.distribution=uniform",
            ],
        },
    )


def agreement(folder: Path) -> None:
    """Whether two measurements of one engine agree, and both orders of two engines give the same verdict."""
    first = cli(folder, "run", "recipe=int8")["engine"]["directory"]
    second = cli(folder, "run", "recipe=int4")["engine"]["directory"]
    order = [first, first, second, second, first]
    bench = [cli(folder, "bench", "--engine", str(folder / engine)) for engine in order]
    timed = [
        m["metric"] for m in bench[0]["measurements"] if m["metric"].startswith(("latency/", "memory/", "throughput/"))
    ]
    rows = []
    for metric in timed:
        (a_low, a_high), (b_low, b_high) = intervals(bench[0], metric), intervals(bench[1], metric)
        overlap = a_low <= b_high and b_low <= a_high
        rows.append(
            [metric, f"{a_low:.4g} … {a_high:.4g}", f"{b_low:.4g} … {b_high:.4g}", "agree" if overlap else "DIFFER"]
        )
    table(["metric", "first", "second", ""], rows)
    metric = "latency/decode_p50_ms"
    forth = figures(bench[1])[metric] < figures(bench[2])[metric]
    back = figures(bench[4])[metric] < figures(bench[3])[metric]
    print(f"int8 faster than int4: {forth} when measured first, {back} when measured last\n")


def memory(folder: Path) -> None:
    """Peak memory against bytes on disk of the 246 M shape in 4 bits, by blocks, context and type of cache."""
    model = folder / "llama246m"
    make_random_llama(model)
    whole = ["model=local", f"model.path={model}", "recipe=int4", *only("memory", "latency")]
    in_8_bits = ["+step@step.kv_cache=kv_cache", "order=[quantize,kv_cache]"]
    rows = []
    for block, tokens, extra in ((128, 512, []), (256, 512, []), (256, 1024, []), (256, 1024, in_8_bits)):
        sized = [f"step.quantize.block_size={block}", f"target.context_length={tokens}"]
        f = figures(cli(folder, "run", *whole, *sized, *extra))
        size, peak = f["size/engine_mib"], f["memory/peak_rss_mib"]
        cache = "8 bits" if extra else "fp32"
        rows.append([block, tokens, cache, size, peak, peak / size, f["latency/decode_p50_ms"]])
    table(["block", "context", "key-value cache", "engine MiB", "peak RSS MiB", "ratio", "decode p50 ms"], rows)


def overhead(folder: Path) -> None:
    """Share of a trial's time, and of the whole sweep's, that is neither compression, build nor measurement."""
    from mlflow import MlflowClient

    begun = time.perf_counter()
    document = cli(folder, "sweep", "search.study=overhead", "search.trials=8", "promote=null")
    passed = time.perf_counter() - begun
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    in_trials = in_stages = 0.0
    for trial in document["trials"]:
        run = client.get_run(trial["run_id"]).info
        in_trials += (run.end_time - run.start_time) / 1e3
        result = json.loads((folder / ".edgeopt/studies/overhead/trials" / f"{trial['number']}.json").read_text())
        in_stages += sum(result["timings_s"].values())
    print(f"8 trials: {in_trials:.0f} s, of which {1 - in_stages / in_trials:.1%} are outside their stages")
    print(f"sweep: {passed:.0f} s, of which {1 - in_stages / passed:.1%} are outside stages, start and end included\n")


def estimate(folder: Path) -> None:
    """What `edgeopt estimate` predicts of 30 recipes beside what is then measured, on a target profiled in this run.

    Three times over the machine is profiled and all engines are measured right after it, since its own speed comes and
    goes by the hour; and with one thread, as how long threads wait for one another depends on where a host puts its
    virtual cores meanwhile. Each ratio is the median of the three.
    """
    profiled = str(folder / "here" / "target" / "here.yaml")
    model = folder / "llama246m"
    make_random_llama(model)
    large = ProbeContext(title="246 M shape", folder=model, chosen=("model=local", f"model.path={model}"))
    rounded = [
        [f"recipe={kind}", f"step.quantize.block_size={block}"]
        for kind, block in (("int8", 32), ("int8", 64), ("int4", 16), ("int4", 32), ("int4", 64))
    ]
    tables = ["step.quantize.lm_head=int4", "step.quantize.embedding=int4"]
    in_8_bits = ["recipe=baseline", "+step@step.quantize=int8_activations", "order=[quantize]"]
    cut = ["step.prune.ratio=0.3", "step.prune.distribution=uniform", "step.prune.windows=4"]
    recipes = [
        *rounded,
        ["recipe=fp16"],
        [*rounded[3], *tables],
        in_8_bits,
        ["recipe=prune", *cut],
        ["recipe=prune_int4", *cut, "step.quantize.block_size=16"],
    ]
    metrics = ("size/engine_mib", "memory/peak_rss_mib", "latency/decode_p50_ms")
    chosen = {
        (subject.title, " ".join(recipe).replace("step.", "")): [*subject.chosen, *only(), *recipe]
        for subject in (*subjects(), large)
        for recipe in recipes
    }
    engines = {name: engine_of(folder, cli(folder, "run", *overrides)) for name, overrides in chosen.items()}
    here = ["--config-dir", str(folder / "here"), "target=here"]
    ratios: dict[tuple[str, str], list[list[float]]] = {name: [] for name in chosen}
    for _ in range(ROUNDS):
        cli(folder, "profile", "--name", "here", "--threads", "1", "--out", profiled)
        known = {name: cli(folder, "estimate", *here, *overrides) for name, overrides in chosen.items()}
        measured = in_turn(folder, engines, rounds=1, target=here)
        for name, found in ratios.items():
            told = known[name]
            found.append([told["figures"][metric]["value"] / measured[name][metric] for metric in metrics])
    rows = [[*name, *map(statistics.median, zip(*found, strict=True))] for name, found in ratios.items()]
    table(["model", "recipe", *(f"{metric}, predicted / measured" for metric in metrics)], rows)
    for index, metric in enumerate(metrics):
        of_rounds = [_errors(found[once][index] for found in ratios.values()) for once in range(ROUNDS)]
        print(f"{metric}: off by {_errors(row[2 + index] for row in rows)}; in the rounds by {', '.join(of_rounds)}")
    print()


def _errors(ratios: Iterable[float]) -> str:
    errors = sorted(abs(ratio - 1) for ratio in ratios)
    return f"{statistics.median(errors):.1%} (at most {errors[-1]:.1%})"


def decode(folder: Path) -> None:
    """Decoding of the 246 M shape in 4 bits beside the engine that ONNX Runtime's builder makes of its own RTN."""
    from benchmarks.baselines import onnx_runtime

    model = folder / "llama246m"
    make_random_llama(model)
    whole = [
        "model=local",
        f"model.path={model}",
        *only(),
    ]
    for block in (32, 128):
        peer = folder / f"onnx-runtime-{block}"
        peer.mkdir()
        onnx_runtime(model, peer, "rtn", block_size=block)
        own = cli(
            folder, "run", *whole, "recipe=int4", "step.quantize.lm_head=int4", f"step.quantize.block_size={block}"
        )
        both = in_turn(folder, {"ONNX Runtime": peer, "edgeopt": engine_of(folder, own)}, rounds=5)
        metrics = ("latency/decode_p50_ms", "latency/ttft_256_ms", "memory/peak_rss_mib", "size/engine_mib")
        rows = [[name, *(found[metric] for metric in metrics)] for name, found in both.items()]
        ratio = both["edgeopt"]["latency/decode_p50_ms"] / both["ONNX Runtime"]["latency/decode_p50_ms"]
        print(f"blocks of {block}: decode {ratio:.3f} of ONNX Runtime's\n")
        table(["engine", *metrics], rows)
