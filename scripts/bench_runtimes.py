"""Benchmarks of the runtimes: one model in 4 bits on each, beside what llama.cpp's users would take."""

from __future__ import annotations

import collections
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import peers
import psutil
from bench_common import cli, engine_of, figures, in_turn, make_random_llama, only, subjects, table

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
RECIPES = {
    "genai, blocks of 32": ["step.quantize.block_size=32"],
    "genai, blocks of 128": ["step.quantize.block_size=128"],
    "genai, blocks of 256": ["step.quantize.block_size=256"],
    "the same, huge pages": ["step.quantize.block_size=256", "runtime.huge_pages=true"],
    "the same, packed on disk": ["step.quantize.block_size=256", "runtime.packed_on_disk=true"],
    "onnx, blocks of 256": ["step.quantize.block_size=256", "runtime=onnx", SYMMETRIC],
    "onnx, packed on disk": ["step.quantize.block_size=256", "runtime=onnx", SYMMETRIC, "runtime.packed_on_disk=true"],
}
PERPLEXITY = "quality/perplexity"
PROFILED = ("genai, blocks of 32", "genai, blocks of 256")
TOKENS = 64
PROFILE = """
import sys
from pathlib import Path
from edgeopt.artifact import Engine
from edgeopt.runtimes.genai import Genai

session = Genai().open(Engine.read(Path(sys.argv[1])), threads=2)
session.close()
session._options["enable_profiling"] = sys.argv[2]
list(session.generate(list(range(5, 21)), int(sys.argv[3]), stop_at_end=False))
"""

OPENED = """
import sys, time
import onnxruntime

graph, settings, save = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
for setting in settings.split():
    options.add_session_config_entry(*setting.split("="))
if save:
    options.optimized_model_filepath = save
begun = time.perf_counter()
session = onnxruntime.InferenceSession(graph, options)
print(time.perf_counter() - begun, flush=True)
sys.stdin.read()
"""
"""A process that holds a graph open until it is told to end; the last argument is where it saves what it opened."""
SAVED = (
    "session.optimized_model_external_initializers_file_name=saved.data"
    " session.optimized_model_external_initializers_min_size_in_bytes=1024"
    " session.save_external_prepacked_constant_initializers=1"
)


def prepacked(folder: Path) -> None:
    """Weights of the 246 M shape in the layout of the kernels: made by each process, saved in the file, or not at all.

    Two processes at once, medians of the second.
    """
    model = folder / "llama246m"
    make_random_llama(model)
    chosen = ["model=local", f"model.path={model}", *only(), "runtime=onnx"]
    rows = []
    for recipe in ("baseline", "int8", "int4"):
        graph = engine_of(folder, cli(folder, "run", *chosen, f"recipe={recipe}")) / "model.onnx"
        saved = Path(tempfile.mkdtemp(dir=folder)) / "saved.onnx"
        with _opened(graph, SAVED, save=saved):
            pass
        ways = {
            "by each process": (graph, ""),
            "saved": (saved, ""),
            "not at all": (graph, "session.disable_prepacking=1"),
        }
        found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
        for _ in range(5):
            for way, opened in ways.items():
                with _opened(*opened), _opened(*opened) as second:
                    found[way].append(second)
        for way, runs in found.items():
            disk_mb = sum(p.stat().st_size for p in ways[way][0].parent.glob("*.data")) / 1e6
            rows.append([recipe, way, disk_mb, *(statistics.median(run[n] for run in runs) for n in range(3))])
    table(["recipe", "packed", "weights on disk, MB", "opened in ms", "private, MB", "PSS, MB"], rows)


