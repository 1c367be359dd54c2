"""GGUF engines hold the very numbers of their checkpoints, and llama.cpp computes them as torch does."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gguf
import numpy as np
import pytest
from support.workshops import applied, built, foretold, workshop

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.compress.quantization.llama_quantize import LlamaQuantize
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.model_spec import LLAMA_BITS, KvCacheScheme
from edgeopt.errors import BuildError, ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.llamacpp.layout import MODEL_FILE
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
from runtimes.onnx.test_onnx import EVERY, in_torch, taken_in, varied
from runtimes.test_families import PROMPT

LARGE, QUERIES = 8, "blk.1.attn_q.weight"
IN_FOURS = {"symmetric": True, "lm_head": "int4", "embedding": "int4"}
runs = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return taken_in("llama", tiny_model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Those whose scores are scaled by the size of a head, as in all but the largest of the families."""
    found = {}
    for family in ("gemma2", "gemma3"):
        kind, values = EVERY[family]
        scaled = {**values, "query_pre_attn_scalar": 16}
        found[family] = taken_in((kind, scaled), tiny_model, tmp_path_factory.mktemp(family))
    return found


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama whose matrices have whole blocks of 256, and whose first input channels are large throughout."""
    import torch

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16}
    given = taken_in(("Llama", sizes), tiny_model, tmp_path_factory.mktemp("wide"))
    network = modeling.load(given)
    with torch.no_grad():
        for layer in modeling.layers(network):
            layer.input_layernorm.weight[:LARGE] *= 20
    folder = tmp_path_factory.mktemp("large")
    modeling.save(network, folder, given, given.spec)
    return Checkpoint.seal(folder, format=Checkpoint.FORMAT, spec=given.spec, made_by={})


def told_otherwise(checkpoint: Checkpoint, folder: Path, **values: Any) -> Checkpoint:
    """The checkpoint with other values in its `config.json`."""
    folder.mkdir()
    modeling.link(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return Checkpoint.seal(folder, format=Checkpoint.FORMAT, spec=checkpoint.spec, made_by={})


def rounded(checkpoint: Checkpoint, folder: Path, **values: Any) -> Checkpoint:
    folder.mkdir()
    spec = Quantize(**values).apply(checkpoint, folder, workshop(checkpoint))
    return Checkpoint.seal(folder, format=Checkpoint.FORMAT, spec=spec, made_by={})


def build(checkpoint: Checkpoint, directory: Path) -> Engine:
    return built(LlamaCpp(), checkpoint, directory)


def tensors(engine: Engine) -> dict[str, np.ndarray]:
    """Every tensor of the file in float."""
    read = gguf.GGUFReader(engine.directory / MODEL_FILE).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in read}


def fields(engine: Engine) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(engine.directory / MODEL_FILE).fields.items()}


def assert_size_was_known(engine: Engine, within: float) -> None:
    (size,) = foretold(LlamaCpp(), engine)
    assert size.low < engine.size_bytes / 2**20 < size.high
    assert size.value == pytest.approx(engine.size_bytes / 2**20, rel=within)


class TestTheFile:
    def test_it_tells_the_sizes(self, llama: Checkpoint, tmp_path: Path) -> None:
        told = fields(build(llama, tmp_path / "engine"))
        assert told["general.architecture"] == "llama"
        assert told["llama.block_count"] == 3
        assert told["llama.feed_forward_length"] == 128
        assert told["llama.attention.head_count"] == 4
        assert told["llama.attention.head_count_kv"] == 2
        assert told["llama.rope.dimension_count"] == 16

    def test_it_has_the_tokenizer(self, llama: Checkpoint, tmp_path: Path) -> None:
        told = fields(build(llama, tmp_path / "engine"))
        document = json.loads((llama.directory / "tokenizer.json").read_text())
        vocabulary = document["model"]["vocab"]
        assert told["tokenizer.ggml.model"] == "gpt2"
        assert told["tokenizer.ggml.pre"] == "gpt-2"
        tokens = told["tokenizer.ggml.tokens"]
        assert {token: tokens.index(token) for token in vocabulary} == vocabulary
        assert len(tokens) == llama.spec.vocabulary_size
        assert len(told["tokenizer.ggml.merges"]) == len(document["model"]["merges"])
        control = [tokens[n] for n, kind in enumerate(told["tokenizer.ggml.token_type"]) if kind == 3]
        assert control == ["<s>", "</s>"]

    @pytest.mark.parametrize(
        ("values", "tolerance"),
        [
            ({"weights": "int4", **IN_FOURS}, 0.0),
            ({"weights": "int8", "symmetric": True}, 0.0),
            ({"weights": "int4", "lm_head": "int4", "embedding": "int4"}, 2**-11),
        ],
        ids=["4 bits", "8 bits", "4 bits with zero-points"],
    )
    def test_rounded_weights_are_the_checkpoints_own(
        self, values: dict[str, Any], tolerance: float, llama: Checkpoint, tmp_path: Path
    ) -> None:
        checkpoint = rounded(llama, tmp_path / "rounded", **values)
        engine = build(checkpoint, tmp_path / "engine")
        assert_size_was_known(engine, 0.1)
        found = tensors(engine)
        state = quantized_matrix.expanded(safetensors_io.read_folder(checkpoint.directory))
        largest = max(float(tensor.abs().max()) for tensor in state.values())
        for name, module in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj"), ("ffn_up", "mlp.up_proj")):
            expected = state[f"model.layers.1.{module}.weight"].numpy()
            assert np.abs(found[f"blk.1.{name}.weight"] - expected).max() <= tolerance * largest
        assert np.abs(found["token_embd.weight"] - state["model.embed_tokens.weight"].numpy()).max() <= largest / 2048

    def test_queries_and_keys_have_the_channels_of_each_head_by_pairs(self, llama: Checkpoint, tmp_path: Path) -> None:
        found = tensors(build(llama, tmp_path / "engine"))
        state = safetensors_io.read_folder(llama.directory)
        given = state["model.layers.0.self_attn.q_proj.weight"].numpy()
        half = llama.spec.head_size // 2
        for head in range(4):
            for channel in range(half):
                row = head * 2 * half + 2 * channel
                assert np.array_equal(found["blk.0.attn_q.weight"][row], given[head * 2 * half + channel])
                assert np.array_equal(found["blk.0.attn_q.weight"][row + 1], given[head * 2 * half + half + channel])

    def test_equal_checkpoints_give_equal_bytes(self, llama: Checkpoint, tmp_path: Path) -> None:
        first, second = (build(llama, tmp_path / name) for name in "ab")
        assert first.digest == second.digest

    def test_halves_are_stored_where_the_recipe_says_so(self, llama: Checkpoint, tmp_path: Path) -> None:
        checkpoint = rounded(llama, tmp_path / "rounded", weights="fp16")
        engine, float_engine = build(checkpoint, tmp_path / "engine"), build(llama, tmp_path / "float")
        assert engine.size_bytes < 0.6 * float_engine.size_bytes

    def test_a_window_that_llama_cpp_does_not_compute_is_refused(self, llama: Checkpoint, tmp_path: Path) -> None:
        windowed = told_otherwise(llama, tmp_path / "windowed", sliding_window=32)
        with pytest.raises(BuildError, match="sliding window of 32 tokens"):
            build(windowed, tmp_path / "engine")

    def test_windows_in_other_layers_than_llama_cpp_has_them_are_refused(
        self, gemma: dict[str, Checkpoint], tmp_path: Path
    ) -> None:
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        other = told_otherwise(gemma["gemma3"], tmp_path / "other", layer_types=kinds)
        with pytest.raises(BuildError, match="sliding windows in layers none, and this model in 1"):
            build(other, tmp_path / "engine")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if llama.cpp were here: nothing of it is asked."""
    monkeypatch.setattr("edgeopt.runtimes.llamacpp.runtime.find_spec", lambda name: name)


