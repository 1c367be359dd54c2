"""Check usage errors, internal errors, and the help of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from support import samples

from edgeopt.cli.commands import doctor, front
from edgeopt.cli.main import main
from edgeopt.studies import terminal

COMMANDS = ("run", "sweep", "front", "promote", "predict", "profile", "bench", "generate", "cache", "doctor")
HEAVY = {"torch", "transformers", "mlflow", "optuna", "hydra", "onnxruntime", "rich", "yaml", "numpy"}


def test_debug_option_shows_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "recipe=int5", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("edgeopt: recipe: ")


def test_internal_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "execute", broken)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "edgeopt: RuntimeError: two lines. Run again with --debug for the details\n"


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["run", "--nope"], ["front", "a", "b"], ["generate", "--max-new-tokens", "x"], ["bench"], []],
)
def test_usage_error_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgeopt: ")
    assert line.endswith("--help")


def test_overrides_and_options_may_be_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe=prune", "--cfg", "step.prune.ratio=0.3", "--json", "state=there"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["step"]["prune"]["ratio"], config["state"]) == (0.3, "there")


def test_help_imports_no_heavy_library() -> None:
    code = f"""
import sys
from edgeopt.cli.main import main
for command in {COMMANDS!r}:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
    assert process.stdout.count("example: edgeopt ") == len(COMMANDS)


def test_front_table_fits_file_width(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = samples.invented_trials(3)
    params = {"recipe": "int4", "step.quantize.block_size": 32, "rounding": "rtn"}
    failed = replace(second, state="failed", failure="config: order: Add it: order=[prune,quantize]")
    front.show(samples.snapshot([replace(first, params=params), failed, third]).to_json())
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "int4" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["int4", "32", "rtn"]
    assert "order=[prune,quantize]" in out, "brackets are not parsed as markup"
    assert max(map(len, out.splitlines())) <= terminal.FILE_WIDTH
