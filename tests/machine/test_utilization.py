from __future__ import annotations

import time

from edgeopt.machine.utilization import UtilizationMonitor


def test_the_machine_is_read_while_something_is_done_and_at_its_end() -> None:
    began = time.time()
    with UtilizationMonitor(every_s=0.02) as use:
        time.sleep(0.15)
    assert len(use.readings) >= 3
    times = [reading["at_s"] for reading in use.readings]
    assert times == sorted(times)
    assert began <= times[0] <= times[-1] <= time.time()
    last = use.readings[-1]
    assert 0 <= last["cpu_utilization_percentage"] <= 100
    assert 0 < last["system_memory_usage_percentage"] < 100
    assert last["system_memory_usage_megabytes"] > 10
    assert last["network_receive_megabytes"] >= 0


def test_a_failure_inside_ends_the_readings_too() -> None:
    use = UtilizationMonitor(every_s=0.01)
    try:
        with use:
            raise ValueError
    except ValueError:
        count = len(use.readings)
    time.sleep(0.05)
    assert len(use.readings) == count >= 1
