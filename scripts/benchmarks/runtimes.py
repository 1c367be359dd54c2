"""Benchmark the runtimes on one model in 4 bits, with llama.cpp as the baseline."""

from __future__ import annotations

import collections
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import baselines
from benchmarks.common import (
    bench_interleaved,
    cli,
    engine_folder,
    make_random_llama,
    metrics_of,
    only,
    print_table,
    trained_models,
)

if TYPE_CHECKING:
    import numpy as np

METRICS = {
    "decode, ms": "latency/decode_p50_ms",
    "prompt of 512, ms": "latency/ttft_512_ms",
    "cold start, ms": "latency/cold_start_ms",
    "peak RSS, MiB": "memory/peak_rss_mib",
    "size, MiB": "size/engine_mib",
}
LLAMA_CPP_TYPES = ("Q4_K_M", "Q4_0")
SYMMETRIC = "step.quantize.symmetric=true"
INT4_EMBEDDING = ("step.quantize.embedding=int4",)
BEST = "genai, blocks of 256, huge pages"
RECIPES = {
    "genai, blocks of 32": ["step.quantize.block_size=32"],
    "genai, blocks of 128": ["step.quantize.block_size=128"],
    "genai, blocks of 128, huge pages": ["step.quantize.block_size=128", "runtime.huge_pages=true"],
    "genai, blocks of 256": ["step.quantize.block_size=256"],
    BEST: ["step.quantize.block_size=256", "runtime.huge_pages=true"],
    "genai, blocks of 256, packed on disk": ["step.quantize.block_size=256", "runtime.packed_on_disk=true"],
    "onnx, blocks of 256": ["step.quantize.block_size=256", "runtime=onnx", SYMMETRIC],
    "onnx, blocks of 256, packed on disk": [
        "step.quantize.block_size=256",
        "runtime=onnx",
        SYMMETRIC,
        "runtime.packed_on_disk=true",
    ],
}
PERPLEXITY = "quality/perplexity"
PROFILED_ENGINES = ("genai, blocks of 32", "genai, blocks of 256")
NEW_TOKENS = 64
PROFILE = """
import sys
from pathlib import Path
from edgeopt.core.artifact import Engine
from edgeopt.runtimes.genai.runtime import Genai

session = Genai().open(Engine.read(Path(sys.argv[1])), threads=2)
session.close()
session._options["enable_profiling"] = sys.argv[2]
list(session.generate(list(range(5, 21)), int(sys.argv[3]), stop_at_end=False))
"""
"""A process that generates tokens with ONNX Runtime's profiler enabled."""


def runtimes(folder: Path) -> None:
    """Latency, memory and size of the 246 M shape in 4 bits with two threads; ratios are to llama.cpp's Q4_K_M."""
    from edgeopt.machine.inventory import detect_device

    model = folder / "llama246m"
    make_random_llama(model)
    overrides = ["model=local", f"model.path={model}", *only(), "recipe=int4", *INT4_EMBEDDING]
    engines, recipes = {}, RECIPES
    if baselines.has_llama_cpp():
        for weight_type in LLAMA_CPP_TYPES:
            engines[f"llama.cpp, {weight_type}"] = Path(tempfile.mkdtemp(dir=folder))
            baselines.build_llama_cpp(model, engines[f"llama.cpp, {weight_type}"], weight_type)
        recipes = recipes | {"llamacpp, blocks of 32": ["runtime=llamacpp", SYMMETRIC]}
    for name, recipe in recipes.items():
        engines[name] = engine_folder(folder, cli(folder, "run", *overrides, *recipe))
    gb_per_s = statistics.median(detect_device(measure_rates=True).read_gb_per_s for _ in range(3))
    target = ["measure.prompt_lengths=[16,512]", "target.context_length=640", "target.threads=2"]
    measured = bench_interleaved(folder, engines, target=target)
    first = next(iter(measured.values()))
    rows = []
    for name, medians in measured.items():
        values = [f"{medians[metric]:.4g} ({medians[metric] / first[metric]:.2f})" for metric in METRICS.values()]
        rows.append([name, *values, _roofline_share(engines[name], medians["latency/decode_p50_ms"], gb_per_s)])
    print(f"memory bandwidth: {gb_per_s:.3g} GB/s\n")
    print_table(["engine", *METRICS, "roofline / decode"], rows)
    for name in PROFILED_ENGINES:
        print(f"profile of {name}\n")
        print_table(["operator", "calls", "ms/token", "share"], _profile(folder, engines[name]))