@contextlib.contextmanager
def _opened(graph: Path, settings: str, *, save: Path | None = None) -> Iterator[tuple[float, ...]]:
    """A process with a graph open: milliseconds until then, and its megabytes, those of its own and proportional."""
    command = [sys.executable, "-c", OPENED, str(graph), settings, str(save or "")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seconds = float(process.stdout.readline())
        kept = psutil.Process(process.pid).memory_full_info()
        yield 1e3 * seconds, kept.uss / 1e6, kept.pss / 1e6
        process.stdin.close()


def runtimes(folder: Path) -> None:
    """The 246 M shape in 4 bits with two threads, and what each recipe loses of a trained model, beside llama.cpp."""
    from edgeopt.artifact import Engine
    from edgeopt.measure.inventory import inventory
    from edgeopt.spec import EMBEDDING

    model = folder / "llama246m"
    make_random_llama(model)
    chosen = ["model=local", f"model.path={model}", *only(), "recipe=int4", *TABLES]
    engines, recipes = {}, RECIPES
    if peers.llama_cpp_runs_here():
        for kind in PEERS:
            engines[f"llama.cpp, {kind}"] = Path(tempfile.mkdtemp(dir=folder))
            peers.llama_cpp(model, engines[f"llama.cpp, {kind}"], kind)
        recipes = recipes | {"llamacpp, blocks of 32": ["runtime=llamacpp", SYMMETRIC]}
    for name, recipe in recipes.items():
        engines[name] = engine_of(folder, cli(folder, "run", *chosen, *recipe))
    gb_per_s = statistics.median(inventory(rates=True).read_gb_per_s for _ in range(3))
    wanted = ["measure.prompt_lengths=[16,512]", "target.context_length=640", "target.threads=2"]
    measured = in_turn(folder, engines, target=wanted)
    first = next(iter(measured.values()))
    rows = []
    for name, found in measured.items():
        told = [f"{found[metric]:.4g} ({found[metric] / first[metric]:.2f})" for metric in METRICS.values()]
        spec = Engine.read(engines[name]).spec
        read_ms = sum(map(spec.size_bytes, spec.matrices.keys() - {EMBEDDING})) / gb_per_s / 1e6
        rows.append([name, *told, f"{read_ms / found['latency/decode_p50_ms']:.2f}" if spec.grids else ""])
    print(f"{gb_per_s:.3g} GB/s are read\n")
    table(["engine", *METRICS, "share of the roofline"], rows)
    print("What the recipes lose of the reference model\n")
    table(["recipe", "divergence from fp32, nats", "perplexity"], _losses(folder))
    for name in PROFILED:
        print(f"Where a token's time goes: {name}\n")
        table(["operator", "calls", "ms a token", "share"], _profile(folder, engines[name]))


def _losses(folder: Path) -> list[list[object]]:
    """What llama.cpp's types and blocks of several sizes lose of the reference model, on one text, by one formula."""
    subject = subjects()[0]
    chosen = [*subject.chosen, *only("quality")]
    recipes = {
        "blocks of 32": ["recipe=int4"],
        "blocks of 128, GPTQ": ["recipe=gptq_int4", "step.quantize.block_size=128"],
        "blocks of 256, GPTQ": ["recipe=gptq_int4", "step.quantize.block_size=256"],
        "blocks of 256, GPTQ and QAT": ["recipe=qat_int4", "step.quantize.block_size=256"],
    }
    windows = peers.evaluation_windows(subject.folder, chosen)
    exact = _logits(engine_of(folder, cli(folder, "run", *chosen, "recipe=baseline", "runtime=torch")), windows)
    rows = []
    if peers.llama_cpp_runs_here():
        for kind in PEERS:
            engine = Path(tempfile.mkdtemp(dir=folder))
            peers.llama_cpp(subject.folder, engine, kind)
            found = figures(cli(folder, "bench", "--engine", str(engine), *chosen))
            rows.append([f"llama.cpp, {kind}", _divergence(exact, _logits(engine, windows)), found[PERPLEXITY]])
    for name, recipe in recipes.items():
        document = cli(folder, "run", *chosen, *recipe, *TABLES)
        logits = _logits(engine_of(folder, document), windows)
        rows.append([name, _divergence(exact, logits), figures(document)[PERPLEXITY]])
    return rows


def _logits(engine: Path, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    from edgeopt import assembly

    read, runtime = assembly.open_engine(engine)
    session = runtime.open(read, threads=2)
    return [session.logits(window) for window in windows]


def _divergence(exact: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Mean over the positions of the Kullback-Leibler divergence, in nats."""
    from edgeopt.measure.logits import divergence

    return statistics.mean(float(divergence(*pair).mean()) for pair in zip(exact, found, strict=True))


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
