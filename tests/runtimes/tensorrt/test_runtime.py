"""Test the settings of the TensorRT runtime, the models it rejects before any work, and `edgeopt build-plan`."""

from __future__ import annotations

import pytest

from edgeopt.cli.main import main
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.errors import BuildError, ConfigError, InputError
from edgeopt.runtimes.tensorrt.runtime import TensorRt


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Quantize(weights="int4", embedding="float", symmetric=False), "asymmetric.*symmetric=true"),
        (Quantize(weights="int4", lm_head="int8", embedding="int8", symmetric=True), "embedding=float|8-bit weights"),
        (Quantize(weights="int8", embedding="float", symmetric=True), "int8_activations"),
        (Int8(), "ranges from calibration text"),
        (KvCache(), "quantized KV cache"),
    ],
)
def test_unsupported_quantization_is_rejected(step, message, checkpoint):
    with pytest.raises(ConfigError, match=message):
        TensorRt().check(step.plan(checkpoint.spec))


def test_all_scheme_faults_are_reported_together(checkpoint):
    spec = Quantize(weights="int4", lm_head="int8", embedding="int8").plan(checkpoint.spec)
    with pytest.raises(
        ConfigError, match=r"asymmetric .*; .*quantized embedding table.*symmetric=true\..*embedding=float"
    ):
        TensorRt().check(spec)


def test_pattern_without_matching_unit_is_rejected(checkpoint):
    with pytest.raises(ConfigError, match=r"`in_fp32` must match units of the model, got 'layers.9.down'"):
        TensorRt(in_fp32=("layers.9.down",)).check(checkpoint.spec)


@pytest.mark.parametrize(
    "values",
    [{"version": "9.3"}, {"version": "new"}, {"optimization_level": 6}, {"prompt_tokens": 0}, {"weights_mib": -1}],
)
def test_invalid_settings_are_rejected(values):
    with pytest.raises(ConfigError):
        TensorRt(**values)


def test_build_plan_without_gpu_exits_with_1(planned, tmp_path, capsys):
    assert main(["build-plan", str(planned.directory), "--out", str(tmp_path / "engine")]) == BuildError.exit_code
    assert "this machine has no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_build_plan_rejects_nonempty_output_folder(planned, capsys):
    assert main(["build-plan", str(planned.directory), "--out", str(planned.directory)]) == InputError.exit_code
    assert "the output folder must be empty" in capsys.readouterr().err
