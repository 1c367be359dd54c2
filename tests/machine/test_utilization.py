from __future__ import annotations

import time

from edgeopt.machine.utilization import UtilizationMonitor


def test_monitor_samples_during_block_and_at_end() -> None:
    start = time.time()
    with UtilizationMonitor(interval_s=0.02) as monitor:
        time.sleep(0.15)
    assert len(monitor.readings) >= 3
    times = [reading.at_s for reading in monitor.readings]
    assert times == sorted(times)
    assert start <= times[0] <= times[-1] <= time.time()
    last = monitor.readings[-1].values
    assert 0 <= last["cpu_utilization_percentage"] <= 100
    assert 0 < last["system_memory_usage_percentage"] < 100
    assert last["system_memory_usage_megabytes"] > 10
    assert last["network_receive_megabytes"] >= 0


def test_monitor_stops_after_error() -> None:
    monitor = UtilizationMonitor(interval_s=0.01)
    try:
        with monitor:
            raise ValueError
    except ValueError:
        count = len(monitor.readings)
    time.sleep(0.05)
    assert len(monitor.readings) == count >= 1
