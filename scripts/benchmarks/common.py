"""Run edgeopt commands, print tables and provide the models that the benchmarks measure."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

EDGEOPT = str(Path(sys.executable).with_name("edgeopt"))
REALDATA = Path(__file__).parents[3] / "shared" / "realdata"
"""Published models and texts next to the checkout, which are never downloaded."""
Name = TypeVar("Name", bound=Hashable)
REPEATS = 5
PROBES = ("memory", "latency", "quality", "continuations", "parity", "energy")


def cli(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run an edgeopt command and return its JSON document. The command's stderr is shown."""
    process = subprocess.run([EDGEOPT, *arguments, "--json"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(process.stdout)
    return document


def only(*probes: str) -> list[str]:
    """Return overrides that disable all probes except size and the given ones."""
    return [f"measure.probes.{name}=null" for name in PROBES if name not in probes]


def metrics_of(document: dict[str, Any]) -> dict[str, float]:
    """Return the measured values in the document of a command, by metric."""
    return {m["metric"]: m["value"] for m in document["measurements"]}


def interval_of(document: dict[str, Any], metric: str) -> tuple[float, float]:
    """Return the ends of the confidence interval of a metric."""
    measurement = next(m for m in document["measurements"] if m["metric"] == metric)
    return measurement["low"], measurement["high"]


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")
    print(flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkModel:
    """A trained model and the overrides that select it and its texts."""

    title: str
    folder: Path
    overrides: tuple[str, ...] = ()


def trained_models() -> list[BenchmarkModel]:
    """Return the reference model, and TinyStories-656K if its files are present."""
    import edgeopt

    models = [BenchmarkModel(title="reference model", folder=Path(edgeopt.__file__).parent / "reference")]
    stories = REALDATA / "TinyStories-656K"
    if stories.is_dir():
        overrides = ["model=local", f"model.path={stories}"]
        for role in ("calibration", "evaluation"):
            overrides += [f"text@{role}=file", f"{role}.path={REALDATA / 'tinystories' / role}.jsonl"]
        models.append(BenchmarkModel(title="TinyStories-656K", folder=stories, overrides=tuple(overrides)))
    return models


def bench_interleaved(
    folder: Path, engines: Mapping[Name, Path], rounds: int = 3, target: Sequence[str] = ()
) -> dict[Name, dict[str, float]]:
    """Run `edgeopt bench` on all engines in turn and return medians of size, memory and latency over the rounds."""
    overrides = [*only("memory", "latency"), *target]
    measured: dict[Name, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            measured[name].append(metrics_of(cli(folder, "bench", "--engine", str(engine), *overrides)))
    return {
        name: {metric: statistics.median(run[metric] for run in runs) for metric in runs[0]}
        for name, runs in measured.items()
    }


def engine_folder(folder: Path, document: Mapping[str, Any]) -> Path:
    """Return the engine's folder, as `edgeopt run` reported it."""
    return folder / str(document["engine"]["directory"])


def compare(
    folder: Path, commands: Mapping[str, Sequence[str]], quality: Sequence[str] = ("quality/perplexity",)
) -> None:
    """Print a table of recipes, built and evaluated once and then timed in turn. Ratios are to the first recipe."""
    documents = {name: cli(folder, "run", *command) for name, command in commands.items()}
    measured = bench_interleaved(
        folder, {name: engine_folder(folder, document) for name, document in documents.items()}
    )
    timed_metrics = ("size/engine_mib", "latency/decode_p50_ms", "latency/ttft_256_ms", "memory/peak_rss_mib")
    first = measured[next(iter(commands))]
    rows = []
    for name, document in documents.items():
        medians, evaluated = measured[name], metrics_of(document)
        timings = [f"{medians[metric]:.4g} ({medians[metric] / first[metric]:.2f})" for metric in timed_metrics]
        rows.append([name, *timings, *(evaluated.get(metric, float("nan")) for metric in quality)])
    print_table(["recipe", *timed_metrics, *quality], rows)


def print_time(name: str, action: Callable[[], object]) -> None:
    """Print the median time of an action."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {statistics.median(seconds):.2f} s", flush=True)


def worker_processes(sweep: int) -> list[Any]:
    """Return the running worker processes of the sweep with process id `sweep`."""
    import psutil

    workers = []
    with contextlib.suppress(psutil.Error):  # the sweep has ended
        for child in psutil.Process(sweep).children():
            with contextlib.suppress(psutil.Error):  # the worker has ended
                if "worker" in child.cmdline():
                    workers.append(child)
    return workers


def make_random_llama(folder: Path, context_length: int = 2048) -> None:
    """Write a random Llama of 246 M parameters with the reference model's tokenizer.

    Hidden size 1024, MLP 2816, 16 layers, 16 heads, 4 KV heads, vocabulary 32,000.
    """
    import edgeopt
    from edgeopt.checkpoints import modeling
    from edgeopt.core.model_spec import LayerSpec, ModelSpec

    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        vocabulary_size=32000,
        hidden_size=1024,
        head_size=64,
        context_length=context_length,
        tied_embeddings=False,
        layers=(LayerSpec(intermediate_size=2816, heads=16, kv_heads=4),) * 16,
    )
    folder.mkdir(exist_ok=True)
    modeling.write_random_llama(spec, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(edgeopt.__file__).parent / "reference" / name, folder / name)
