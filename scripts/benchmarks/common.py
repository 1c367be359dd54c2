"""What the benchmarks share: commands as a user types them, tables, and models to measure."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

EDGEOPT = str(Path(sys.executable).with_name("edgeopt"))
REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
Name = TypeVar("Name", bound=Hashable)
REPEATS = 5
PROBES = ("memory", "latency", "quality", "continuations", "parity", "energy")


def cli(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON document that a command prints; what it says on stderr is shown as it comes."""
    done = subprocess.run([EDGEOPT, *arguments, "--json"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def only(*probes: str) -> list[str]:
    """Overrides that leave these probes, beside size, and switch the others off."""
    return [f"measure.probes.{name}=null" for name in PROBES if name not in probes]


def figures(document: dict[str, Any]) -> dict[str, float]:
    return {m["metric"]: m["value"] for m in document["measurements"]}


def intervals(document: dict[str, Any], metric: str) -> tuple[float, float]:
    found = next(m for m in document["measurements"] if m["metric"] == metric)
    return found["low"], found["high"]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")
    print(flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeContext:
    """A trained model with the overrides that choose it and its texts."""

    title: str
    folder: Path
    chosen: tuple[str, ...] = ()


def subjects() -> list[ProbeContext]:
    """The reference model and, where the real data are at hand, TinyStories-656K."""
    import edgeopt

    found = [ProbeContext(title="reference model", folder=Path(edgeopt.__file__).parent / "reference")]
    stories = REALDATA / "TinyStories-656K"
    if stories.is_dir():
        texts = [
            f"text@{use}=file {use}.path={REALDATA / 'tinystories' / use}.jsonl"
            for use in ("calibration", "evaluation")
        ]
        chosen = ("model=local", f"model.path={stories}", *" ".join(texts).split())
        found.append(ProbeContext(title="TinyStories-656K", folder=stories, chosen=chosen))
    return found


def in_turn(
    folder: Path, engines: Mapping[Name, Path], rounds: int = 3, target: Sequence[str] = ()
) -> dict[Name, dict[str, float]]:
    """Medians of what `edgeopt bench` says of each engine's size, memory and latency, measured one after another."""
    off = [*only("memory", "latency"), *target]
    measured: dict[Name, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            measured[name].append(figures(cli(folder, "bench", "--engine", str(engine), *off)))
    return {
        name: {metric: statistics.median(run[metric] for run in runs) for metric in runs[0]}
        for name, runs in measured.items()
    }


def engine_of(folder: Path, document: Mapping[str, Any]) -> Path:
    """The engine's folder in a document of `edgeopt run`."""
    return folder / document["engine"]["directory"]


def compare(
    folder: Path, commands: Mapping[str, Sequence[str]], quality: Sequence[str] = ("quality/perplexity",)
) -> None:
    """A table of recipes: built and judged once, then timed in turn; ratios are to the first."""
    documents = {name: cli(folder, "run", *command) for name, command in commands.items()}
    measured = in_turn(folder, {name: engine_of(folder, document) for name, document in documents.items()})
    shown = ("size/engine_mib", "latency/decode_p50_ms", "latency/ttft_256_ms", "memory/peak_rss_mib")
    first = measured[next(iter(commands))]
    rows = []
    for name, document in documents.items():
        own, judged = measured[name], figures(document)
        timed = [f"{own[metric]:.4g} ({own[metric] / first[metric]:.2f})" for metric in shown]
        rows.append([name, *timed, *(judged.get(metric, float("nan")) for metric in quality)])
    table(["recipe", *shown, *quality], rows)


def timed(name: str, action: Callable[[], object]) -> None:
    """Print the median of what an action takes, done a few times."""
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    print(f"{name}: {statistics.median(seconds):.2f} s", flush=True)


def workers_of(sweep: int) -> list[Any]:
    """The living worker processes of the sweep with this process number."""
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):  # the sweep has ended
        for child in psutil.Process(sweep).children():
            with contextlib.suppress(psutil.Error):  # it is dead, and only not yet waited for
                if "worker" in child.cmdline():
                    found.append(child)
    return found


def make_random_llama(folder: Path, context_length: int = 2048) -> None:
    """Hidden 1024, MLP 2816, 16 layers, 16 heads, 4 KV heads, vocabulary 32,000; the reference model's tokenizer."""
    import shutil

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
    modeling.initialize(spec, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(edgeopt.__file__).parent / "reference" / name, folder / name)
