"""Time the matrix kernels of this machine and fit the overhead of layers and tokens from engines."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

from edgeopt.checkpoints import importing, modeling
from edgeopt.checkpoints.quantized_matrix import BLOCK_SIZES
from edgeopt.compress.quantization.layerwise import quantize_network
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.kernel_times import KernelTimes
from edgeopt.core.model_spec import LayerSpec, ModelSpec, QuantizationScheme
from edgeopt.core.protocols import Progress
from edgeopt.core.target import Device
from edgeopt.machine import device_lease
from edgeopt.machine.contention import ContentionProbe, select_undisturbed, time_decode_rounds
from edgeopt.machine.kernel_timing import time_matrix_kernels
from edgeopt.machine.procfs import pin_threads
from edgeopt.models.reference import ReferenceModel
from edgeopt.runtimes.genai.runtime import Genai

BLOCK_SCHEMES = tuple(
    QuantizationScheme(bits=bits, block_size=block, symmetric=True)
    for bits, blocks in BLOCK_SIZES.items()
    for block in blocks
)
INT8_SCHEMES = tuple(
    QuantizationScheme(bits=8, block_size=256, symmetric=True, inputs=inputs) for inputs in ("dynamic", "static")
)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS, TIMEOUT_S = 16, 128, 5, 10.0


def measure_kernel_times(device: Device, progress: Progress, *, threads: int = 0) -> KernelTimes:
    """Time the matrix kernels and small engines of this machine under the device lease. Takes some minutes.

    Args:
        threads: compute threads; 0 uses one per core.
    """
    threads = threads or device.cores
    with device_lease.exclusive(progress), pin_threads(threads):
        probe = ContentionProbe()
        matrix = time_matrix_kernels(
            (None, *BLOCK_SCHEMES, *INT8_SCHEMES),
            threads=threads,
            ram_bytes=device.ram_bytes,
            read_gb_per_s=device.read_gb_per_s,
            probe=probe,
            progress=progress,
        )
        matrix_times = KernelTimes(threads=threads, matrix=matrix, layer=(0.0, 0.0, 0.0), token=(0.0, 0.0))
        specs, decode_us = profiled_specs(), []
        for spec in specs:
            progress(f"timing {len(spec.layers)} layers of {spec.hidden_size} channels")
            decode_us.append(1e6 * _decode_s(spec, threads, probe))
    return fit_overhead(matrix_times, specs, decode_us)


def fit_overhead(matrix_times: KernelTimes, specs: Sequence[ModelSpec], decode_us: Sequence[float]) -> KernelTimes:
    """Fit the overhead of layers and tokens to the decode times of engines and return it with `matrix_times`.

    The fit is a non-negative least squares fit of the relative error.

    Args:
        matrix_times: times of the matrix kernels, with an overhead of 0.
        specs: model specs of the engines.
        decode_us: measured time per token of each engine, in microseconds.
    """
    import numpy as np
    from scipy.optimize import nnls

    terms = [  # coefficients of `layer` and `token` in KernelTimes.non_matrix_us
        [
            len(spec.layers),
            1e-3 * len(spec.layers) * spec.hidden_size,
            1e-3 * sum(layer.heads for layer in spec.layers),
            1.0,
            1e-3 * spec.vocabulary_size,
        ]
        for spec in specs
    ]
    measured = np.array(decode_us)
    overhead = np.maximum(0, measured - [matrix_times.decode_us(spec) for spec in specs])
    times = [round(float(us), 3) for us in nnls(np.array(terms) / measured[:, None], overhead / measured)[0]]
    return replace(matrix_times, layer=(times[0], times[1], times[2]), token=(times[3], times[4]))


def profiled_specs() -> list[ModelSpec]:
    """Return the specs of small 4-bit Llama models that differ in the overhead per layer and per token.

    Each reads at most 8 MiB of weights per token. The times of larger models would depend on other users of the
    last-level cache.
    """
    return [
        _llama(layers=1, hidden=256, vocabulary=1024),
        _llama(layers=1, hidden=256, vocabulary=32768),
        *(_llama(layers=9, hidden=hidden, vocabulary=1024) for hidden in (128, 256)),
        _llama(layers=4, hidden=512, vocabulary=1024),
        _llama(layers=1, hidden=1024, vocabulary=1024),
        _llama(layers=2, hidden=128, vocabulary=1024, head_size=16),
        *(_llama(layers=9, hidden=hidden, vocabulary=1024, head_size=16) for hidden in (128, 256)),
    ]


def _llama(*, layers: int, hidden: int, vocabulary: int, head_size: int = 64) -> ModelSpec:
    heads = hidden // head_size
    layer = LayerSpec(intermediate_size=2 * hidden, heads=heads, kv_heads=max(1, heads // 2))
    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        head_size=head_size,
        context_length=512,
        tied_embeddings=False,
        layers=(layer,) * layers,
    )
    return replace(
        spec, schemes=dict.fromkeys(spec.matrices, QuantizationScheme(bits=4, block_size=32, symmetric=True))
    )


def _decode_s(spec: ModelSpec, threads: int, probe: ContentionProbe) -> float:
    """Return the median seconds per token of an engine with random weights.

    Only undisturbed tokens count, unless every token was disturbed.
    """
    prompt = list(range(PROMPT_TOKENS))
    with (
        tempfile.TemporaryDirectory(prefix="edgeopt-profile-") as folder,
        closing(Genai().open(_build_random_engine(spec, Path(folder)), threads=threads)) as session,
    ):
        rounds = time_decode_rounds(session, prompt, NEW_TOKENS, probe, rounds=ROUNDS, timeout_s=TIMEOUT_S)
    undisturbed = [select_undisturbed(*round_, probe.best_s) for round_ in rounds]
    return median(
        map(median, filter(None, undisturbed)) if any(undisturbed) else [median(times) for times, _ in rounds]
    )


def _build_random_engine(spec: ModelSpec, folder: Path) -> Engine:
    model, imported, quantized, built = (folder / name for name in ("model", "imported", "quantized", "engine"))
    for directory in (model, imported, quantized, built):
        directory.mkdir()
    modeling.write_random_llama(spec, model)
    for path in ReferenceModel().locate().glob("tokenizer*"):
        shutil.copy(path, model)
    checkpoint = importing.import_checkpoint(model, imported)
    network = modeling.load(checkpoint)
    matrices = quantize_network(network, spec.schemes, Rtn(), [], lambda _: None)
    modeling.save(network, quantized, checkpoint, spec, matrices)
    runtime = Genai()
    runtime.build(Checkpoint.seal(quantized, format=Checkpoint.FORMAT, spec=spec, made_by={}), built, lambda _: None)
    return Engine.seal(built, format=runtime.format, spec=spec, made_by={})
