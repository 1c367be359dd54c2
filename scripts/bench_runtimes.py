"""Benchmarks of the runtimes: one model in 4 bits on each, beside what llama.cpp's users would take."""

from __future__ import annotations

import collections
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import peers
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
from edgeopt.artifact import Engine
from edgeopt.runtimes.genai import Genai

session = Genai().open(Engine.read(Path(sys.argv[1])), threads=2)
session.close()
session._options["enable_profiling"] = sys.argv[2]
list(session.generate(list(range(5, 21)), int(sys.argv[3]), stop_at_end=False))
"""

GUESSED = (1, 2, 4, 8)
PROMPT, GOES_ON = 128, 96
READINGS = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt import assembly

engine, runtime = assembly.open_engine(Path(sys.argv[1]))
session = runtime.open(engine, threads=2)
past = (session._context if hasattr(session, "_context") else session._sequence)(256, None)
past.read(list(range(5, 37)), [31])
time.sleep(1)  # until pages are joined
found = {}
for count in (1, 2, 3, 4, 5, 9):
    taken = []
    for _ in range(30):
        begun = time.perf_counter()
        past.read(list(range(50, 50 + count)), range(count))
        taken.append(time.perf_counter() - begun)
        past.back(count)
    found[count] = 1e3 * statistics.median(taken)
print(json.dumps(found))
"""
"""What readings of several tokens take, in ms."""
OPENED = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt.artifact import Engine
from edgeopt.measure.process import memory
from edgeopt.runtimes.portable import PortableOnnx, session

runtime, engine = PortableOnnx(**json.loads(sys.argv[2])), Engine.read(Path(sys.argv[1]))
begun = time.perf_counter()
opened = runtime.open(engine, threads=2)
found = {"opened in ms": 1e3 * (time.perf_counter() - begun)}
moments = [time.perf_counter() for _ in opened.generate(list(range(5, 21)), 9, stop_at_end=False)]
found["ms a token"] = 1e3 * statistics.median(b - a for a, b in zip(moments, moments[1:]))
found |= {f"{name}, MB": memory()[f"{name}_bytes"] / 1e6 for name in ("private", "pss", "rss")}
print(json.dumps(found), flush=True)
sys.stdin.read()
"""
"""A process that opens an engine, generates, tells what it took, and has it open until it is told to end."""
PACKED: dict[str, dict[str, bool]] = {
    "by each process": {},
    "on disk": {"packed_on_disk": True},
    "not at all": {"prepacked": False},
}


def prepacked(folder: Path) -> None:
    """Weights of the 246 M shape in the layout of the kernels: made by each process, saved in the file, or not at all.

    Two processes at once, medians of the second, once it has generated.
    """
    model = folder / "llama246m"
    make_random_llama(model)
    chosen = ["model=local", f"model.path={model}", *only(), "runtime=onnx"]
    rows: list[list[object]] = []
    for recipe in ("baseline", "int8", "int4"):
        engines = {}
        for way, values in PACKED.items():
            given = [f"runtime.{key}={str(value).lower()}" for key, value in values.items()]
            engines[way] = engine_of(folder, cli(folder, "run", *chosen, f"recipe={recipe}", *given))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in PACKED}
        for _ in range(3):
            for way, engine in engines.items():
                with _opened(engine, PACKED[way]), _opened(engine, PACKED[way]) as second:
                    found[way].append(second)
        for way, runs in found.items():
            disk_mb = sum(p.stat().st_size for p in engines[way].glob("*.data")) / 1e6
            rows.append([recipe, way, disk_mb, *(statistics.median(run[name] for run in runs) for name in runs[0])])
    table(["recipe", "packed", "weights on disk, MB", *found["on disk"][0]], rows)


@contextlib.contextmanager
def _opened(engine: Path, values: dict[str, bool]) -> Iterator[dict[str, float]]:
    """A process with an engine open, and what it tells."""
    command = [sys.executable, "-c", OPENED, str(engine), json.dumps(values)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def runtimes(folder: Path) -> None:
    """The 246 M shape in 4 bits with two threads; ratios are to llama.cpp's Q4_K_M."""
    from edgeopt.measure.inventory import inventory

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
        rows.append([name, *told, _share(engines[name], found["latency/decode_p50_ms"], gb_per_s)])
    print(f"{gb_per_s:.3g} GB/s are read\n")
    table(["engine", *METRICS, "share of the roofline"], rows)
    for name in PROFILED:
        print(f"Where a token's time goes: {name}\n")
        table(["operator", "calls", "ms a token", "share"], _profile(folder, engines[name]))


