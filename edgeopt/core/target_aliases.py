"""Map every `_target_` that an older version stored to the class that replaced it.

Engine manifests, MLflow runs and stored studies name classes by their dotted path. A class that moves keeps its old
path here, so that older engines and studies still open, verify, rebuild and promote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES: Mapping[str, str] = {
    "edgeopt.kernels.Kernels": "edgeopt.core.kernel_times.KernelTimes",
    "edgeopt.measure.bench.Bench": "edgeopt.measure.harness.bench.Bench",
    "edgeopt.measure.continuations.Continuations": "edgeopt.measure.probes.generation.Generation",
    "edgeopt.measure.energy.Energy": "edgeopt.measure.probes.energy.Energy",
    "edgeopt.measure.latency.Latency": "edgeopt.measure.probes.latency.Latency",
    "edgeopt.measure.memory.Memory": "edgeopt.measure.probes.memory.Memory",
    "edgeopt.measure.parity.Parity": "edgeopt.measure.probes.parity.Parity",
    "edgeopt.measure.quality.Quality": "edgeopt.measure.probes.quality.Quality",
    "edgeopt.measure.size.Size": "edgeopt.measure.probes.size.Size",
    "edgeopt.measure.tasks.Tasks": "edgeopt.measure.probes.tasks.Tasks",
    "edgeopt.runtimes.eager.Torch": "edgeopt.runtimes.torch_eager.Torch",
    "edgeopt.runtimes.genai.Genai": "edgeopt.runtimes.genai.runtime.Genai",
    "edgeopt.runtimes.llamacpp.LlamaCpp": "edgeopt.runtimes.llamacpp.runtime.LlamaCpp",
    "edgeopt.runtimes.portable.PortableOnnx": "edgeopt.runtimes.onnx.runtime.PortableOnnx",
    "edgeopt.runtimes.tensorrt.TensorRt": "edgeopt.runtimes.tensorrt.runtime.TensorRt",
    "edgeopt.search.definition.Search": "edgeopt.search.space.definition.Search",
    "edgeopt.spec.Grid": "edgeopt.core.model_spec.QuantizationScheme",
    "edgeopt.target.Device": "edgeopt.core.target.Device",
    "edgeopt.target.Target": "edgeopt.core.target.Target",
    "edgeopt.texts.bundled.BundledText": "edgeopt.datasets.bundled.BundledText",
    "edgeopt.texts.file.TextFile": "edgeopt.datasets.file.TextFile",
    "edgeopt.texts.hub.HubText": "edgeopt.datasets.hub.HubText",
}

FIELD_ALIASES: Mapping[str, Mapping[str, str]] = {}
"""Renamed fields: current dotted path of the class to {old field: new field}."""


def current(target: str) -> str:
    """Return the current dotted path of the class that `target` names."""
    return ALIASES.get(target, target)


def current_fields(target: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with old field names of the class `target` replaced by the current names."""
    renamed = FIELD_ALIASES.get(current(target), {})
    return {renamed.get(name, name): value for name, value in values.items()}
