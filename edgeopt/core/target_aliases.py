"""Map every `_target_` that an older version sealed to the class that replaced it.

Engine manifests, MLflow runs and stored studies name classes by their dotted path. A class that moves keeps its old
path here, so that what was sealed before the move still opens, verifies, rebuilds and promotes.
"""

from __future__ import annotations

from collections.abc import Mapping

ALIASES: Mapping[str, str] = {
    "edgeopt.kernels.Kernels": "edgeopt.core.kernel_times.Kernels",
    "edgeopt.measure.bench.Bench": "edgeopt.measure.harness.bench.Bench",
    "edgeopt.measure.continuations.Continuations": "edgeopt.measure.probes.generation.Continuations",
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
    "edgeopt.spec.Grid": "edgeopt.core.model_spec.Grid",
    "edgeopt.target.Device": "edgeopt.core.target.Device",
    "edgeopt.target.Target": "edgeopt.core.target.Target",
    "edgeopt.texts.bundled.BundledText": "edgeopt.datasets.bundled.BundledText",
    "edgeopt.texts.file.TextFile": "edgeopt.datasets.file.TextFile",
    "edgeopt.texts.hub.HubText": "edgeopt.datasets.hub.HubText",
}


def current(target: str) -> str:
    """Return the dotted path of the class that `target` names today."""
    return ALIASES.get(target, target)