@pytest.mark.usefixtures("installed")
class TestWhatIsRefusedBeforeBuilding:
    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"weights": "int4", **IN_FOURS, "block_size": 64}, "blocks of 64"),
            ({"weights": "int8"}, "symmetric=true"),
            ({"weights": "int2"}, "2 bits"),
        ],
    )
    def test_grids_that_its_types_do_not_hold(self, values: dict[str, Any], told: str, llama: Checkpoint) -> None:
        with pytest.raises(ConfigError, match=told):
            LlamaCpp().check(Quantize(**values).plan(llama.spec))

    def test_keys_and_values_on_calibrated_grids(self, llama: Checkpoint) -> None:
        with pytest.raises(ConfigError, match="keys_values=int8"):
            LlamaCpp().check(replace(llama.spec, kv_cache=KvCacheScheme(bits=8, per_channel=True)))

    def test_layers_and_heads_that_it_cannot_hold(self, llama: Checkpoint) -> None:
        first, *rest = llama.spec.layers
        qwen = replace(llama.spec, architecture="Qwen2ForCausalLM")
        with pytest.raises(ConfigError, match="sizes of the first layer for all of Qwen2ForCausalLM"):
            LlamaCpp().check(qwen.with_layers((replace(first, heads=2, kv_heads=1), *rest)))
        with pytest.raises(ConfigError, match="16 channels have no whole blocks"):
            LlamaCpp(keys_values="int8").check(llama.spec)

    def test_families_that_it_is_not_told_of(self, llama: Checkpoint) -> None:
        with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
            LlamaCpp().check(replace(llama.spec, architecture="GPT2LMHeadModel"))

    def test_what_is_rounded_is_taken(self, llama: Checkpoint) -> None:
        LlamaCpp().check(Quantize(weights="int4", **IN_FOURS).plan(llama.spec))


