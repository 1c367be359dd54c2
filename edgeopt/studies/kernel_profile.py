"""What decoding costs on this machine: kernels timed alone, and what engines take beside them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
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

IN_BLOCKS = tuple(
    QuantizationScheme(bits=bits, block_size=block, symmetric=True)
    for bits, blocks in BLOCK_SIZES.items()
    for block in blocks
)
OF_INTEGERS = tuple(
    QuantizationScheme(bits=8, block_size=256, symmetric=True, inputs=inputs) for inputs in ("dynamic", "static")
)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS, MOST_S = 16, 128, 5, 10.0


def kernels(device: Device, progress: Progress, *, threads: int = 0) -> KernelTimes:
    """Time the kernels and engines of this machine, the `device`, under its lease. Takes five minutes or more.

    `threads` compute; 0 takes one for each core.
    """
    threads = threads or device.cores
    with device_lease.exclusive(progress), pin_threads(threads):
        pace = ContentionProbe()
        matrix = time_matrix_kernels(
            (None, *IN_BLOCKS, *OF_INTEGERS),
            threads=threads,
            ram_bytes=device.ram_bytes,
            read_gb_per_s=device.read_gb_per_s,
            probe=pace,
            progress=progress,
        )
        bare = KernelTimes(threads=threads, matrix=matrix, layer=(0.0, 0.0, 0.0), token=(0.0, 0.0))
        specs, decode_us = skeletons(), []
        for spec in specs:
            progress(f"timing {len(spec.layers)} layers of {spec.hidden_size} channels")
            decode_us.append(1e6 * _decode_s(spec, threads, pace))
    return fitted(bare, specs, decode_us)


def fitted(bare: KernelTimes, specs: Sequence[ModelSpec], decode_us: Sequence[float]) -> KernelTimes:
    """`bare`, which knows matrices alone, with what layers and tokens take beside them where engines take `decode_us`.

    Least squares of the relative error, with no time below zero.
    """
    import numpy as np
    from scipy.optimize import nnls

    terms = [
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
    beside = np.maximum(0, measured - [bare.decode_us(spec) for spec in specs])
    times = [round(float(us), 3) for us in nnls(np.array(terms) / measured[:, None], beside / measured)[0]]
    return replace(bare, layer=(times[0], times[1], times[2]), token=(times[3], times[4]))


def skeletons() -> list[ModelSpec]:
    """Small Llamas in 4 bits that differ in what a token costs beside its matrices.

    Their weights take 8 MiB at most: how long larger ones take depends on who else uses the last-level cache.
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
    sizes = LayerSpec(intermediate_size=2 * hidden, heads=heads, kv_heads=max(1, heads // 2))
    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        head_size=head_size,
        context_length=512,
        tied_embeddings=False,
        layers=(sizes,) * layers,
    )
    return replace(
        spec, schemes=dict.fromkeys(spec.matrices, QuantizationScheme(bits=4, block_size=32, symmetric=True))
    )


def _decode_s(spec: ModelSpec, threads: int, pace: ContentionProbe) -> float:
    """Seconds a token of an engine of `spec` with random weights, the median of a few decodes at a usual pace."""
    with tempfile.TemporaryDirectory(prefix="edgeopt-profile-") as folder:
        session = Genai().open(_engine(spec, Path(folder)), threads=threads)
        prompt = list(range(PROMPT_TOKENS))
        found = time_decode_rounds(session, prompt, NEW_TOKENS, pace, rounds=ROUNDS, timeout_s=MOST_S)
        session.close()
    counted = [select_undisturbed(*one, pace.best_s) for one in found]
    return median(map(median, filter(None, counted)) if any(counted) else [median(times) for times, _ in found])


def _engine(spec: ModelSpec, folder: Path) -> Engine:
    model, given, rounded, built = (folder / name for name in ("model", "given", "rounded", "engine"))
    for new in (model, given, rounded, built):
        new.mkdir()
    modeling.write_random_llama(spec, model)
    for path in ReferenceModel().locate().glob("tokenizer*"):
        shutil.copy(path, model)
    checkpoint = importing.import_checkpoint(model, given)
    network = modeling.load(checkpoint)
    matrices = quantize_network(network, spec.schemes, Rtn(), [], _silent)
    modeling.save(network, rounded, checkpoint, spec, matrices)
    runtime = Genai()
    runtime.build(Checkpoint.seal(rounded, format=Checkpoint.FORMAT, spec=spec, made_by={}), built, _silent)
    return Engine.seal(built, format=runtime.format, spec=spec, made_by={})


def _silent(_: str) -> None:
    return None
