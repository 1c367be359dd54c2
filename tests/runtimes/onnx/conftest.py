"""A random Llama and its portable engine, which the tests read and never change."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stages import build_engine

from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.onnx.random_models import import_random_checkpoint


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_random_checkpoint("llama", tiny_model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def fp32_engine(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(), llama, tmp_path_factory.mktemp("fp32") / "engine")