def test_without_llama_cpp_it_tells_how_to_install_it(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.runtimes.llamacpp.runtime.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"edgeopt\[llamacpp\]"):
        LlamaCpp().check(llama.spec)


@runs
class TestComputing:
    EXACT = LlamaCpp(keys_values="fp32")

    def logits(self, engine: Engine, runtime: LlamaCpp | None = None) -> np.ndarray:
        session = (runtime or self.EXACT).open(engine, threads=1)
        try:
            return session.logits(PROMPT)
        finally:
            session.close()

    @pytest.mark.parametrize(
        "family", ["llama", "llama 3", "mistral", "qwen2", "qwen3", "phi3", "phi4", "granite", "smollm3"]
    )
    def test_every_family_computes_as_torch(self, family: str, tiny_model: Path, tmp_path: Path) -> None:
        checkpoint = taken_in(family, tiny_model, tmp_path)
        assert relative_error(in_torch(checkpoint), self.logits(build(checkpoint, tmp_path / "engine"))) < 1e-4

    @pytest.mark.parametrize("family", ["gemma2", "gemma3"])
    def test_families_whose_activation_llama_cpp_looks_up_in_halves_compute_nearly_so(
        self, family: str, gemma: dict[str, Checkpoint], tmp_path: Path
    ) -> None:
        engine = build(gemma[family], tmp_path / "engine")
        assert relative_error(in_torch(gemma[family]), self.logits(engine)) < 1e-3

    def test_layers_of_different_widths_and_heads(self, llama: Checkpoint, tmp_path: Path) -> None:
        pruned = varied(llama, tmp_path / "pruned")
        assert relative_error(in_torch(pruned), self.logits(build(pruned, tmp_path / "engine"))) < 1e-4

    @pytest.mark.parametrize("file_type", get_args(get_type_hints(LlamaQuantize)["file_type"]))
    def test_what_llama_cpp_rounds_by_itself_takes_about_the_bits_that_the_spec_tells(
        self, file_type: str, wide: Checkpoint, tmp_path: Path
    ) -> None:
        quantized = applied(LlamaQuantize(file_type=file_type, importance=False), wide, tmp_path / "quantized")
        engine = build(quantized, tmp_path / "engine")
        assert_size_was_known(engine, 0.25)
        path = engine.directory / MODEL_FILE
        matrices = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2]
        bits = 8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices)
        assert bits == pytest.approx(LLAMA_BITS[file_type], rel=0.25)

    def test_rounding_by_importance_loses_less_of_what_multiplies_large_inputs(
        self, wide: Checkpoint, tmp_path: Path
    ) -> None:
        exact, lost = tensors(build(wide, tmp_path / "exact")), {}
        for weighted in (True, False):
            step = LlamaQuantize(importance=weighted, windows=4, window_tokens=64)
            quantized = applied(step, wide, tmp_path / f"{weighted}")
            found = tensors(build(quantized, tmp_path / f"{weighted} engine"))
            lost[weighted] = np.abs(found[QUERIES] - exact[QUERIES])[:, :LARGE].mean()
        assert lost[True] < 0.9 * lost[False]

    @pytest.mark.parametrize(
        "values",
        [{"weights": "int4", **IN_FOURS}, {"weights": "int8", "symmetric": True}, {"weights": "fp16"}],
        ids=["4 bits", "8 bits", "halves"],
    )
    def test_rounded_weights(self, values: dict[str, Any], llama: Checkpoint, tmp_path: Path) -> None:
        checkpoint = rounded(llama, tmp_path / "rounded", **values)
        assert relative_error(in_torch(checkpoint), self.logits(build(checkpoint, tmp_path / "engine"))) < 0.05

    @pytest.mark.parametrize(
        ("values", "bound"),
        [
            ({"prompt_tokens": 7}, 1e-5),
            ({"mapped": False, "repacked": False}, 1e-5),
            ({"keys_values": "fp16"}, 5e-3),
        ],
    )
    def test_knobs_change_how_it_is_computed_and_little_of_what(
        self, values: dict[str, Any], bound: float, llama: Checkpoint, tmp_path: Path
    ) -> None:
        engine = build(llama, tmp_path / "engine")
        changed = self.logits(engine, replace(self.EXACT, **values))
        assert relative_error(self.logits(engine), changed) < bound

    def test_a_damaged_file_is_refused_by_name(self, llama: Checkpoint, tmp_path: Path) -> None:
        engine = build(llama, tmp_path / "engine")
        path = engine.directory / MODEL_FILE
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BuildError, match="cannot open the engine"):
            LlamaCpp().open(engine, threads=1)
