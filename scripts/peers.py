"""Engines as users of other tools build them, sealed so that edgeopt's own probes can measure them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path


def onnx_runtime(model: Path, directory: Path, method: str, *, bits: int = 4, block_size: int = 32) -> None:
    """onnxruntime-genai's builder with its own quantizer: `default`, `rtn` or `k_quant`; tied tables are shared."""
    from onnxruntime_genai.models import builder

    from edgeopt import intake
    from edgeopt import network as networks
    from edgeopt.artifact import Engine
    from edgeopt.part import describe
    from edgeopt.runtimes import passes
    from edgeopt.runtimes.genai import GENERATING, SCORING, Genai

    spec = intake.spec_of(model)
    options = [
        "hf_token=false",
        "accuracy_level=4",
        f"block_size={block_size}",
        f"algo_config={method}",
        f"shared_embeddings={str(spec.tied_embeddings).lower()}",
        f"op_types_to_quantize={'MatMul/Gather' if spec.tied_embeddings else 'MatMul'}",
    ]
    if bits == 8:
        options.append("matmul_mixed_precision=last_matmul:int8")
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        parsed = builder.parse_extra_options("", str(model), str(directory), f"int{bits}", "cpu", scratch, options)
        builder.create_model("", str(model), str(directory), f"int{bits}", "cpu", scratch, **parsed)
    networks.carry(model, directory)
    passes.split_scoring(directory / GENERATING, directory / SCORING)
    made_by = {"runtime": describe(Genai()), "recipe": {"text": f"onnxruntime-genai, {method}"}}
    Engine.seal(directory, format=Genai.format, spec=spec, made_by=made_by)
