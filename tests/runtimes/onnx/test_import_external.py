"""Test that graphs of other exporters are imported, and that invalid ones are rejected."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgeopt.checkpoints import modeling
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.errors import InputError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.import_external import import_graph
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.onnx.random_models import torch_logits
from runtimes.test_families import PROMPT


def export_foreign_graph(network: Any, path: Path, *, growing: bool) -> None:
    """Export a graph as other exporters do: with a growing cache, or without a cache."""
    import torch
    from transformers import DynamicCache

    class WithGrowingCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask, position_ids, past):  # type: ignore[no-untyped-def]
            cache = DynamicCache()
            for layer_index in range(len(past) // 2):
                cache.update(past[2 * layer_index], past[2 * layer_index + 1], layer_index)
            output = self.network(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
            )
            return (output.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    class WithoutCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids):  # type: ignore[no-untyped-def]
            return self.network(input_ids, use_cache=False).logits

    dynamic = torch.export.Dim.DYNAMIC
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    options: dict[str, Any] = {"dynamo": True, "verbose": False}
    if growing:
        layers = network.config.num_hidden_layers
        past = [torch.zeros(1, 2, 4, 16) for _ in range(2 * layers)]
        torch.onnx.export(
            WithGrowingCache().eval(),
            (tokens, torch.ones(1, 9, dtype=torch.int64), torch.arange(4, 9)[None], past),
            path,
            dynamic_shapes=({1: dynamic}, {1: dynamic}, {1: dynamic}, [{2: dynamic} for _ in past]),
            input_names=["input_ids", "attention_mask", "position_ids", *graph.cache_names(layers, graph.PAST_PREFIX)],
            output_names=["logits", *graph.cache_names(layers, graph.PRESENT_PREFIX)],
            **options,
        )
    else:
        names = {"input_names": ["input_ids"], "output_names": ["logits"]}
        torch.onnx.export(WithoutCache().eval(), (tokens,), path, dynamic_shapes=({1: dynamic},), **names, **options)


class TestImportedGraphs:
    @pytest.mark.parametrize("growing", [True, False], ids=["with a cache", "without a cache"])
    def test_imported_graph_matches_its_model(
        self, growing: bool, llama: Checkpoint, fp32_engine: Engine, tmp_path: Path
    ) -> None:
        (tmp_path / "foreign").mkdir()
        (tmp_path / "engine").mkdir()
        export_foreign_graph(modeling.load(llama), tmp_path / "foreign" / "decoder.onnx", growing=growing)
        engine = import_graph(tmp_path / "foreign" / "decoder.onnx", llama.directory, tmp_path / "engine")
        engine.verify()
        session, reference = (PortableOnnx().open(candidate, threads=1) for candidate in (engine, fp32_engine))
        assert relative_error(torch_logits(llama), session.logits(PROMPT)) < 1e-4
        tokens, expected = (list(opened.generate(PROMPT[:40], 8, stop_at_end=False)) for opened in (session, reference))
        assert tokens == expected

    def import_error(self, path: Path, source: Path, folder: Path) -> str:
        folder.mkdir()
        with pytest.raises(InputError) as caught:
            import_graph(path, source, folder)
        return str(caught.value)

    def test_invalid_graph_is_rejected(self, llama: Checkpoint, tmp_path: Path) -> None:
        from onnx import TensorProto, helper

        (tmp_path / "text.onnx").write_text("no graph")
        assert "not a readable ONNX graph" in self.import_error(tmp_path / "text.onnx", llama.directory, tmp_path / "a")
        for name, message in (("pixels", "'pixels'"), ("attention_mask", "must have the input `input_ids`")):
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
            result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
            identity = helper.make_graph([helper.make_node("Identity", [name], ["y"])], "g", [value], [result])
            onnx.save(helper.make_model(identity), tmp_path / f"{name}.onnx")
            assert message in self.import_error(tmp_path / f"{name}.onnx", llama.directory, tmp_path / name)

    def test_weights_outside_graph_folder_are_rejected(
        self, llama: Checkpoint, fp32_engine: Engine, tmp_path: Path
    ) -> None:
        (tmp_path / "foreign").mkdir()
        path = tmp_path / "foreign" / "decoder.onnx"
        shutil.copytree(fp32_engine.directory, tmp_path / "own")
        model = onnx.load(fp32_engine.directory / graph.GRAPH_FILE, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"../own/{entry.value}"
        path.write_bytes(model.SerializeToString())
        assert "must be in its folder, got '../own/model.onnx.data'" in self.import_error(
            path, llama.directory, tmp_path / "engine"
        )
