"""Benchmark prompt lookup: draft tokens that the model verifies in one call."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks import baselines
from benchmarks.common import cli, engine_folder, make_random_llama, only, print_table, trained_models
from benchmarks.runtimes import BEST, INT4_EMBEDDING, RECIPES

DRAFT_TOKENS = (1, 2, 4, 8)
PROMPT_TOKENS, NEW_TOKENS = 128, 96
TIME_CALLS = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt.config import assemble

engine, runtime = assemble.open_engine(Path(sys.argv[1]))
session = runtime.open(engine, threads=2)
state = session._new_sequence(256, None)
state.forward(list(range(5, 37)), [31])
time.sleep(1)  # until huge pages are collapsed
medians_ms = {}
for count in (1, 2, 3, 4, 5, 9):
    times = []
    for _ in range(30):
        start = time.perf_counter()
        state.forward(list(range(50, 50 + count)), range(count))
        times.append(time.perf_counter() - start)
        state.rollback(count)
    medians_ms[count] = 1e3 * statistics.median(times)
print(json.dumps(medians_ms))
"""
"""A process that prints the median time of calls with several tokens, in ms."""


def guesses(folder: Path) -> None:
    """Prompt lookup: time of a call with several tokens of the 246 M shape, and tokens accepted per call."""
    model = folder / "llama246m"
    make_random_llama(model)
    best = [*RECIPES[BEST], *INT4_EMBEDDING, "runtime.prompt_lookup=8"]
    overrides = ["model=local", f"model.path={model}", *only(), "recipe=int4"]
    engines = {BEST: engine_folder(folder, cli(folder, "run", *overrides, *best))}
    if baselines.has_llama_cpp():
        engines["llama.cpp, Q4_K_M"] = Path(tempfile.mkdtemp(dir=folder))
        baselines.build_llama_cpp(model, engines["llama.cpp, Q4_K_M"], "Q4_K_M")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(3):
        for name, engine in engines.items():
            output = subprocess.check_output([sys.executable, "-c", TIME_CALLS, str(engine)])
            rounds[name].append(json.loads(output))
    call_ms = {
        name: {count: statistics.median(run[count] for run in runs) for count in runs[0]}
        for name, runs in rounds.items()
    }
    print_table(
        ["ms/call with", *(f"{count} tokens" for count in call_ms[BEST])],
        [[name, *times.values()] for name, times in call_ms.items()],
    )
    rows, speeds = [], []
    for trained in trained_models():
        document = cli(folder, "run", *trained.overrides, *only(), "recipe=int4", "runtime=onnx")
        windows = baselines.evaluation_windows(trained.folder, trained.overrides)
        engine = engine_folder(folder, document)
        accepted = {drafts: _tokens_per_call(engine, windows, drafts) for drafts in DRAFT_TOKENS}
        rows.append([trained.title, *accepted.values()])
        for name, times in call_ms.items():
            drafts, token_ms = min(
                ((drafts, times[str(drafts + 1)] / accepted[drafts]) for drafts in DRAFT_TOKENS),
                key=lambda pair: pair[1],
            )
            speeds.append([trained.title, name, times["1"], token_ms, drafts])
    print_table(["tokens per call, by draft tokens:", *map(str, DRAFT_TOKENS)], rows)
    print_table(["text of", "engine", "ms/token", "with prompt lookup", "draft tokens"], speeds)


def _tokens_per_call(engine: Path, windows: Sequence[Sequence[int]], draft_tokens: int) -> float:
    """Return the mean number of generated tokens per call of the model, when it continues the windows."""
    from edgeopt.core.artifact import Engine
    from edgeopt.machine.contention import BURST_GAP_S
    from edgeopt.runtimes.onnx.runtime import PortableOnnx

    session = PortableOnnx(prompt_lookup=draft_tokens).open(Engine.read(engine), threads=2)
    tokens = calls = 0
    for window in windows:
        prompt = window[:PROMPT_TOKENS]
        moments = [time.perf_counter() for _ in session.generate(prompt, NEW_TOKENS, stop_at_end=False)]
        tokens += len(moments)
        calls += 1 + sum(after - before >= BURST_GAP_S for before, after in pairwise(moments))
    return tokens / calls
