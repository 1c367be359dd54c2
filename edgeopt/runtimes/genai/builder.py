"""Build genai engines with onnxruntime-genai's model builder.

The stock builder loads weights through transformers, assumes that all layers have the same width, and quantizes weights
itself. edgeopt replaces methods on the builder's model: weights come from edgeopt.checkpoints.modeling, each layer has
its own sizes, and the quantized matrices of the checkpoint become nodes unchanged.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.core.model_spec import LM_HEAD
from edgeopt.errors import BuildError
from edgeopt.runtimes.genai import adapters, graph_passes, producer
from edgeopt.runtimes.genai.layout import GENERATION_GRAPH, SCORING_GRAPH
from edgeopt.runtimes.genai.quantized_nodes import QuantizedNodes
from edgeopt.runtimes.genai.rotary import RotaryNodes
from edgeopt.runtimes.onnxruntime_common import prepacked_weights

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import Progress
    from edgeopt.runtimes.genai.runtime import Genai

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
"""Architectures whose engines match PyTorch. The builder's SmolLM3 and OLMo do not."""
_NOISY_LOGGERS = ("onnxruntime.quantization.matmul_nbits_quantizer", "onnx_ir.serde", "neural_compressor")


def build(checkpoint: Checkpoint, directory: Path, runtime: Genai, progress: Progress) -> None:
    """Write `model.onnx` and `scoring.onnx`, their data, adapters, `genai_config.json` and the tokenizer.

    Raises:
        BuildError: onnxruntime-genai fails.
    """
    with _quiet_logging():
        from onnxruntime_genai.models import builder

    spec = checkpoint.spec
    progress(f"building an engine of {spec.bits_per_weight:.2f} bits per weight")
    network = modeling.load(checkpoint)
    updates = adapters.updates_by_node(network, checkpoint)
    adapted_nodes = {node for by_node in updates.values() for node in by_node}
    source, scratch = str(checkpoint.directory), str(directory / "scratch")
    printed = io.StringIO()
    try:
        with (
            _patched_builder(builder.Model, network, checkpoint, runtime, adapted_nodes),
            _quiet_logging(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            options = builder.parse_extra_options(
                "", source, str(directory), "fp32", "cpu", scratch, _extra_options(checkpoint, runtime)
            )
            builder.create_model("", source, str(directory), "fp32", "cpu", scratch, **options)
    except Exception as error:  # the builder raises arbitrary exceptions
        last_line = "".join(printed.getvalue().strip().splitlines()[-1:])
        raise BuildError(f"onnxruntime-genai cannot build the engine: {error} {last_line}".strip()) from error
    # The builder saves its own form of the tokenizer, which can differ from the original.
    modeling.copy_model_files(checkpoint.directory, directory)
    if spec.weight_dtype == "fp16":
        graph_passes.store_weights_as_fp16(directory / GENERATION_GRAPH)
    if runtime.packed_on_disk:
        prepacked_weights.save(directory / GENERATION_GRAPH)
    graph_passes.split_scoring(directory / GENERATION_GRAPH, directory / SCORING_GRAPH)
    if updates:
        adapters.export(updates, directory)


def _extra_options(checkpoint: Checkpoint, runtime: Genai) -> list[str]:
    """Return the builder's extra options, in the form of its command line."""
    spec = checkpoint.spec
    shared = spec.tied_embeddings and LM_HEAD not in spec.schemes  # QuantizedNodes shares quantized ones
    options = ["hf_token=false", f"shared_embeddings={str(shared).lower()}"]
    if runtime.gate_up_fused:
        options.append("fuse_mlp_gate_up=true")
    if spec.kv_cache is not None:
        scheme = f"int{spec.kv_cache.bits}_per_{'channel' if spec.kv_cache.per_channel else 'tensor'}"
        scales = checkpoint.directory / modeling.KV_CACHE
        options += [f"kv_cache_quant_scheme={scheme}", f"kv_cache_scale_file={scales}"]
    return options


@contextlib.contextmanager
def _patched_builder(
    model_class: Any, network: Any, checkpoint: Checkpoint, runtime: Genai, adapted_nodes: Collection[str]
) -> Iterator[None]:
    """Patch the builder's model class inside the block so that it reads edgeopt's config, weights and layer sizes.

    Nodes in `adapted_nodes` get an adapter branch.
    """
    initialize, make_model = model_class.__init__, model_class.make_model
    spec = checkpoint.spec

    def patched_init(self: Any, config: Any, *rest: Any) -> None:
        _flatten_rope(config)
        RotaryNodes(self, network).install()  # before __init__: some families create their tables there
        initialize(self, config, *rest)

    def patched_make_model(self: Any, input_path: str) -> None:
        make_layer, cache_shape = self.make_layer, self.make_key_value_cache_shape

        def set_layer_sizes(layer_id: int) -> None:
            sizes = spec.layers[layer_id]
            self.intermediate_size = sizes.intermediate_size
            self.num_attn_heads, self.num_kv_heads = sizes.heads, sizes.kv_heads

        def make_sized_layer(layer_id: int, layer: Any) -> None:
            set_layer_sizes(layer_id)
            make_layer(layer_id, layer)

        def sized_cache_shape(layer_id: int, shape: list[Any]) -> list[Any]:
            batch, _, *rest = cache_shape(layer_id, shape)
            return [batch, spec.layers[layer_id].kv_heads, *rest]

        self.load_weights = lambda _: network
        self.make_layer, self.make_key_value_cache_shape = make_sized_layer, sized_cache_shape
        set_layer_sizes(0)
        if spec.schemes:
            QuantizedNodes(self, network, checkpoint, runtime).install()
        adapters.AdapterNodes(self, adapted_nodes).install()
        make_model(self, input_path)

    genai_commit = model_class.__dict__.get("get_genai_commit")
    model_class.get_genai_commit = staticmethod(producer.published_commit)
    model_class.__init__, model_class.make_model = patched_init, patched_make_model
    try:
        yield
    finally:
        model_class.__init__, model_class.make_model = initialize, make_model
        model_class.get_genai_commit = genai_commit


def _flatten_rope(config: Any) -> None:
    """Replace rotary settings per layer type (Gemma 3 in transformers 5) with the flat form that the builder reads."""
    by_type = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in by_type:
        config.rope_parameters = by_type["full_attention"]
        config.rope_theta = by_type["full_attention"]["rope_theta"]
        config.rope_local_base_freq = by_type["sliding_attention"]["rope_theta"]


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Log only errors of the builder's libraries, and undo the root logger setup that importing them causes."""
    root = logging.getLogger()
    handlers, root_level = root.handlers[:], root.level
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        root.handlers[:] = handlers
        root.setLevel(root_level)
