"""Create the ONNX Runtime session options of a portable engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime

from edgeopt.runtimes.onnxruntime_common.session_options import OPTIMIZATION_LEVELS

if TYPE_CHECKING:
    from edgeopt.runtimes.onnx.runtime import PortableOnnx


def create_session_options(
    runtime: PortableOnnx, threads: int, *, stop_spinning: bool = False
) -> onnxruntime.SessionOptions:
    """Return the options of a session with `threads` intra-op threads.

    Args:
        stop_spinning: stop busy waiting after each run, so that sessions that run in turn do not compete for cores.

    Raises:
        BuildError: the process cannot use the processors of `affinity`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = runtime.arena
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, OPTIMIZATION_LEVELS[runtime.graph_optimization]
    )
    for key, value in runtime.config_entries(threads).items():
        options.add_session_config_entry(key, value)
    options.add_session_config_entry("session.force_spinning_stop", str(int(stop_spinning)))
    return options
