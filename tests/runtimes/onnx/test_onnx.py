"""Portable ONNX engines compute as torch for every decoder family, and foreign graphs can be opened beside them."""

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

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"num_key_value_heads": 4}),
    "opt": ("OPT", {"num_key_value_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "llama": ("Llama", {}),
    "phi": ("Phi", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "small heads": ("Llama", {"head_dim": 8}),
}
EVERY = FAMILIES | MORE
QUICK = ("gpt2", "opt", "gpt_neox", "llama", "qwen3", "gemma3")
"""Families that every run of the tests looks at; the others are `slow`."""


def build(checkpoint: Checkpoint, directory: Path, **values: Any) -> Engine:
    runtime = PortableOnnx(**values)
    runtime.check(checkpoint.spec)
    return build_engine(runtime, checkpoint, directory)


def taken_in(family: str | tuple[str, dict[str, Any]], tokenizer: Path, folder: Path) -> Checkpoint:
    kind, values = EVERY[family] if isinstance(family, str) else family
    (folder / "source").mkdir()
    (folder / "checkpoint").mkdir()
    return import_checkpoint(random_checkpoint(kind, values, tokenizer, folder / "source"), folder / "checkpoint")


def varied(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """One of three layers with fewer channels, and another one with fewer heads."""
    import torch

    network = modeling.load(checkpoint)
    first, second, _ = modeling.layers(network)
    modeling.keep_channels(first.mlp, torch.arange(40))
    modeling.keep_heads(second.self_attn, torch.arange(32), torch.arange(16), groups=2)
    folder.mkdir()
    spec = modeling.spec_of(network, checkpoint.spec)
    modeling.save(network, folder, checkpoint, spec)
    return Checkpoint.seal(folder, format="checkpoint-1", spec=spec, made_by={})


def in_torch(checkpoint: Checkpoint, tokens: list[int] = PROMPT) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = modeling.load(checkpoint)(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EVERY]
)
def test_every_family_computes_as_torch_and_generates(family: str, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = taken_in(family, tiny_model, tmp_path)
    engine = build(checkpoint, tmp_path / "engine")
    session = PortableOnnx().open(engine, threads=1)
    assert relative_error(in_torch(checkpoint), session.logits(PROMPT)) < 1e-4
    tokens = list(PROMPT)
    for token in session.generate(PROMPT, 4, stop_at_end=False):
        scores = in_torch(checkpoint, tokens)[-1]
        assert scores[token] >= np.sort(scores)[-3]  # end tokens are left out
        tokens.append(token)
    assert len(tokens) == len(PROMPT) + 4
    assert PortableOnnx().lint(engine) == []


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return taken_in("llama", tiny_model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of the checkpoint as it is, which tests look at and leave alone."""
    return build(llama, tmp_path_factory.mktemp("plain") / "engine")


@pytest.mark.parametrize("opset", [20, 18, 17])
def test_older_opsets_compute_the_same_and_say_so(opset: int, llama: Checkpoint, tmp_path: Path) -> None:
    engine = build(llama, tmp_path / "engine", opset=opset)
    imports = onnx.load(engine.directory / graph.GRAPH_FILE, load_external_data=False).opset_import
    assert {one.domain: one.version for one in imports}[""] == opset
    assert relative_error(in_torch(llama), PortableOnnx().open(engine, threads=1).logits(PROMPT)) < 1e-4


def test_an_opset_that_is_not_tried_is_refused() -> None:
    with pytest.raises(ConfigError, match="19 is no opset"):
        PortableOnnx(opset=19)


@pytest.mark.parametrize(
    ("values", "opset", "told"),
    [
        ({"weights": "int2"}, 23, "weights of 2 bits"),
        ({}, 20, "opset 20 knows no"),
    ],
)
def test_what_the_standard_does_not_know_is_refused_before_building(
    values: dict[str, Any], opset: int, told: str, llama: Checkpoint
) -> None:
    with pytest.raises(ConfigError, match=told):
        PortableOnnx(opset=opset).check(Quantize(**values).plan(llama.spec))


def test_layers_of_different_widths_and_heads_compute_as_in_torch(llama: Checkpoint, tmp_path: Path) -> None:
    pruned = varied(llama, tmp_path / "pruned")
    found = PortableOnnx().open(build(pruned, tmp_path / "engine"), threads=1).logits(PROMPT)
    assert relative_error(in_torch(pruned), found) < 1e-4


def test_a_batch_is_computed_as_its_sequences(llama: Checkpoint, plain: Engine) -> None:
    import onnxruntime

    opened = onnxruntime.InferenceSession(plain.directory / graph.GRAPH_FILE, providers=["CPUExecutionProvider"])
    sequences = [PROMPT[:9], PROMPT[20:29]]
    empty = np.zeros((2, 2, 16, 16), np.float32)
    past = {value.name: empty for value in opened.get_inputs() if value.name.startswith(graph.PAST_PREFIX)}
    given = {graph.INPUT_IDS: np.array(sequences), graph.PAST_LENGTH: np.array(0), graph.ROWS: np.arange(9)}
    given[graph.POSITION] = np.array(0)
    logits = opened.run([graph.LOGITS], {**given, **past})[0]
    for tokens, found in zip(sequences, logits, strict=True):
        assert relative_error(in_torch(llama, tokens), found) < 1e-4


def test_weights_in_fp16_are_stored_so_and_computed_in_fp32(llama: Checkpoint, plain: Engine, tmp_path: Path) -> None:
    source = apply_step(Quantize(weights="fp16"), llama, tmp_path / "source")
    engine = build(source, tmp_path / "engine")
    found = PortableOnnx().open(engine, threads=1).logits(PROMPT)
    assert relative_error(in_torch(source), found) < 1e-3
    assert engine.size_bytes < 0.75 * plain.size_bytes


def test_a_provider_that_is_not_here_is_an_error_unless_the_cpu_may_take_its_place(plain: Engine) -> None:
    with pytest.raises(BuildError, match=r"has no cuda here, and CPUExecutionProvider would take its place.*GPU build"):
        PortableOnnx(provider="cuda").open(plain, threads=1)
    session = PortableOnnx(provider="cuda", cpu_fallback=True).open(plain, threads=1)
    assert tuple(session.backends) == ("CPUExecutionProvider",)


def test_a_damaged_graph_is_refused_by_name(plain: Engine, tmp_path: Path) -> None:
    shutil.copytree(plain.directory, tmp_path / "engine")
    path = tmp_path / "engine" / graph.GRAPH_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuildError, match="the engine cannot be opened"):
        PortableOnnx().open(replace(plain, directory=tmp_path / "engine"), threads=1)


def exported(network: Any, path: Path, *, growing: bool) -> None:
    """A graph as other exporters make it: with keys and values that grow, or without any."""
    import torch
    from transformers import DynamicCache

    class Grows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask, position_ids, past):  # type: ignore[no-untyped-def]
            cache = DynamicCache()
            for number in range(len(past) // 2):
                cache.update(past[2 * number], past[2 * number + 1], number)
            found = self.network(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
            )
            return (found.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    class Forgets(torch.nn.Module):
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
            Grows().eval(),
            (tokens, torch.ones(1, 9, dtype=torch.int64), torch.arange(4, 9)[None], past),
            path,
            dynamic_shapes=({1: dynamic}, {1: dynamic}, {1: dynamic}, [{2: dynamic} for _ in past]),
            input_names=["input_ids", "attention_mask", "position_ids", *graph.cache_names(layers, graph.PAST_PREFIX)],
            output_names=["logits", *graph.cache_names(layers, graph.PRESENT_PREFIX)],
            **options,
        )
    else:
        names = {"input_names": ["input_ids"], "output_names": ["logits"]}
        torch.onnx.export(Forgets().eval(), (tokens,), path, dynamic_shapes=({1: dynamic},), **names, **options)


class TestForeignGraphs:
    @pytest.mark.parametrize("growing", [True, False], ids=["with a cache", "without a cache"])
    def test_one_computes_and_generates_as_the_model_that_it_came_from(
        self, growing: bool, llama: Checkpoint, plain: Engine, tmp_path: Path
    ) -> None:
        (tmp_path / "foreign").mkdir()
        (tmp_path / "engine").mkdir()
        exported(modeling.load(llama), tmp_path / "foreign" / "decoder.onnx", growing=growing)
        engine = import_graph(tmp_path / "foreign" / "decoder.onnx", llama.directory, tmp_path / "engine")
        engine.verify()
        session, own = (PortableOnnx().open(opened, threads=1) for opened in (engine, plain))
        assert relative_error(in_torch(llama), session.logits(PROMPT)) < 1e-4
        told, expected = (list(one.generate(PROMPT[:40], 8, stop_at_end=False)) for one in (session, own))
        assert told == expected

    def refused(self, path: Path, source: Path, folder: Path) -> str:
        folder.mkdir()
        with pytest.raises(InputError) as caught:
            import_graph(path, source, folder)
        return str(caught.value)

    def test_what_is_no_graph_or_no_decoder_is_refused_by_name(self, llama: Checkpoint, tmp_path: Path) -> None:
        from onnx import TensorProto, helper

        (tmp_path / "text.onnx").write_text("no graph")
        assert "no ONNX graph" in self.refused(tmp_path / "text.onnx", llama.directory, tmp_path / "a")
        for name, told in (("pixels", "'pixels'"), ("attention_mask", "no input_ids")):
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
            result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
            made = helper.make_graph([helper.make_node("Identity", [name], ["y"])], "g", [value], [result])
            onnx.save(helper.make_model(made), tmp_path / f"{name}.onnx")
            assert told in self.refused(tmp_path / f"{name}.onnx", llama.directory, tmp_path / name)

    def test_weights_outside_the_graphs_folder_are_not_read(
        self, llama: Checkpoint, plain: Engine, tmp_path: Path
    ) -> None:
        (tmp_path / "foreign").mkdir()
        path = tmp_path / "foreign" / "decoder.onnx"
        shutil.copytree(plain.directory, tmp_path / "own")
        model = onnx.load(plain.directory / graph.GRAPH_FILE, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"../own/{entry.value}"
        path.write_bytes(model.SerializeToString())
        assert "'../own/model.onnx.data', which is not beside it" in self.refused(
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
def test_rounded_engines_compute_as_those_of_the_fused_runtime_and_are_smaller(
    step: Any, llama: Checkpoint, plain: Engine, tmp_path: Path
) -> None:
    source = apply_step(step, llama, tmp_path / "source")
    engine = build(source, tmp_path / "engine")
    session = PortableOnnx().open(engine, threads=1)
    fused = build_engine(Genai(), source, tmp_path / "fused")
    assert relative_error(Genai().open(fused, threads=1).logits(PROMPT), session.logits(PROMPT)) < 0.05
    assert len(list(session.generate(PROMPT[:20], 5, stop_at_end=False))) == 5
    assert engine.size_bytes < plain.size_bytes
    assert PortableOnnx().lint(engine) == []
