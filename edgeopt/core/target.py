"""What a model must fit: a device's inventory and the limits set for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core import units
from edgeopt.core.config_objects import digest
from edgeopt.core.kernel_times import KernelTimes
from edgeopt.errors import ConfigError

_DIRECTION = re.compile(r"\s*at (most|least)\s+(.*)")
_RELATIVE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*[x×*]\s*baseline\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Inventory of a machine; rates are 0 where they were not measured.

    Attributes:
        isa: instruction sets that matter to matrix kernels (avx2, avx512_vnni, asimddp, …).
        read_gb_per_s: sequential read bandwidth of memory, all cores, in 1e9 bytes per second.
        storage_gb_per_s: sequential read bandwidth of the storage below the working folder, past any cache.
        fp32_gflops, int8_gops: matrix product rate, all cores.
    """

    name: str
    cpu: str
    cores: int
    ram_bytes: int
    isa: tuple[str, ...] = ()
    swap_bytes: int = 0
    storage_bytes: int = 0
    accelerators: tuple[str, ...] = ()
    power_sensors: tuple[str, ...] = ()
    thermal_sensors: tuple[str, ...] = ()
    read_gb_per_s: float = 0.0
    storage_gb_per_s: float = 0.0
    fp32_gflops: float = 0.0
    int8_gops: float = 0.0

    def __post_init__(self) -> None:
        if self.cores < 1 or self.ram_bytes < 1:
            raise ConfigError(f"a device has cores and memory, got {self.cores} and {self.ram_bytes}", location="cores")

    @property
    def fingerprint(self) -> str:
        """What makes two machines the same kind: processor, cores and memory to the GiB."""
        return digest([self.cpu, self.cores, round(self.ram_bytes / 2**30)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device and how engines run on it.

    Attributes:
        device: None stands for the machine that measures.
        threads: compute threads of an engine; 0 takes one for each core.
        context_length: tokens (prompt and generated) for which memory is measured and estimated.
        memory_cap: to which the kernel holds a process that serves an engine while it is measured, cached pages of its
            files included, such as `512 MiB`; None caps nothing.
        kernels: times from which decoding is predicted; None where the device was not profiled.
    """

    name: str
    device: Device | None = None
    threads: int = 0
    context_length: int = 512
    memory_cap: str | None = None
    kernels: KernelTimes | None = None

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"{self.threads} threads cannot run", location="threads", hint="Give 0 or more")
        if self.context_length < 64:
            raise ConfigError(
                f"{self.context_length} tokens are too few", location="context_length", hint="Give 64 or more"
            )
        if 0 < self.memory_cap_bytes < 16 * 2**20:
            raise ConfigError(
                f"{self.memory_cap} holds not even Python", location="memory_cap", hint="Give 16 MiB or more, or null"
            )
        threads = self.threads or (self.device.cores if self.device is not None else 0)
        if self.kernels is not None and threads not in (0, self.kernels.threads):
            raise ConfigError(
                f"kernels were timed with {self.kernels.threads} threads, and engines run with {threads}",
                location="kernels",
                hint="Run edgeopt profile with as many cores, or set target.kernels=null",
            )

    @property
    def memory_cap_bytes(self) -> int:
        """0 without a cap."""
        return 0 if self.memory_cap is None else units.size_bytes(self.memory_cap, "memory_cap")

    def is_emulated_by(self, machine: Device) -> bool:
        """Whether `machine` measures for another kind of machine."""
        return self.device is not None and self.device.fingerprint != machine.fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """`metric` at most `absolute` of its unit, or at most `baseline_factor` times the baseline's value.

    With `least` it is at least as much, as for accuracies and rates, of which more is better.
    """

    metric: str
    unit: str
    absolute: float | None = None
    baseline_factor: float | None = None
    is_minimum: bool = False

    @classmethod
    def parse(cls, metric: str, text: str | float, known: Mapping[str, str]) -> Limit:
        """A limit from a config's `3 GiB`, `0.5 x baseline` or `at least 0.6`; `known` maps metrics to units."""
        location = "limits." + metric.replace("/", ".")
        if metric not in known:
            near = [m for m in sorted(known) if m.split("/")[0] == metric.split("/")[0]] or sorted(known)
            raise ConfigError(f"unknown metric {metric!r}", location=location, hint=f"Choose one of: {', '.join(near)}")
        unit = known[metric]
        directed = _DIRECTION.fullmatch(str(text))
        is_minimum, quantity = (directed[1] == "least", directed[2]) if directed else (False, text)
        relative = _RELATIVE.fullmatch(str(quantity))
        try:
            bound = float(relative[1]) if relative else units.parse(quantity, unit)
        except ConfigError as error:
            raise error.at(location) from error
        if bound <= 0:
            raise ConfigError(f"{text!r} can never be kept", location=location, hint="Give a limit above zero")
        if relative:
            return cls(metric=metric, unit=unit, baseline_factor=bound, is_minimum=is_minimum)
        return cls(metric=metric, unit=unit, absolute=bound, is_minimum=is_minimum)

    def bound(self, baseline_value: float | None) -> float | None:
        """The limit in the metric's unit; None where the baseline that it refers to was not measured."""
        if self.absolute is not None:
            return self.absolute
        if baseline_value is None or self.baseline_factor is None:
            return None
        return self.baseline_factor * baseline_value

    def __str__(self) -> str:
        direction = "at least" if self.is_minimum else "at most"
        if self.absolute is not None:
            return f"{direction} {units.show(self.absolute, self.unit)}"
        return f"{direction} {self.baseline_factor:g} x baseline"
