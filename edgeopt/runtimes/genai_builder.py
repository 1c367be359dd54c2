"""Drives onnxruntime-genai's model builder in process, also for layers of different widths.

The builder reads weights by transformers' loader and takes every layer for equally wide. Some of its
methods are replaced on the instance that it creates: weights come from edgeopt.network, each layer sees
its own sizes, and each projection its own bits.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt import network as networks
from edgeopt.errors import BuildError
from edgeopt.runtimes import passes

if TYPE_CHECKING:
    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Progress
    from edgeopt.spec import ModelSpec

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "GraniteForCausalLM",
)
"""Those whose engines compute as torch; the builder's SmolLM3 and OLMo do not."""
SCORING = "scoring.onnx"
QUIET = ("onnxruntime.quantization.matmul_nbits_quantizer", "onnx_ir.serde", "neural_compressor")


def build(checkpoint: Checkpoint, directory: Path, *, accuracy_level: int, progress: Progress) -> None:
    """Write `model.onnx` and `scoring.onnx`, their data, `genai_config.json` and the tokenizer into `directory`."""
    from onnxruntime_genai.models import builder

    spec = checkpoint.spec
    progress(f"building {describe(spec)}")
    network = networks.load(checkpoint)
    source, scratch = str(checkpoint.directory), str(directory / "scratch")
    precision = "fp32" if spec.quantization is None else "int4"
    printed = io.StringIO()
    try:
        with (
            _adapted(builder.Model, network, spec),
            _quiet(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            options = builder.parse_extra_options(
                "", source, str(directory), precision, "cpu", scratch, _options(spec, accuracy_level)
            )
            builder.create_model("", source, str(directory), precision, "cpu", scratch, **options)
    except Exception as error:  # whatever a builder of another project raises is a failed build
        last = printed.getvalue().strip().splitlines()[-1:]
        raise BuildError(f"onnxruntime-genai could not build the engine: {error} {' '.join(last)}".strip()) from error
    networks.carry(checkpoint.directory, directory)  # the builder saves the tokenizer anew, and not always alike
    q = spec.quantization
    if spec.weight_dtype == "fp16":
        passes.store_weights_as_half(directory / "model.onnx")
    if q is not None and q.embedding_bits < 32 and not spec.shares_tables:
        passes.quantize_embedding(directory / "model.onnx", bits=q.embedding_bits, block_size=q.block_size)
    passes.split_scoring(directory / "model.onnx", directory / SCORING)


def describe(spec: ModelSpec) -> str:
    """A few words on how the engine stores its weights."""
    q = spec.quantization
    return f"{spec.weight_dtype} engine" if q is None else f"int{q.bits} engine, block {q.block_size}, {q.method}"


def _options(spec: ModelSpec, accuracy_level: int) -> list[str]:
    options: dict[str, object] = {"hf_token": "false", "shared_embeddings": str(spec.shares_tables).lower()}
    q = spec.quantization
    if q is not None:
        in_one_pass = spec.shares_tables and q.lm_head_bits < 32
        options |= {
            "accuracy_level": accuracy_level,
            "block_size": q.block_size,
            "is_symmetric": str(q.symmetric).lower(),
            "algo_config": q.method,
            "op_types_to_quantize": "MatMul/Gather" if in_one_pass else "MatMul",
        }
        if q.lm_head_bits == 8:
            options["matmul_mixed_precision"] = "last_matmul:int8"
        if q.lm_head_bits == 32:
            options["nodes_to_exclude"] = passes.LM_HEAD
    return [f"{key}={value}" for key, value in options.items()]


@contextlib.contextmanager
def _adapted(model_class: Any, network: Any, spec: ModelSpec) -> Iterator[None]:
    """Replace how the builder's model reads its config, weights and sizes while one engine is built."""
    initialize, make_model = model_class.__init__, model_class.make_model

    def initialized(self: Any, config: Any, *rest: Any) -> None:
        _flatten_rope(config)
        initialize(self, config, *rest)

    def adapted(self: Any, input_path: str) -> None:
        make_layer, cache_shape = self.make_layer, self.make_key_value_cache_shape

        def resize(layer_id: int) -> None:
            sizes = spec.layers[layer_id]
            self.intermediate_size = sizes.intermediate_size
            self.num_attn_heads, self.num_kv_heads = sizes.heads, sizes.kv_heads

        def sized(layer_id: int, layer: Any) -> None:
            resize(layer_id)
            make_layer(layer_id, layer)

        def sized_cache(layer_id: int, shape: list[Any]) -> list[Any]:
            batch, _, *rest = cache_shape(layer_id, shape)
            return [batch, spec.layers[layer_id].kv_heads, *rest]

        self.load_weights = lambda _: network
        self.make_layer, self.make_key_value_cache_shape = sized, sized_cache
        resize(0)
        make_model(self, input_path)
        if spec.quantization is not None:
            bits = {
                node.name: {"bits": spec.quantization.bits} for node in self.model.graph if node.op_type == "MatMul"
            }
            self.int4_customized_weight_config = bits | {passes.LM_HEAD: {"bits": spec.quantization.lm_head_bits}}

    model_class.__init__, model_class.make_model = initialized, adapted
    try:
        yield
    finally:
        model_class.__init__, model_class.make_model = initialize, make_model


def _flatten_rope(config: Any) -> None:
    """Rotary settings by layer type (Gemma 3 in transformers 5) in the flat form that the builder reads."""
    by_type = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in by_type:
        config.rope_parameters = by_type["full_attention"]
        config.rope_theta = by_type["full_attention"]["rope_theta"]
        config.rope_local_base_freq = by_type["sliding_attention"]["rope_theta"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer tells every matrix; only its errors matter here."""
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
