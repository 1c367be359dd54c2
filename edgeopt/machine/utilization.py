"""How busy the machine was while something was done: its processors, memory, disk and network, by psutil."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import psutil

EVERY_S = 5.0
_MB = 1e6


class UtilizationMonitor:
    """Readings of the whole machine for as long as the block lasts: every few seconds, and at its end.

    Attributes:
        readings: each with `at_s`, seconds since 1970, and figures under the names of MLflow's system metrics, beside
            which the MLflow UI draws them.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.readings: list[dict[str, float]] = []
        self._every_s = every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system use", daemon=True)
        self._received, self._sent = _traffic_mb()

    def __enter__(self) -> UtilizationMonitor:
        psutil.cpu_percent()  # the first call begins to count
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        self._read()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self._read()

    def _read(self) -> None:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        received, sent = _traffic_mb()
        self.readings.append(
            {
                "at_s": time.time(),
                "cpu_utilization_percentage": psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / _MB,
                "system_memory_usage_percentage": 100 * memory.used / memory.total,
                "disk_usage_percentage": disk.percent,
                "disk_available_megabytes": disk.free / _MB,
                "network_receive_megabytes": received - self._received,
                "network_transmit_megabytes": sent - self._sent,
            }
        )


def _traffic_mb() -> tuple[float, float]:
    """Megabytes received and sent since the machine started."""
    count = psutil.net_io_counters()
    return (count.bytes_recv / _MB, count.bytes_sent / _MB) if count else (0.0, 0.0)