def _share(engine: Path, decode_ms: float, gb_per_s: float) -> str:
    """Of a token's time, what reading its weights in the layout of ONNX Runtime's kernels takes at best."""
    from edgeopt.artifact import Engine
    from edgeopt.runtimes.llamacpp import LlamaCpp
    from edgeopt.runtimes.packed import packed_bytes
    from edgeopt.spec import EMBEDDING

    read = Engine.read(engine)
    if read.format == LlamaCpp.format:
        return ""
    spec = read.spec
    read_bytes = sum(packed_bytes(spec, unit) for unit in spec.matrices if unit != EMBEDDING)
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
    windows = peers.evaluation_windows(subject.folder, chosen)
    exact = _logits(engine_of(folder, cli(folder, "run", *chosen, "recipe=baseline", "runtime=torch")), windows)
    rows: list[list[object]] = []
    if peers.llama_cpp_runs_here():
        for kind in PEERS:
            engine = Path(tempfile.mkdtemp(dir=folder))
            peers.llama_cpp(subject.folder, engine, kind)
            found = figures(cli(folder, "bench", "--engine", str(engine), *chosen))
            rows.append([f"llama.cpp, {kind}", _divergence(exact, _logits(engine, windows)), found[PERPLEXITY]])
        recipes["llama.cpp, Q4_K_M, importance matrix"] = ["recipe=q4_k_m"]
    for name, recipe in recipes.items():
        tables = TABLES if "int4" in recipe[0] else ()
        document = cli(folder, "run", *chosen, *recipe, *tables)
        logits = _logits(engine_of(folder, document), windows)
        rows.append([name, _divergence(exact, logits), figures(document)[PERPLEXITY]])
    table(["recipe", "divergence from fp32, nats", "perplexity"], rows)


def guesses(folder: Path) -> None:
    """Prompt look-up: what a reading of several tokens takes of the 246 M shape, and how many come of one."""
    model = folder / "llama246m"
    make_random_llama(model)
    best = [*RECIPES[BEST], *TABLES, "runtime.prompt_lookup=8"]
    chosen = ["model=local", f"model.path={model}", *only(), "recipe=int4"]
    engines = {BEST: engine_of(folder, cli(folder, "run", *chosen, *best))}
    if peers.llama_cpp_runs_here():
        engines["llama.cpp, Q4_K_M"] = Path(tempfile.mkdtemp(dir=folder))
        peers.llama_cpp(model, engines["llama.cpp, Q4_K_M"], "Q4_K_M")
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(3):
        for name, engine in engines.items():
            told = subprocess.check_output([sys.executable, "-c", READINGS, str(engine)])
            taken[name].append(json.loads(told))
    ms = {n: {c: statistics.median(run[c] for run in runs) for c in runs[0]} for n, runs in taken.items()}
    table(["ms of a reading of", *(f"{count} tokens" for count in ms[BEST])], [[n, *ms[n].values()] for n in ms])
    rows, speeds = [], []
    for subject in subjects():
        document = cli(folder, "run", *subject.chosen, *only(), "recipe=int4", "runtime=onnx")
        windows = peers.evaluation_windows(subject.folder, subject.chosen)
        tokens = {g: _tokens_a_reading(engine_of(folder, document), windows, g) for g in GUESSED}
        rows.append([subject.title, *tokens.values()])
        for name, taken_by in ms.items():
            guessed, a_token = min(((g, taken_by[str(g + 1)] / tokens[g]) for g in GUESSED), key=lambda pair: pair[1])
            speeds.append([subject.title, name, taken_by["1"], a_token, guessed])
    table(["tokens of a reading, guessed at once:", *map(str, GUESSED)], rows)
    table(["texts of", "engine", "ms a token", "with guesses", "guessed at once"], speeds)


def _tokens_a_reading(engine: Path, windows: Sequence[Sequence[int]], guessed: int) -> float:
    """Of a model that goes on where its text was cut."""
    from edgeopt.artifact import Engine
    from edgeopt.measure.pace import AT_ONCE_S
    from edgeopt.runtimes.portable import PortableOnnx

    session = PortableOnnx(prompt_lookup=guessed).open(Engine.read(engine), threads=2)
    made = readings = 0
    for window in windows:
        moments = [time.perf_counter() for _ in session.generate(window[:PROMPT], GOES_ON, stop_at_end=False)]
        made += len(moments)
        readings += 1 + sum(after - before >= AT_ONCE_S for before, after in pairwise(moments))
    return made / readings


def _logits(engine: Path, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    from edgeopt import assembly

    read, runtime = assembly.open_engine(engine)
    session = runtime.open(read, threads=2)
    return [session.logits(window) for window in windows]


def _divergence(exact: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Mean over the positions of the Kullback-Leibler divergence, in nats."""
    from edgeopt.measure.logits import divergence, log_probabilities

    pairs = zip(map(log_probabilities, exact), map(log_probabilities, found), strict=True)
    return statistics.mean(float(divergence(*pair).mean()) for pair in pairs)


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
