"""Sample the utilization of CPU, memory, disk and network with psutil while a block runs."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import psutil

from edgeopt.core.result import UtilizationReading

INTERVAL_S = 5.0
_MB = 1e6


class UtilizationMonitor:
    """Context manager that samples the whole machine every `interval_s` seconds and once at the end of the block.

    Attributes:
        readings: one reading per sample. MLflow's UI plots its values, because they have the names of MLflow's system
            metrics.
    """

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self.readings: list[UtilizationReading] = []
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="utilization monitor", daemon=True)
        self._received_mb, self._sent_mb = _read_traffic_mb()

    def __enter__(self) -> UtilizationMonitor:
        psutil.cpu_percent()  # the first call starts the measuring interval
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        received_mb, sent_mb = _read_traffic_mb()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
            "network_receive_megabytes": received_mb - self._received_mb,
            "network_transmit_megabytes": sent_mb - self._sent_mb,
        }
        self.readings.append(UtilizationReading(at_s=time.time(), values=values))


def _read_traffic_mb() -> tuple[float, float]:
    """Return the megabytes received and sent since boot."""
    counters = psutil.net_io_counters()
    return (counters.bytes_recv / _MB, counters.bytes_sent / _MB) if counters else (0.0, 0.0)
