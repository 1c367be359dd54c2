"""Benchmark weights that are stored in the layout that the kernels read."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import cli, engine_folder, make_random_llama, only, print_table

OPEN_AND_WAIT = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt.core.artifact import Engine
from edgeopt.machine.procfs import read_memory
from edgeopt.runtimes.onnx import session
from edgeopt.runtimes.onnx.runtime import PortableOnnx

runtime, engine = PortableOnnx(**json.loads(sys.argv[2])), Engine.read(Path(sys.argv[1]))
start = time.perf_counter()
opened = runtime.open(engine, threads=2)
report = {"opening, ms": 1e3 * (time.perf_counter() - start)}
moments = [time.perf_counter() for _ in opened.generate(list(range(5, 21)), 9, stop_at_end=False)]
report["ms/token"] = 1e3 * statistics.median(b - a for a, b in zip(moments, moments[1:]))
report |= {f"{name}, MB": read_memory()[f"{name}_bytes"] / 1e6 for name in ("private", "pss", "rss")}
print(json.dumps(report), flush=True)
sys.stdin.read()
"""
"""A process that opens an engine, generates, prints its report, and holds the engine open until stdin closes."""
LAYOUTS: dict[str, dict[str, bool]] = {
    "by each process": {},
    "on disk": {"packed_on_disk": True},
    "not prepacked": {"prepacked": False},
}


def prepacked(folder: Path) -> None:
    """Weights of the 246 M shape prepacked by each process, prepacked on disk, or not prepacked.

    Two processes hold the engine open at once. Values are medians of the second process.
    """
    model = folder / "llama246m"
    make_random_llama(model)
    overrides = ["model=local", f"model.path={model}", *only(), "runtime=onnx"]
    rows: list[list[object]] = []
    for recipe in ("baseline", "int8", "int4"):
        engines = {}
        for layout, options in LAYOUTS.items():
            runtime = [f"runtime.{key}={str(value).lower()}" for key, value in options.items()]
            engines[layout] = engine_folder(folder, cli(folder, "run", *overrides, f"recipe={recipe}", *runtime))
        reports: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
        for _ in range(3):
            for layout, engine in engines.items():
                with _open_in_process(engine, LAYOUTS[layout]), _open_in_process(engine, LAYOUTS[layout]) as second:
                    reports[layout].append(second)
        for layout, runs in reports.items():
            disk_mb = sum(path.stat().st_size for path in engines[layout].glob("*.data")) / 1e6
            medians = (statistics.median(run[name] for run in runs) for name in runs[0])
            rows.append([recipe, layout, disk_mb, *medians])
    print_table(["recipe", "prepacked", "weights on disk, MB", *reports["on disk"][0]], rows)


@contextlib.contextmanager
def _open_in_process(engine: Path, options: dict[str, bool]) -> Iterator[dict[str, float]]:
    """Hold an engine open in another process and yield the report of that process."""
    command = [sys.executable, "-c", OPEN_AND_WAIT, str(engine), json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()
