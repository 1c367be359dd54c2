"""Benchmark of weights that lie in the file as the kernels want them."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import cli, engine_of, make_random_llama, only, table

OPENED = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt.core.artifact import Engine
from edgeopt.machine.procfs import read_memory
from edgeopt.runtimes.onnx import session
from edgeopt.runtimes.onnx.runtime import PortableOnnx

runtime, engine = PortableOnnx(**json.loads(sys.argv[2])), Engine.read(Path(sys.argv[1]))
begun = time.perf_counter()
opened = runtime.open(engine, threads=2)
found = {"opened in ms": 1e3 * (time.perf_counter() - begun)}
moments = [time.perf_counter() for _ in opened.generate(list(range(5, 21)), 9, stop_at_end=False)]
found["ms a token"] = 1e3 * statistics.median(b - a for a, b in zip(moments, moments[1:]))
found |= {f"{name}, MB": read_memory()[f"{name}_bytes"] / 1e6 for name in ("private", "pss", "rss")}
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
