"""Build fake engines of a toy language of 64 words and measure them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.corpus import Text
from edgeopt.core.result import Measurement
from edgeopt.core.target import Target
from edgeopt.measure.harness.bench import Bench, measure
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from support import specs

CONF = Path(__file__).parents[2] / "conf"
WORDS = [f"w{i}" for i in range(63)] + ["<unk>"]
SPEC = specs.llama(vocabulary=len(WORDS), hidden=16, intermediate=64, heads=1, kv_heads=1, layers=1, context=512)
TASKS = Path(__file__).parent / "tasks"
"""Folder with two lm-eval tasks over twelve documents of the toy language."""
LM_EVAL = find_spec("lm_eval") is not None
TARGET = Target(name="toy", threads=1, context_length=128)


def make_text(seed: int = 0, documents: int = 30, words: int = 150) -> Text:
    """Generate documents of random words."""
    generator = random.Random(seed)
    return Text(
        name=f"toy {seed}", documents=tuple(" ".join(generator.choices(WORDS[:-1], k=words)) for _ in range(documents))
    )


def build(folder: Path, runtime: FakeRuntime) -> Engine:
    """Build an engine of the toy language in `folder`/engine."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    directory = folder / "engine"
    directory.mkdir()
    sealed = Checkpoint.seal(checkpoint, format="toy", spec=SPEC, made_by={})
    runtime.build(sealed, directory, lambda line: None)
    return Engine.seal(directory, format=runtime.format, spec=SPEC, made_by={})


def probe_config(name: str, **values: Any) -> dict[str, Any]:
    """Return the config of the probe in conf/probe/NAME.yaml with its default values, except `values`."""
    target = yaml.safe_load((CONF / "probe" / f"{name}.yaml").read_text())["_target_"]
    return {"_target_": target, **values}


def make_bench(*probes: str, **values: Any) -> Bench:
    """Build a bench with the named probes; no run counts as disturbed unless `values` sets stricter tolerances."""
    configs = {name: probe_config(name) for name in probes}
    tolerant = {"foreign_cpu_share": 1.0, "halves_tolerance": 1e9, "slowed_share": 1.0}
    return Bench(**{"probes": configs, "max_windows": 8, "timeout_s": 60.0, **tolerant, **values})


def build_and_measure(
    folder: Path,
    runtime: FakeRuntime,
    bench: Bench,
    *,
    target: Target = TARGET,
    references: Mapping[str, Path] | None = None,
    evaluation: Text | None = None,
) -> dict[str, Measurement]:
    """Build an engine in `folder`, measure it there, and return the measurements by metric."""
    measurements = measure(
        build(folder, runtime),
        runtime,
        bench,
        target,
        evaluation or make_text(),
        folder / "measured",
        references or {},
        lambda line: None,
    )
    return {measurement.metric: measurement for measurement in measurements}