def _roofline_share(engine: Path, decode_ms: float, gb_per_s: float) -> str:
    """Return the time to read all prepacked weights from memory once, relative to the decode latency.

    Empty for llama.cpp, whose weights are not prepacked.
    """
    from edgeopt.core.artifact import Engine
    from edgeopt.core.model_spec import EMBEDDING
    from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
    from edgeopt.runtimes.onnxruntime_common.prepacked_weights import prepacked_bytes

    opened = Engine.read(engine)
    if opened.format == LlamaCpp.format:
        return ""
    spec = opened.spec
    read_bytes = sum(prepacked_bytes(spec, unit) for unit in spec.matrices if unit != EMBEDDING)
    return f"{read_bytes / gb_per_s / 1e6 / decode_ms:.2f}"


def blocks(folder: Path) -> None:
    """Divergence and perplexity of the reference model by block size, and with llama.cpp's weight types."""
    trained = trained_models()[0]
    overrides = [*trained.overrides, *only("quality"), "measure.max_windows=1000"]
    recipes = {
        "blocks of 32": ["recipe=int4"],
        "blocks of 128, GPTQ": ["recipe=gptq_int4", "step.quantize.block_size=128"],
        "blocks of 128, GPTQ and QAT": ["recipe=qat_int4", "step.quantize.block_size=128"],
        "blocks of 256, GPTQ": ["recipe=gptq_int4", "step.quantize.block_size=256"],
        "blocks of 256, GPTQ and QAT": ["recipe=qat_int4", "step.quantize.block_size=256"],
    }
    windows = baselines.evaluation_windows(trained.folder, overrides)
    exact = _logits(engine_folder(folder, cli(folder, "run", *overrides, "recipe=baseline", "runtime=torch")), windows)
    rows: list[list[object]] = []
    if baselines.has_llama_cpp():
        for weight_type in LLAMA_CPP_TYPES:
            engine = Path(tempfile.mkdtemp(dir=folder))
            baselines.build_llama_cpp(trained.folder, engine, weight_type)
            metrics = metrics_of(cli(folder, "bench", "--engine", str(engine), *overrides))
            rows.append(
                [f"llama.cpp, {weight_type}", _divergence(exact, _logits(engine, windows)), metrics[PERPLEXITY]]
            )
        recipes["llama.cpp, Q4_K_M, importance matrix"] = ["recipe=q4_k_m"]
    for name, recipe in recipes.items():
        embedding = INT4_EMBEDDING if "int4" in recipe[0] else ()
        document = cli(folder, "run", *overrides, *recipe, *embedding)
        logits = _logits(engine_folder(folder, document), windows)
        rows.append([name, _divergence(exact, logits), metrics_of(document)[PERPLEXITY]])
    print_table(["recipe", "divergence from fp32, nats", "perplexity"], rows)


def _logits(engine: Path, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the logits of each window, shape (tokens, vocabulary)."""
    from edgeopt.config import assemble

    opened, runtime = assemble.open_engine(engine)
    session = runtime.open(opened, threads=2)
    return [session.logits(window) for window in windows]


def _divergence(exact: Sequence[np.ndarray], quantized: Sequence[np.ndarray]) -> float:
    """Return the mean Kullback-Leibler divergence over all positions, in nats."""
    from edgeopt.measure.stats.divergence import kl_divergence, log_softmax

    pairs = zip(map(log_softmax, exact), map(log_softmax, quantized), strict=True)
    return statistics.mean(float(kl_divergence(*pair).mean()) for pair in pairs)


def _profile(folder: Path, engine: Path) -> list[list[object]]:
    """Return a row for each operator: name, calls in the last run, median ms per decoded token, share of the time.

    The times are those of ONNX Runtime's profiler. The slowest operator comes first.
    """
    prefix = Path(tempfile.mkdtemp(dir=folder)) / "trace"
    subprocess.run([sys.executable, "-c", PROFILE, str(engine), str(prefix), str(NEW_TOKENS)], check=True)
    (trace,) = prefix.parent.glob("trace*.json")
    events = json.loads(trace.read_text())
    runs = [event for event in events if event["name"] == "model_run"][-NEW_TOKENS // 2 :]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    times_ms: dict[str, list[float]] = collections.defaultdict(list)
    for run in runs:
        run_nodes = [event for event in nodes if run["ts"] <= event["ts"] < run["ts"] + run["dur"]]
        sums: collections.Counter[str] = collections.Counter()
        for event in run_nodes:
            sums[event["args"]["op_name"]] += event["dur"]
        sums["between operators"] = run["dur"] - sum(sums.values())
        for operator, duration in sums.items():
            times_ms[operator].append(duration / 1e3)
    calls = collections.Counter(event["args"]["op_name"] for event in run_nodes)
    total_ms = sum(map(statistics.median, times_ms.values()))
    slowest_first = sorted(times_ms.items(), key=lambda pair: -statistics.median(pair[1]))
    return [
        [name, calls[name], (median_ms := statistics.median(times)), f"{median_ms / total_ms:.0%}"]
        for name, times in slowest_first
    ]
