"""Provide small checkpoints of families that llama.cpp supports."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.core.artifact import Checkpoint
from runtimes.onnx.random_models import ALL_FAMILIES, import_random_checkpoint


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_random_checkpoint("llama", tiny_model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Return Gemma models that scale attention scores by the head size, as all but the largest published ones do."""
    checkpoints = {}
    for family in ("gemma2", "gemma3"):
        kind, values = ALL_FAMILIES[family]
        scaled = {**values, "query_pre_attn_scalar": 16}
        checkpoints[family] = import_random_checkpoint((kind, scaled), tiny_model, tmp_path_factory.mktemp(family))
    return checkpoints
