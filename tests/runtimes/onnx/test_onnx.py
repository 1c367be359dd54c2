"""Test that portable ONNX engines match PyTorch for every decoder family, and that other graphs can be imported."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.stages import apply_step, build_engine

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.errors import BuildError, ConfigError, InputError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.import_external import import_graph
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.test_families import FAMILIES, PROMPT, random_checkpoint

ONNX_ONLY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"num_key_value_heads": 4}),
    "opt": ("OPT", {"num_key_value_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "llama": ("Llama", {}),
    "phi": ("Phi", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "small heads": ("Llama", {"head_dim": 8}),
}
ALL_FAMILIES = FAMILIES | ONNX_ONLY_FAMILIES
QUICK = ("gpt2", "opt", "gpt_neox", "llama", "qwen3", "gemma3")
"""Families tested in every run. The others are marked `slow`."""


def build(checkpoint: Checkpoint, directory: Path, **options: Any) -> Engine:
    runtime = PortableOnnx(**options)
    runtime.check(checkpoint.spec)
    return build_engine(runtime, checkpoint, directory)


def import_random_checkpoint(family: str | tuple[str, dict[str, Any]], tokenizer: Path, folder: Path) -> Checkpoint:
    architecture, config = ALL_FAMILIES[family] if isinstance(family, str) else family
    (folder / "source").mkdir()
    (folder / "checkpoint").mkdir()
    return import_checkpoint(
        random_checkpoint(architecture, config, tokenizer, folder / "source"), folder / "checkpoint"
    )


def prune_unevenly(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint of three layers, one with fewer channels and one with fewer heads."""
    import torch

    network = modeling.load(checkpoint)
    first, second, _ = modeling.layers(network)
    modeling.keep_channels(first.mlp, torch.arange(40))
    modeling.keep_heads(second.self_attn, torch.arange(32), torch.arange(16), groups=2)
    folder.mkdir()
    spec = modeling.spec_of(network, checkpoint.spec)
    modeling.save(network, folder, checkpoint, spec)
    return Checkpoint.seal(folder, format="checkpoint-1", spec=spec, made_by={})


