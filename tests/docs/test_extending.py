"""Run the extensions of docs/how-to/extend.md from an installed plugin."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import DOCS, QUICK, TIMEOUT_S, blocks

GUIDE = DOCS / "how-to" / "extend.md"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write every file of the guide, and the metadata that pip would write for the package."""
    folder = tmp_path_factory.mktemp("plugin")
    for block in blocks(GUIDE):
        if named := re.match(r"(?:# @package \S+\n)?# (my_\S+)\n", block.code):
            file = folder / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
    (folder / "my_plugin" / "__init__.py").touch()
    metadata = folder / "my_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[edgeopt.plugins]\nmy_plugin = my_plugin\n")
    return folder


def edgeopt_run(plugin: Path, model: Path, environment: dict[str, str], *overrides: str) -> dict:
    """Return the document of `edgeopt run` with the plugin on the path."""
    quick = [override for override in QUICK if not override.startswith(("search.", "target.", "measure.window_tokens"))]
    command = [sys.executable, "-m", "edgeopt.cli", "run", "--json", "--config-dir", str(plugin / "my_conf")]
    command += ["model=local", f"model.path={model}", "target.context_length=96", "measure.window_tokens=64"]
    command += ["measure.probes.latency=null", "measure.probes.memory=null"]  # not examined, and slow
    command += [*(item for item in quick if ".latency." not in item and ".memory." not in item), *overrides]
    path = f"{plugin}{os.pathsep}{environment['PYTHONPATH']}"
    done = subprocess.run(
        command, cwd=plugin, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_technique_and_probe_run(plugin: Path, tiny_model: Path, environment: dict[str, str]) -> None:
    document = edgeopt_run(
        plugin, tiny_model, environment, "recipe=clip_int8", "+probe@measure.probes.confidence=confidence"
    )
    assert "quality/confidence" in json.dumps(document)
    assert document["failure"] is None


def test_runtime_builds_and_measures(plugin: Path, tiny_model: Path, environment: dict[str, str]) -> None:
    document = edgeopt_run(plugin, tiny_model, environment, "runtime=eager", "recipe=baseline")
    assert document["failure"] is None
    assert "quality/perplexity" in json.dumps(document)


def test_gate_reads_its_tag(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plugin))
    from edgeopt.release import policy

    loaded = policy.parse(
        yaml.safe_load((plugin / "my_conf" / "registry" / "reviewed.yaml").read_text()), name="reviewed", location=""
    )
    (gate,) = loaded.gates
    assert gate.check(Candidate({"reviewed_by": "ada"})).passed
    assert not gate.check(Candidate({})).passed


class Candidate:
    """A candidate that has only the tags of its run."""

    def __init__(self, run_tags: dict[str, str]) -> None:
        self.run_tags = run_tags
