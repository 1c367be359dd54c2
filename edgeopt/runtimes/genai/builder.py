"""Build genai engines with onnxruntime-genai's model builder.

The stock builder loads weights through transformers, assumes that all layers have the same width, and rounds weights
itself. edgeopt replaces three of its methods on the instance: weights come from edgeopt.checkpoints.modeling,
each layer has its own sizes, and quantized matrices of the checkpoint become nodes unchanged.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.core.model_spec import LM_HEAD, ModelSpec
from edgeopt.errors import BuildError
from edgeopt.runtimes.genai import adapters, graph_passes, producer
from edgeopt.runtimes.genai.quantized_nodes import GridNodes
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
"""Those whose engines compute as torch; the builder's SmolLM3 and OLMo do not."""
SCORING_GRAPH = "scoring.onnx"
QUIET = ("onnxruntime.quantization.matmul_nbits_quantizer", "onnx_ir.serde", "neural_compressor")


def build(checkpoint: Checkpoint, directory: Path, runtime: Genai, progress: Progress) -> None:
    """Write `model.onnx` and `scoring.onnx`, their data, adapters, `genai_config.json` and the tokenizer."""
    with _quiet():
        from onnxruntime_genai.models import builder

    spec = checkpoint.spec
    progress(f"building {to_config(spec)}")
    network = modeling.load(checkpoint)
    updates = adapters.by_node(network, checkpoint)
    source, scratch = str(checkpoint.directory), str(directory / "scratch")
    printed = io.StringIO()
    try:
        with (
            _adapted(builder.Model, network, checkpoint, runtime, {n for u in updates.values() for n in u}),
            _quiet(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            options = builder.parse_extra_options(
                "", source, str(directory), "fp32", "cpu", scratch, _options(checkpoint, runtime)
            )
            builder.create_model("", source, str(directory), "fp32", "cpu", scratch, **options)
    except Exception as error:  # whatever a builder of another project raises is a failed build
        last = printed.getvalue().strip().splitlines()[-1:]
        raise BuildError(f"onnxruntime-genai could not build the engine: {error} {' '.join(last)}".strip()) from error
    modeling.carry(checkpoint.directory, directory)  # the builder saves the tokenizer anew, and not always alike
    if spec.weight_dtype == "fp16":
        graph_passes.store_weights_as_half(directory / "model.onnx")
    if runtime.packed_on_disk:
        prepacked_weights.save(directory / "model.onnx")
    graph_passes.split_scoring(directory / "model.onnx", directory / SCORING_GRAPH)
    if updates:
        adapters.export(updates, directory)


def to_config(spec: ModelSpec) -> str:
    """A few words on how the engine stores its weights."""
    return f"engine of {spec.bits_per_weight:.2f} bits per weight"


def _options(checkpoint: Checkpoint, runtime: Genai) -> list[str]:
    spec = checkpoint.spec
    shared = spec.tied_embeddings and LM_HEAD not in spec.schemes  # tables on a grid are shared by genai_grid
    options = ["hf_token=false", f"shared_embeddings={str(shared).lower()}"]
    if runtime.gate_up_fused:
        options.append("fuse_mlp_gate_up=true")
    if spec.kv_cache is not None:
        scheme = f"int{spec.kv_cache.bits}_per_{'channel' if spec.kv_cache.per_channel else 'tensor'}"
        scales = checkpoint.directory / modeling.KV_CACHE
        options += [f"kv_cache_quant_scheme={scheme}", f"kv_cache_scale_file={scales}"]
    return options


@contextlib.contextmanager
def _adapted(
    model_class: Any, network: Any, checkpoint: Checkpoint, runtime: Genai, touched: Collection[str]
) -> Iterator[None]:
    """Replace how the builder's model reads its config, weights and sizes while one engine is built.

    Nodes in `touched` get the branch of an adapter.
    """
    initialize, make_model = model_class.__init__, model_class.make_model
    spec = checkpoint.spec

    def initialized(self: Any, config: Any, *rest: Any) -> None:
        _flatten_rope(config)
        RotaryNodes(self, network).install()  # first: some families make their tables at once
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
        if spec.schemes:
            GridNodes(self, network, checkpoint, runtime).install()
        adapters.AdapterNodes(self, touched).install()
        make_model(self, input_path)

    genai_commit = model_class.__dict__.get("get_genai_commit")
    model_class.get_genai_commit = staticmethod(producer.published_commit)
    model_class.__init__, model_class.make_model = initialized, adapted
    try:
        yield
    finally:
        model_class.__init__, model_class.make_model = initialize, make_model
        model_class.get_genai_commit = genai_commit


def _flatten_rope(config: Any) -> None:
    """Rotary settings by layer type (Gemma 3 in transformers 5) in the flat form that the builder reads."""
    by_type = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in by_type:
        config.rope_parameters = by_type["full_attention"]
        config.rope_theta = by_type["full_attention"]["rope_theta"]
        config.rope_local_base_freq = by_type["sliding_attention"]["rope_theta"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer tells every matrix and, once imported, whatever any library tells; only errors matter here."""
    root = logging.getLogger()
    handlers, root_level = root.handlers[:], root.level
    loggers = [logging.getLogger(name) for name in QUIET]
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
