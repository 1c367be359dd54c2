"""Provide a quantized checkpoint, its TensorRT build plan and an empty timing cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stages import apply_step, build_engine

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.runtimes.tensorrt.runtime import TensorRt


@pytest.fixture(autouse=True)
def timing_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the kernel timing caches, empty at the start of each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "edgeopt" / "tensorrt"


@pytest.fixture(scope="module")
def int4_checkpoint(checkpoint, tmp_path_factory) -> Checkpoint:
    step = Quantize(weights="int4", lm_head="int4", embedding="float", symmetric=True)
    return apply_step(step, checkpoint, tmp_path_factory.mktemp("int4") / "checkpoint")


@pytest.fixture(scope="module")
def planned(int4_checkpoint, tmp_path_factory) -> Engine:
    return build_engine(TensorRt(), int4_checkpoint, tmp_path_factory.mktemp("plans") / "plan")
