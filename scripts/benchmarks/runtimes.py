"""Benchmarks of the runtimes: one model in 4 bits on each, beside what llama.cpp's users would take."""

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
from benchmarks.common import cli, engine_of, figures, in_turn, make_random_llama, only, subjects, table

if TYPE_CHECKING:
    import numpy as np

METRICS = {
    "decode, ms": "latency/decode_p50_ms",
    "512 tokens read, ms": "latency/ttft_512_ms",
    "cold start, ms": "latency/cold_start_ms",
    "peak RSS, MiB": "memory/peak_rss_mib",
    "size, MiB": "size/engine_mib",
}
PEERS = ("Q4_K_M", "Q4_0")
SYMMETRIC = "step.quantize.symmetric=true"
TABLES = ("step.quantize.embedding=int4",)
BEST = "blocks of 256, huge pages"
RECIPES = {
    "genai, blocks of 32": ["step.quantize.block_size=32"],
    "genai, blocks of 128": ["step.quantize.block_size=128"],
    "the same, huge pages": ["step.quantize.block_size=128", "runtime.huge_pages=true"],
    "genai, blocks of 256": ["step.quantize.block_size=256"],
    BEST: ["step.quantize.block_size=256", "runtime.huge_pages=true"],
    "blocks of 256, packed on disk": ["step.quantize.block_size=256", "runtime.packed_on_disk=true"],
    "onnx, blocks of 256": ["step.quantize.block_size=256", "runtime=onnx", SYMMETRIC],
    "onnx, packed on disk": ["step.quantize.block_size=256", "runtime=onnx", SYMMETRIC, "runtime.packed_on_disk=true"],
}
PERPLEXITY = "quality/perplexity"
PROFILED = ("genai, blocks of 32", "genai, blocks of 256")
TOKENS = 64
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


def runtimes(folder: Path) -> None:
    """The 246 M shape in 4 bits with two threads; ratios are to llama.cpp's Q4_K_M."""
    from edgeopt.machine.inventory import detect_device

    model = folder / "llama246m"
    make_random_llama(model)
    chosen = ["model=local", f"model.path={model}", *only(), "recipe=int4", *TABLES]
    engines, recipes = {}, RECIPES
    if baselines.llama_cpp_runs_here():
        for kind in PEERS:
            engines[f"llama.cpp, {kind}"] = Path(tempfile.mkdtemp(dir=folder))
            baselines.llama_cpp(model, engines[f"llama.cpp, {kind}"], kind)
        recipes = recipes | {"llamacpp, blocks of 32": ["runtime=llamacpp", SYMMETRIC]}
    for name, recipe in recipes.items():
        engines[name] = engine_of(folder, cli(folder, "run", *chosen, *recipe))
    gb_per_s = statistics.median(detect_device(measure_rates=True).read_gb_per_s for _ in range(3))
    wanted = ["measure.prompt_lengths=[16,512]", "target.context_length=640", "target.threads=2"]
    measured = in_turn(folder, engines, target=wanted)
    first = next(iter(measured.values()))
    rows = []
    for name, found in measured.items():
        told = [f"{found[metric]:.4g} ({found[metric] / first[metric]:.2f})" for metric in METRICS.values()]
        rows.append([name, *told, _share(engines[name], found["latency/decode_p50_ms"], gb_per_s)])
    print(f"{gb_per_s:.3g} GB/s are read\n")
    table(["engine", *METRICS, "share of the roofline"], rows)
    for name in PROFILED:
        print(f"Where a token's time goes: {name}\n")
        table(["operator", "calls", "ms a token", "share"], _profile(folder, engines[name]))


def _share(engine: Path, decode_ms: float, gb_per_s: float) -> str:
    """Of a token's time, what reading its weights in the layout of ONNX Runtime's kernels takes at best."""
    from edgeopt.core.artifact import Engine
    from edgeopt.core.model_spec import EMBEDDING
    from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
    from edgeopt.runtimes.onnxruntime_common.prepacked_weights import prepacked_bytes

    read = Engine.read(engine)
    if read.format == LlamaCpp.format:
        return ""
    spec = read.spec
    read_bytes = sum(prepacked_bytes(spec, unit) for unit in spec.matrices if unit != EMBEDDING)
    return f"{read_bytes / gb_per_s / 1e6 / decode_ms:.2f}"


