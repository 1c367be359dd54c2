"""Test the builder of genai engines: fused MLPs, logging and the stamped revision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import adapter_checkpoints
from support.stages import apply_step, build_engine

from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.protocols import Step
from edgeopt.errors import ConfigError
from edgeopt.runtimes.genai import producer
from edgeopt.runtimes.genai.runtime import Genai

PROMPT = [1, 17, 42, 99, 7]
BUILD = """
import logging, sys
from pathlib import Path
from edgeopt.core.artifact import Checkpoint
from edgeopt.runtimes.genai.runtime import Genai

Genai().build(Checkpoint.read(Path(sys.argv[1])), Path(sys.argv[2]), lambda _: None)
assert logging.getLogger().level == logging.WARNING and logging.getLogger().handlers == []
"""


def test_build_keeps_logging_configuration(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A library that the builder imports configures the root logger to write everything to stderr."""
    (tmp_path / "engine").mkdir()
    command = [sys.executable, "-c", BUILD, str(checkpoint.directory), str(tmp_path / "engine")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "step",
    [
        None,
        PruneWidth(ratio=0.25, multiple=16),
        Quantize(weights="int4"),
        Quantize(weights="int8", symmetric=True, bias_correction=True, windows=2, window_tokens=32),
        Int8(),
        Int8(ranges="min_max", windows=2, window_tokens=32),
    ],
    ids=["fp32", "pruned", "int4", "int8 with biases", "dynamic int8", "static int8"],
)
def test_gate_up_fusion_preserves_logits(checkpoint: Checkpoint, tmp_path: Path, step: Step | None) -> None:
    model = checkpoint if step is None else apply_step(step, checkpoint, tmp_path / "checkpoint")
    products, logits = [], []
    for fused in (False, True):
        runtime = Genai(gate_up_fused=fused)
        engine = build_engine(runtime, model, tmp_path / str(fused))
        nodes = onnx.load(engine.directory / "model.onnx", load_external_data=False).graph.node
        products.append(sum("/mlp/" in node.name and "MatMul" in node.op_type for node in nodes))
        logits.append(runtime.open(engine, threads=1).logits(PROMPT))
    assert products == [3 * len(model.spec.layers), 2 * len(model.spec.layers)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[0]).max()


def test_gate_up_fusion_rejects_adapters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapted = adapter_checkpoints.add_adapter(checkpoint, tmp_path / "adapted", "r8")
    with pytest.raises(ConfigError, match=r"runtime\.gate_up_fused: .*merge=true"):
        Genai(gate_up_fused=True).check(adapted.spec)


def test_engine_names_published_builder_revision(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = build_engine(Genai(), checkpoint, tmp_path / "engine")
    version = onnx.load(engine.directory / "model.onnx", load_external_data=False).producer_version
    assert version.endswith(f"+{producer.published_commit()[:7]}")


def test_stamped_revision_changes_nothing_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = build_engine(Genai(), checkpoint, tmp_path / "engine")
    before = {name: (engine.directory / name).read_bytes() for name in producer.GRAPHS}
    producer.stamp(engine.directory, "0123456789abcdef")
    for name in producer.GRAPHS:
        graph = onnx.load(engine.directory / name, load_external_data=False)
        assert graph.producer_version.endswith("+0123456")
    producer.stamp(engine.directory, producer.published_commit())
    assert {name: (engine.directory / name).read_bytes() for name in producer.GRAPHS} == before