def torch_logits(checkpoint: Checkpoint, tokens: list[int] = PROMPT) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = modeling.load(checkpoint)(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ALL_FAMILIES]
)
def test_family_matches_pytorch_and_generates(family: str, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = import_random_checkpoint(family, tiny_model, tmp_path)
    engine = build(checkpoint, tmp_path / "engine")
    session = PortableOnnx().open(engine, threads=1)
    assert relative_error(torch_logits(checkpoint), session.logits(PROMPT)) < 1e-4
    tokens = list(PROMPT)
    for token in session.generate(PROMPT, 4, stop_at_end=False):
        scores = torch_logits(checkpoint, tokens)[-1]
        assert scores[token] >= np.sort(scores)[-3]  # generation excludes end tokens
        tokens.append(token)
    assert len(tokens) == len(PROMPT) + 4
    assert PortableOnnx().lint(engine) == []


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_random_checkpoint("llama", tiny_model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def fp32_engine(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Return the fp32 engine, which no test changes."""
    return build(llama, tmp_path_factory.mktemp("fp32") / "engine")


@pytest.mark.parametrize("opset", [20, 18, 17])
def test_older_opset_is_written_and_matches_pytorch(opset: int, llama: Checkpoint, tmp_path: Path) -> None:
    engine = build(llama, tmp_path / "engine", opset=opset)
    imports = onnx.load(engine.directory / graph.GRAPH_FILE, load_external_data=False).opset_import
    assert {entry.domain: entry.version for entry in imports}[""] == opset
    assert relative_error(torch_logits(llama), PortableOnnx().open(engine, threads=1).logits(PROMPT)) < 1e-4


def test_unsupported_opset_is_rejected() -> None:
    with pytest.raises(ConfigError, match="`opset` must be one of 23, 20, 18, 17; got 19"):
        PortableOnnx(opset=19)


@pytest.mark.parametrize(
    ("options", "opset", "message"),
    [
        ({"weights": "int2"}, 23, "weights of 4 or 8 bits, got 2 bits"),
        ({}, 20, "`opset` must be at least 21 for quantized weights, got 20"),
    ],
)
def test_weights_unsupported_by_onnx_are_rejected(
    options: dict[str, Any], opset: int, message: str, llama: Checkpoint
) -> None:
    with pytest.raises(ConfigError, match=message):
        PortableOnnx(opset=opset).check(Quantize(**options).plan(llama.spec))


def test_unevenly_pruned_layers_match_pytorch(llama: Checkpoint, tmp_path: Path) -> None:
    pruned = prune_unevenly(llama, tmp_path / "pruned")
    logits = PortableOnnx().open(build(pruned, tmp_path / "engine"), threads=1).logits(PROMPT)
    assert relative_error(torch_logits(pruned), logits) < 1e-4


def test_batch_matches_single_sequences(llama: Checkpoint, fp32_engine: Engine) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(fp32_engine.directory / graph.GRAPH_FILE, providers=["CPUExecutionProvider"])
    sequences = [PROMPT[:9], PROMPT[20:29]]
    empty = np.zeros((2, 2, 16, 16), np.float32)
    past = {value.name: empty for value in session.get_inputs() if value.name.startswith(graph.PAST_PREFIX)}
    inputs = {graph.INPUT_IDS: np.array(sequences), graph.PAST_LENGTH: np.array(0), graph.ROWS: np.arange(9)}
    inputs[graph.POSITION] = np.array(0)
    batch = session.run([graph.LOGITS], {**inputs, **past})[0]
    for tokens, logits in zip(sequences, batch, strict=True):
        assert relative_error(torch_logits(llama, tokens), logits) < 1e-4


def test_fp16_weights_are_smaller_and_match_pytorch(llama: Checkpoint, fp32_engine: Engine, tmp_path: Path) -> None:
    source = apply_step(Quantize(weights="fp16"), llama, tmp_path / "source")
    engine = build(source, tmp_path / "engine")
    logits = PortableOnnx().open(engine, threads=1).logits(PROMPT)
    assert relative_error(torch_logits(source), logits) < 1e-3
    assert engine.size_bytes < 0.75 * fp32_engine.size_bytes


def test_missing_provider_requires_cpu_fallback(fp32_engine: Engine) -> None:
    with pytest.raises(BuildError, match=r"cuda is not available on this machine; CPUExecutionProvider is.*GPU build"):
        PortableOnnx(provider="cuda").open(fp32_engine, threads=1)
    session = PortableOnnx(provider="cuda", cpu_fallback=True).open(fp32_engine, threads=1)
    assert tuple(session.backends) == ("CPUExecutionProvider",)


def test_damaged_graph_is_rejected(fp32_engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(fp32_engine.directory, tmp_path / "engine")
    path = tmp_path / "engine" / graph.GRAPH_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuildError, match="the engine cannot be opened"):
        PortableOnnx().open(replace(fp32_engine, directory=tmp_path / "engine"), threads=1)


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
        for name, message in (("pixels", "'pixels'"), ("attention_mask", "no input input_ids")):
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


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(Quantize(weights="int4", symmetric=True), marks=pytest.mark.slow),
        Quantize(weights="int4", lm_head="int4", embedding="int4"),
        pytest.param(
            Quantize(weights="int8", bias_correction=True, windows=2, window_tokens=32), marks=pytest.mark.slow
        ),
        pytest.param(Int8(), marks=pytest.mark.slow),
        Int8(ranges="min_max", windows=2, window_tokens=32),
    ],
    ids=["int4 symmetric", "int4 tables", "int8 with biases", "int8 inputs, dynamic", "int8 inputs, static"],
)
def test_quantized_engine_matches_genai_and_is_smaller(
    step: Any, llama: Checkpoint, fp32_engine: Engine, tmp_path: Path
) -> None:
    source = apply_step(step, llama, tmp_path / "source")
    engine = build(source, tmp_path / "engine")
    session = PortableOnnx().open(engine, threads=1)
    genai_engine = build_engine(Genai(), source, tmp_path / "genai")
    expected = Genai().open(genai_engine, threads=1).logits(PROMPT)
    assert relative_error(expected, session.logits(PROMPT)) < 0.05
    assert len(list(session.generate(PROMPT[:20], 5, stop_at_end=False))) == 5
    assert engine.size_bytes < fp32_engine.size_bytes
    assert PortableOnnx().lint(engine) == []
