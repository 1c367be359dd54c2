from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from codecarbon.external import hardware
from codecarbon.external.ram import RAM
from support import toy_bench

from edgeopt.machine.codecarbon_meter import describe_instrument
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.probes.energy import Energy


def hardware_of(hardware_class, **fields):
    """Return an object of a codecarbon class without running its constructor, which detects hardware."""
    component = object.__new__(hardware_class)
    vars(component).update(fields)
    return component


@pytest.mark.parametrize(
    ("component", "name", "kind"),
    [
        (hardware_of(hardware.CPU, _mode="intel_rapl", _tdp=65), "cpu", "measured"),
        (hardware_of(hardware.CPU, _mode="cpu_load", _tdp=65), "cpu", "estimated"),
        (hardware_of(hardware.CPU, _mode="constant", _tdp=65), "cpu", "estimated"),
        (hardware_of(hardware.GPU), "gpu", "measured"),
        (hardware_of(hardware.Raspberry, chip_part="RAM"), "ram", "measured"),
        (hardware_of(RAM), "ram", "estimated"),
        (hardware_of(hardware.AppleSiliconChip, chip_part="CPU"), "cpu", "estimated"),
    ],
)
def test_only_counters_count_as_measured(component, name, kind):
    instrument = describe_instrument(component)
    assert instrument[:2] == (name, kind)
    assert instrument[2]


def samples(*instruments):
    energy = {"cpu": 6.0, "gpu": 4.0, "ram": 2.0}
    rounds = [{"tokens": 100, "decode_s": 1.0, "tracked_s": 2.0, "energy_j": energy}] * 3
    return {"instruments": [list(i) for i in instruments], "rounds": rounds, "halves": [1, 1]}


CPU, GPU, RAM_MODEL = ("cpu", "measured", "RAPL"), ("gpu", "measured", "NVML"), ("ram", "estimated", "model")


def test_energy_per_token_is_power_times_time():
    measurements = {f.metric: f for f in Energy().summarize([samples(CPU, RAM_MODEL)])}
    assert measurements["energy/measured/cpu_j_per_token"].value == pytest.approx(6 / 2 * 1.0 / 100)
    assert measurements["energy/estimated/ram_j_per_token"].value == pytest.approx(2 / 2 * 1.0 / 100)
    assert "energy/measured/gpu_j_per_token" not in measurements, "there is no GPU"


def test_one_estimated_component_makes_power_estimated():
    measurements = {f.metric: f for f in Energy().summarize([samples(CPU, GPU, RAM_MODEL)])}
    assert measurements["energy/estimated/power_w"].value == pytest.approx((6 + 4 + 2) / 2)
    assert "energy/measured/power_w" not in measurements


def test_power_of_measured_components_is_measured():
    measurements = {f.metric: f for f in Energy().summarize([samples(CPU, GPU)])}
    assert measurements["energy/measured/power_w"].value == pytest.approx((6 + 4) / 2)
    assert "energy/estimated/power_w" not in measurements


def test_metric_names_match_kinds_on_this_machine(tmp_path):
    probe = {"_target_": "edgeopt.measure.probes.energy.Energy", "seconds": 0.6}
    measurements = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(token_s=0.001), toy_bench.make_bench(probes={"energy": probe})
    )
    assert {"power_w"} < {metric.rsplit("/", 1)[1] for metric in measurements}
    for measurement in measurements.values():
        assert f"/{measurement.kind}/" in measurement.metric
        assert measurement.value > 0
    if not any(Path("/sys/class/powercap").glob("intel-rapl*")):
        assert "energy/measured/cpu_j_per_token" not in measurements


def test_energy_meter_prints_nothing() -> None:
    code = "from edgeopt.machine.codecarbon_meter import EnergyMeter; print(EnergyMeter().joules() >= 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