def blocks(folder: Path) -> None:
    """What blocks of several sizes and llama.cpp's types lose of the reference model, on one text by one formula."""
    subject = subjects()[0]
    chosen = [*subject.chosen, *only("quality"), "measure.max_windows=1000"]
    recipes = {
        "blocks of 32": ["recipe=int4"],
        "blocks of 128, GPTQ": ["recipe=gptq_int4", "step.quantize.block_size=128"],
        "blocks of 128, GPTQ and QAT": ["recipe=qat_int4", "step.quantize.block_size=128"],
        "blocks of 256, GPTQ": ["recipe=gptq_int4", "step.quantize.block_size=256"],
        "blocks of 256, GPTQ and QAT": ["recipe=qat_int4", "step.quantize.block_size=256"],
    }
    windows = baselines.evaluation_windows(subject.folder, chosen)
    exact = _logits(engine_of(folder, cli(folder, "run", *chosen, "recipe=baseline", "runtime=torch")), windows)
    rows: list[list[object]] = []
    if baselines.llama_cpp_runs_here():
        for kind in PEERS:
            engine = Path(tempfile.mkdtemp(dir=folder))
            baselines.llama_cpp(subject.folder, engine, kind)
            found = figures(cli(folder, "bench", "--engine", str(engine), *chosen))
            rows.append([f"llama.cpp, {kind}", _divergence(exact, _logits(engine, windows)), found[PERPLEXITY]])
        recipes["llama.cpp, Q4_K_M, importance matrix"] = ["recipe=q4_k_m"]
    for name, recipe in recipes.items():
        tables = TABLES if "int4" in recipe[0] else ()
        document = cli(folder, "run", *chosen, *recipe, *tables)
        logits = _logits(engine_of(folder, document), windows)
        rows.append([name, _divergence(exact, logits), figures(document)[PERPLEXITY]])
    table(["recipe", "divergence from fp32, nats", "perplexity"], rows)


def _logits(engine: Path, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    from edgeopt.config import assemble

    read, runtime = assemble.open_engine(engine)
    session = runtime.open(read, threads=2)
    return [session.logits(window) for window in windows]


def _divergence(exact: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Mean over the positions of the Kullback-Leibler divergence, in nats."""
    from edgeopt.measure.stats.divergence import kl_divergence, log_softmax

    pairs = zip(map(log_softmax, exact), map(log_softmax, found), strict=True)
    return statistics.mean(float(kl_divergence(*pair).mean()) for pair in pairs)


def _profile(folder: Path, engine: Path) -> list[list[object]]:
    """By operator, what ONNX Runtime's profiler says of a decoded token: medians, the longest first."""
    prefix = Path(tempfile.mkdtemp(dir=folder)) / "trace"
    subprocess.run([sys.executable, "-c", PROFILE, str(engine), str(prefix), str(TOKENS)], check=True)
    (trace,) = prefix.parent.glob("trace*.json")
    events = json.loads(trace.read_text())
    runs = [event for event in events if event["name"] == "model_run"][-TOKENS // 2 :]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for run in runs:
        inside = [event for event in nodes if run["ts"] <= event["ts"] < run["ts"] + run["dur"]]
        sums: collections.Counter[str] = collections.Counter()
        for event in inside:
            sums[event["args"]["op_name"]] += event["dur"]
        sums["between operators"] = run["dur"] - sum(sums.values())
        for operator, taken in sums.items():
            spent[operator].append(taken / 1e3)
    calls = collections.Counter(event["args"]["op_name"] for event in inside)
    whole = sum(map(statistics.median, spent.values()))
    longest = sorted(spent.items(), key=lambda pair: -statistics.median(pair[1]))
    return [[name, calls[name], (ms := statistics.median(times)), f"{ms / whole:.0%}"] for name, times in longest]
