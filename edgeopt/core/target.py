"""Define the target of a recipe: a device and the limits that an engine must satisfy on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.core import units
from edgeopt.core.config_objects import did_you_mean, digest
from edgeopt.core.kernel_times import KernelTimes
from edgeopt.errors import ConfigError

MIN_CONTEXT_LENGTH = 64
MIN_MEMORY_CAP_BYTES = 16 * 2**20
_DIRECTION = re.compile(r"\s*at (most|least)\s+(.*)")
_RELATIVE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*[x×*]\s*baseline\s*")
_RELATIVE_ATTEMPT = re.compile(r"\d\s*[x×*]|\bba?s\w*l", re.IGNORECASE)
"""Matches a malformed relative limit, such as `0.9x`, `90 % of baseline` or `0.7 x basline`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Inventory of a machine. Bandwidths and compute rates are 0 if they were not measured.

    Attributes:
        isa: instruction sets that matter to matrix kernels (avx2, avx512_vnni, asimddp, …).
        read_gb_per_s: sequential memory read bandwidth of all cores, in 1e9 bytes per second.
        storage_gb_per_s: sequential read bandwidth of the storage of the working folder, without the page cache.
        fp32_gflops, int8_gops: matrix product rate of all cores, in 1e9 operations per second.
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
        for name, value in (("cores", self.cores), ("ram_bytes", self.ram_bytes)):
            if value < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {value}", location=name)

    @property
    def fingerprint(self) -> str:
        """Return the digest of CPU, cores and memory in GiB, equal for machines of the same kind."""
        return digest([self.cpu, self.cores, round(self.ram_bytes / 2**30)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Device and run settings of an engine.

    Attributes:
        device: inventory of the device; None for the measuring machine.
        threads: compute threads of an engine; 0 for one per core.
        context_length: tokens (prompt and generated) for which memory is measured and predicted.
        memory_cap: memory limit that the kernel enforces on the serving process during the measurement, such as
            `512 MiB`. It includes the page cache of the process's files. None for no cap.
        kernels: kernel times for predicting the decode time; None if the device was not profiled.
    """

    name: str
    device: Device | None = None
    threads: int = 0
    context_length: int = 512
    memory_cap: str | None = None
    kernels: KernelTimes | None = None

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(
                f"`threads` must not be negative, got {self.threads}",
                location="threads",
                hint="Use 0 for one thread per core",
            )
        if self.context_length < MIN_CONTEXT_LENGTH:
            raise ConfigError(
                f"`context_length` must be at least {MIN_CONTEXT_LENGTH} tokens, got {self.context_length}",
                location="context_length",
            )
        if 0 < self.memory_cap_bytes < MIN_MEMORY_CAP_BYTES:
            raise ConfigError(
                f"`memory_cap` must be at least {MIN_MEMORY_CAP_BYTES // 2**20} MiB for the Python process alone, "
                f"got {self.memory_cap}",
                location="memory_cap",
                hint="Use a larger cap, or null for no cap",
            )
        threads = self.threads or (self.device.cores if self.device is not None else 0)
        if self.kernels is not None and threads not in (0, self.kernels.threads):
            raise ConfigError(
                f"`kernels` must be measured with as many threads as the target uses ({threads}), got times for "
                f"{self.kernels.threads} threads",
                location="kernels",
                hint=f"Run `edgeopt profile --threads {threads}`, or set target.kernels=null",
            )

    @property
    def memory_cap_bytes(self) -> int:
        """Return the memory cap in bytes, 0 for no cap."""
        return 0 if self.memory_cap is None else units.size_bytes(self.memory_cap, "memory_cap")

    def is_emulated_by(self, machine: Device) -> bool:
        """Return True if `machine` is of a different kind than the target device."""
        return self.device is not None and self.device.fingerprint != machine.fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Upper or lower limit on a metric, absolute or relative to the baseline.

    Attributes:
        metric: name of the metric.
        unit: unit of the metric.
        absolute: bound in this unit; None for a relative limit.
        baseline_factor: bound as a multiple of the baseline's value; None for an absolute limit.
        is_minimum: True for a lower limit, for metrics such as accuracy that should be high.
    """

    metric: str
    unit: str
    absolute: float | None = None
    baseline_factor: float | None = None
    is_minimum: bool = False

    @classmethod
    def parse(cls, metric: str, text: str | float, known: Mapping[str, str]) -> Limit:
        """Parse a limit from a config, such as `3 GiB`, `0.5 x baseline` or `at least 0.6`.

        Args:
            metric: name of the metric.
            text: the limit.
            known: units of all metrics by name.

        Raises:
            ConfigError: the metric is unknown or the limit is malformed. The error names the key of the limit.
        """
        location = "limits." + metric.replace("/", ".")
        require_known_metric(metric, known, location)
        unit = known[metric]
        directed = _DIRECTION.fullmatch(str(text))
        is_minimum, quantity = (directed[1] == "least", directed[2]) if directed else (False, text)
        relative = _RELATIVE.fullmatch(str(quantity))
        if relative is None and _RELATIVE_ATTEMPT.search(str(quantity)):
            raise ConfigError(
                f"a limit relative to the baseline must have the form `0.7 x baseline`, got {text!r}",
                location=location,
                hint="Use a number above 0 followed by `x baseline`",
            )
        try:
            bound = float(relative[1]) if relative else units.parse(quantity, unit)
        except ConfigError as error:
            raise error.at(location) from error
        if bound <= 0:
            raise ConfigError(f"the limit must be above 0, got {text!r}", location=location)
        if relative:
            return cls(metric=metric, unit=unit, baseline_factor=bound, is_minimum=is_minimum)
        return cls(metric=metric, unit=unit, absolute=bound, is_minimum=is_minimum)

    def bound(self, baseline_value: float | None) -> float | None:
        """Return the limit in the metric's unit, or None if it is relative to a baseline without a value."""
        if self.absolute is not None:
            return self.absolute
        if baseline_value is None or self.baseline_factor is None:
            return None
        return self.baseline_factor * baseline_value

    def __str__(self) -> str:
        direction = "at least" if self.is_minimum else "at most"
        if self.absolute is not None:
            return f"{direction} {units.format_quantity(self.absolute, self.unit)}"
        return f"{direction} {self.baseline_factor:g} x baseline"


def require_known_metric(metric: str, known: Mapping[str, str], location: str) -> None:
    """Raise ConfigError if `metric` is not in `known`.

    The hint suggests the closest metric of any group and lists the metrics of the same group, or the groups.
    """
    if metric in known:
        return
    groups = sorted({name.split("/")[0] for name in known})
    group = metric.split("/")[0]
    same_group = [name for name in sorted(known) if name.split("/")[0] == group]
    suggestion = did_you_mean(metric, known) or did_you_mean(metric.rpartition("/")[2], groups, "a metric of {}")
    if same_group:
        listing = f"Metrics of {group}: {', '.join(same_group)}"
    else:
        listing = f"Groups of metrics: {', '.join(groups)}"
    raise ConfigError(f"unknown metric {metric!r}", location=location, hint=f"{suggestion} {listing}".strip())
