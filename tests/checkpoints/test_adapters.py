"""Check that written adapters can be read, and that attached adapters compute the same as merged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import adapter_checkpoints, specs

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRankUpdate
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError, InputError

IDS = torch.tensor([[1, 17, 42, 99, 7]])


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Checkpoint:
    (tmp_path / "in").mkdir()
    return adapter_checkpoints.add_adapter(import_checkpoint(tiny_model, tmp_path / "in"), tmp_path / "adapted", "r4")


def test_written_adapter_is_read(tmp_path: Path) -> None:
    written = {"model.layers.0.o": LowRankUpdate(down=torch.randn(2, 5), up=torch.randn(3, 2))}
    adapters.write(written, tmp_path, "one")
    adapters.write({}, tmp_path, "none")
    read = adapters.read(tmp_path, "one")
    assert read.keys() == written.keys()
    torch.testing.assert_close(read["model.layers.0.o"].weight, written["model.layers.0.o"].weight)
    assert adapters.read(tmp_path, "none") == {}


def test_truncated_or_missing_adapter_is_rejected(checkpoint: Checkpoint) -> None:
    (checkpoint.directory / "adapters" / "cut.safetensors").write_bytes(b"\0" * 20)
    for name in ("cut", "missing"):
        with pytest.raises(InputError, match=f"{name}.safetensors"):
            adapters.read(checkpoint.directory, name)


def test_attached_adapter_equals_merged_adapter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = modeling.load(checkpoint)
    base = network(IDS).logits
    with adapters.attached(network, adapters.read(checkpoint.directory, "r4")):
        attached = network(IDS).logits
    expected = modeling.load(adapter_checkpoints.merge_adapter(checkpoint, tmp_path / "merged", "r4"))(IDS).logits
    assert (attached - base).abs().max() > 0.1 * base.abs().max()
    torch.testing.assert_close(attached, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(IDS).logits, base)


def test_loaded_network_has_no_adapter_parameters(checkpoint: Checkpoint) -> None:
    assert sum(p.numel() for p in modeling.load(checkpoint).parameters()) == checkpoint.spec.parameters


def test_unknown_adapter_error_lists_adapters(checkpoint: Checkpoint) -> None:
    adapters.require("r4", checkpoint.spec)
    adapters.require(None, checkpoint.spec)
    with pytest.raises(ConfigError, match=r"the adapter must be one of r4; got 'r8'"):
        adapters.require("r8", checkpoint.spec)
    with pytest.raises(ConfigError, match="built without adapters"):
        adapters.require("r8", specs.llama())
