"""Benchmark of prompt look-up: several tokens that are guessed and read at once."""

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
from benchmarks.common import cli, engine_of, make_random_llama, only, subjects, table
from benchmarks.runtimes import BEST, RECIPES, TABLES

GUESSED = (1, 2, 4, 8)
PROMPT, GOES_ON = 128, 96
READINGS = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt import assembly

engine, runtime = assembly.open_engine(Path(sys.argv[1]))
session = runtime.open(engine, threads=2)
past = session._sequence(256, None)
past.forward(list(range(5, 37)), [31])
time.sleep(1)  # until pages are joined
found = {}
for count in (1, 2, 3, 4, 5, 9):
    taken = []
    for _ in range(30):
        begun = time.perf_counter()
        past.forward(list(range(50, 50 + count)), range(count))
        taken.append(time.perf_counter() - begun)
        past.rollback(count)
    found[count] = 1e3 * statistics.median(taken)
print(json.dumps(found))
"""
"""What readings of several tokens take, in ms."""


def guesses(folder: Path) -> None:
    """Prompt look-up: what a reading of several tokens takes of the 246 M shape, and how many come of one."""
    model = folder / "llama246m"
    make_random_llama(model)
    best = [*RECIPES[BEST], *TABLES, "runtime.prompt_lookup=8"]
    chosen = ["model=local", f"model.path={model}", *only(), "recipe=int4"]
    engines = {BEST: engine_of(folder, cli(folder, "run", *chosen, *best))}
    if baselines.llama_cpp_runs_here():
        engines["llama.cpp, Q4_K_M"] = Path(tempfile.mkdtemp(dir=folder))
        baselines.llama_cpp(model, engines["llama.cpp, Q4_K_M"], "Q4_K_M")
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
        windows = baselines.evaluation_windows(subject.folder, subject.chosen)
        tokens = {g: _tokens_a_reading(engine_of(folder, document), windows, g) for g in GUESSED}
        rows.append([subject.title, *tokens.values()])
        for name, taken_by in ms.items():
            guessed, a_token = min(((g, taken_by[str(g + 1)] / tokens[g]) for g in GUESSED), key=lambda pair: pair[1])
            speeds.append([subject.title, name, taken_by["1"], a_token, guessed])
    table(["tokens of a reading, guessed at once:", *map(str, GUESSED)], rows)
    table(["texts of", "engine", "ms a token", "with guesses", "guessed at once"], speeds)


def _tokens_a_reading(engine: Path, windows: Sequence[Sequence[int]], guessed: int) -> float:
    """Of a model that goes on where its text was cut."""
    from edgeopt.core.artifact import Engine
    from edgeopt.machine.contention import BURST_GAP_S
    from edgeopt.runtimes.onnx.runtime import PortableOnnx

    session = PortableOnnx(prompt_lookup=guessed).open(Engine.read(engine), threads=2)
    made = readings = 0
    for window in windows:
        moments = [time.perf_counter() for _ in session.generate(window[:PROMPT], GOES_ON, stop_at_end=False)]
        made += len(moments)
        readings += 1 + sum(after - before >= BURST_GAP_S for before, after in pairwise(moments))
    return made / readings
