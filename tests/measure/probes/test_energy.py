from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from codecarbon.external import hardware
from codecarbon.external.ram import RAM
from support import toy_bench

from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.probes.energy import Energy, describe_instrument


def made(kind, **fields):
    """An object of codecarbon's class without the hardware that its constructor looks for."""
    thing = object.__new__(kind)
    vars(thing).update(fields)
    return thing


@pytest.mark.parametrize(
    ("thing", "part", "kind"),
    [
        (made(hardware.CPU, _mode="intel_rapl", _tdp=65), "cpu", "measured"),
        (made(hardware.CPU, _mode="cpu_load", _tdp=65), "cpu", "estimated"),
        (made(hardware.CPU, _mode="constant", _tdp=65), "cpu", "estimated"),
        (made(hardware.GPU), "gpu", "measured"),
        (made(hardware.Raspberry, chip_part="RAM"), "ram", "measured"),
        (made(RAM), "ram", "estimated"),
        (made(hardware.AppleSiliconChip, chip_part="CPU"), "cpu", "estimated"),
    ],
)
def test_only_what_reads_a_counter_is_called_measured(thing, part, kind):
    found = describe_instrument(thing)
    assert found[:2] == (part, kind)
    assert found[2]


def samples(*instruments):
    energy = {"cpu": 6.0, "gpu": 4.0, "ram": 2.0}
    rounds = [{"tokens": 100, "decode_s": 1.0, "tracked_s": 2.0, "energy_j": energy}] * 3
    return {"instruments": [list(i) for i in instruments], "rounds": rounds, "halves": [1, 1]}


CPU, GPU, RAM_MODEL = ("cpu", "measured", "RAPL"), ("gpu", "measured", "NVML"), ("ram", "estimated", "model")


def test_a_token_costs_the_power_for_as_long_as_it_took():
    figures = {f.metric: f for f in Energy().summarize([samples(CPU, RAM_MODEL)])}
    assert figures["energy/measured/cpu_j_per_token"].value == pytest.approx(6 / 2 * 1.0 / 100)
    assert figures["energy/estimated/ram_j_per_token"].value == pytest.approx(2 / 2 * 1.0 / 100)
    assert "energy/measured/gpu_j_per_token" not in figures, "there is no such part"


def test_one_estimated_part_makes_the_whole_power_an_estimate():
    figures = {f.metric: f for f in Energy().summarize([samples(CPU, GPU, RAM_MODEL)])}
    assert figures["energy/estimated/power_w"].value == pytest.approx((6 + 4 + 2) / 2)
    assert "energy/measured/power_w" not in figures


def test_power_is_measured_where_every_part_is():
    figures = {f.metric: f for f in Energy().summarize([samples(CPU, GPU)])}
    assert figures["energy/measured/power_w"].value == pytest.approx((6 + 4) / 2)
    assert "energy/estimated/power_w" not in figures


def test_names_and_kinds_never_contradict_each_other_on_this_machine(tmp_path):
    part = {"_target_": "edgeopt.measure.probes.energy.Energy", "seconds": 0.6}
    figures = toy_bench.measured(tmp_path, FakeRuntime(token_s=0.001), toy_bench.bench(probes={"energy": part}))
    assert {"power_w"} < {metric.rsplit("/", 1)[1] for metric in figures}
    for figure in figures.values():
        assert f"/{figure.kind}/" in figure.metric
        assert figure.value > 0
    if not any(Path("/sys/class/powercap").glob("intel-rapl*")):
        assert "energy/measured/cpu_j_per_token" not in figures


def test_a_meter_reports_to_its_caller_alone() -> None:
    code = "from edgeopt.machine.codecarbon_meter import EnergyMeter; print(EnergyMeter().joules() >= 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
