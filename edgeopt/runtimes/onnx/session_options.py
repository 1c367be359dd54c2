"""What ONNX Runtime is told when it opens a portable graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime

from edgeopt.runtimes.onnxruntime_common.session_options import OPTIMIZATION_LEVELS

if TYPE_CHECKING:
    from edgeopt.runtimes.onnx.runtime import PortableOnnx


def options(runtime: PortableOnnx, threads: int, *, in_turn: bool = False) -> onnxruntime.SessionOptions:
    """What a session is told; where sessions compute `in_turn`, none waits at a core that the next one needs.

    Raises BuildError as SessionOptions.config_entries.
    """
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = threads
    found.log_severity_level = 3
    found.enable_cpu_mem_arena = runtime.arena
    found.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, OPTIMIZATION_LEVELS[runtime.graph_optimization]
    )
    for key, value in runtime.config_entries(threads).items():
        found.add_session_config_entry(key, value)
    found.add_session_config_entry("session.force_spinning_stop", str(int(in_turn)))
    return found
