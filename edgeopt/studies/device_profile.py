"""Measure this machine and describe it as a target."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from edgeopt.config import trial_process
from edgeopt.core.target import Target
from edgeopt.errors import ConfigError
from edgeopt.machine.inventory import detect_device
from edgeopt.studies import kernel_profile

if TYPE_CHECKING:
    from edgeopt.core.protocols import Progress


def profile_machine(name: str = "", *, threads: int = 0, progress: Progress = lambda _: None) -> Target:
    """Return this machine as a target: bandwidth, compute rates and kernel times. Takes some minutes.

    Args:
        name: name of the target; the host name by default.
        threads: compute threads of engines; 0 stands for one per core.

    Raises:
        ConfigError: the machine has fewer cores than `threads`.
    """
    trial_process.silence_libraries()
    device = detect_device(measure_rates=True)
    if not 0 <= threads <= device.cores:
        raise ConfigError(
            f"`threads` must be between 0 and {device.cores}, the cores of this machine; got {threads}",
            location="--threads",
            hint="Give fewer threads, or 0 for one per core",
        )
    kernels = kernel_profile.measure_kernel_times(device, progress, threads=threads)
    name = name or platform.node().split(".")[0] or "this_machine"
    return Target(name=name, device=device, threads=threads, kernels=kernels)
