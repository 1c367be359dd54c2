"""Check help, completion and the commands that inspect a study."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support import samples

from edgeopt.cli.commands import compare, explain, front
from edgeopt.cli.main import COMMANDS, GROUPS, main
from edgeopt.core.study_summary import explanation, recommended, summary


def test_help_groups_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for group, names in GROUPS.items():
        section = out.split(f"{group}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()] == list(names)
    assert "exit codes: 0 done" in out


def test_command_help_shows_example_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    out = capsys.readouterr().out
    assert "example: edgeopt sweep" in out
    assert "config keys: model, target" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "dry-run" in out


def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "edgeopt.bash"
    script.write_text(capsys.readouterr().out)
    for words, expected in (("edgeopt prom", "promote"), ("edgeopt promote --dry", "--dry-run")):
        listed = words.split()
        code = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(listed) - 1}; _edgeopt; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.fixture
def explanations() -> list[str]:
    """Return the lines that explain two trials of an invented study."""
    trials = [
        samples.trial(0, samples.result(decode_ms=0.5, ratio=1.1), "r0", 1),
        samples.trial(1, samples.result(decode_ms=0.7, ratio=1.3), "r1", None),
    ]
    return [*explanation(samples.snapshot(trials), trials[0]), *explanation(samples.snapshot(trials), trials[1])]


def test_explanation_has_five_lines_per_trial(explanations: list[str]) -> None:
    assert [line.partition(":")[0] for line in explanations] == ["recipe", "gained", "lost", "limits", "outcome"] * 2
    assert explanations[4].startswith("outcome: on the front")
    assert "quality/perplexity_ratio exceeds 1.15 by" in explanations[8]
    assert explanations[9].startswith("outcome: infeasible")


def test_dominated_trial_names_a_better_one() -> None:
    better = samples.trial(0, samples.result(decode_ms=0.5, ratio=1.01), "r0", 1)
    worse = samples.trial(1, samples.result(decode_ms=0.7, ratio=1.05), "r1", 2)
    lines = explanation(samples.snapshot([better, worse]), worse)
    assert "trial 0 is at least as good in every objective" in lines[4]


def test_recommendation_is_a_compromise() -> None:
    snapshot = samples.snapshot()
    trial = recommended(snapshot)
    assert trial is not None
    assert trial.on_front
    assert summary(snapshot).startswith(f"Recommended: trial {trial.number} (")
    nothing = samples.snapshot([samples.trial(0, samples.result(decode_ms=9.0), None, None)])
    assert recommended(nothing) is None
    assert summary(nothing) == "No trial satisfies every limit yet (1 of 1 trials are over)."


def test_compare_shows_ratios_and_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    trials = [samples.trial(n, samples.result(decode_ms=ms), f"r{n}", 1).to_json() for n, ms in enumerate((0.5, 0.75))]
    trials[1]["params"] = {"bits": 8}
    units = {"latency/decode_p50_ms": "ms"} | {name: "" for name in trials[0]["metrics"] if "decode" not in name}
    compare.show({"study": "s", "units": units, "trials": trials})
    out = capsys.readouterr().out
    assert "0.75 ms (1.50×)*" in out
    assert [cell.strip() for cell in out.split("bits")[1].splitlines()[0].split("│")[1:3]] == ["4", "8"]


def test_front_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    front.show(samples.snapshot().to_json())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if "…" in line], "no header and no value is cut off"
    numbers = [line for line in lines if line.startswith(("│", "┃"))]
    assert "failed" in numbers[-1], "failed trials are last"
    assert "trial 27 failed at build: BuildError: out of memory" in lines
    assert "limit: latency/decode_p50_ms at most 0.8 x baseline = 1.04 ms" in lines


def test_front_marks_disturbed_trials(capsys: pytest.CaptureFixture[str]) -> None:
    trial = samples.trial(0, samples.result(), None, None)
    disturbed = replace(trial, feasible=False, excess=dict.fromkeys(trial.excess, -0.5), params={"ratio": 0.126077})
    waiting = replace(trial, number=1, state="waiting", feasible=False, metrics={}, excess={})
    front.show(samples.snapshot([disturbed, waiting]).to_json())
    out = capsys.readouterr().out
    assert "infeasible: disturbed" in out
    assert "│0.126│" in out
    assert "waiting: 1 trial" in out


def test_explain_prints_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    explain.show({"explanation": ["recipe: int4", "gained: nothing"]})
    assert capsys.readouterr().out == "recipe: int4\ngained: nothing\n"


def test_unknown_trial_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "0", "--state", str(tmp_path)]) == 2
    assert "there is no study" in capsys.readouterr().err
