"""Run the code blocks of README.md and the quickstart and both notebooks; check the README's length and all links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient

from edgeopt.cli import main

from .conftest import DOCS, QUICK, ROOT, TIMEOUT_S, Block, blocks

PAGES = (ROOT / "README.md", DOCS / "quickstart.md")
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [block for block in BLOCKS if block.language in ("console", "python") and not block.skip_reason]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
LANGUAGES = ("console", "python", "text", "yaml")
QUICK_SWEEP = f"""
import edgeopt, edgeopt.api

full_sweep = edgeopt.api.sweep

def quick_sweep(**arguments):
    arguments["overrides"] = [*arguments.get("overrides", ()), *{QUICK!r}]
    return full_sweep(**arguments)

edgeopt.api.sweep = quick_sweep
"""
"""Run before each Python block: a sweep in a block measures only a little."""
INTERNAL_LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def reference_study(workspace: Path, environment: dict[str, str]) -> Path:
    """Return a folder with a small study `reference` whose front was promoted, as after `edgeopt sweep`."""
    command = [sys.executable, "-m", "edgeopt.cli", "sweep", *QUICK]
    subprocess.run(command, cwd=workspace, env=environment, check=True, capture_output=True, timeout=TIMEOUT_S)
    return workspace


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_names_a_known_language(block: Block) -> None:
    assert block.language in LANGUAGES


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_block_runs(block: Block, reference_study: Path, environment: dict[str, str]) -> None:
    if block.language == "python":
        program = reference_study / "block.py"
        program.write_text(QUICK_SWEEP + block.code)
        commands = [[sys.executable, str(program)]]
    else:
        commands = [shlex.split(line[2:], comments=True) for line in block.code.splitlines() if line.startswith("$ ")]
        commands = [[sys.executable, "-m", "edgeopt.cli", *words[1:]] for words in commands if words[0] == "edgeopt"]
    assert commands
    for command in commands:
        done = subprocess.run(
            command, cwd=reference_study, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr


def test_every_console_line_is_a_command() -> None:
    for block in RUNNABLE:
        if block.language == "console":
            assert all(line.startswith("$ edgeopt ") for line in block.code.splitlines()), block


def test_own_sweep_file_composes(tmp_path: Path, environment: dict[str, str]) -> None:
    """Compose the complete sweep file of the guide to one's own model."""
    guide = DOCS / "how-to" / "own-model.md"
    sweep_file = next(block for block in blocks(guide) if block.language == "yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text(sweep_file.code)
    command = [
        sys.executable,
        "-m",
        "edgeopt.cli",
        "sweep",
        "--config-dir",
        "configs",
        "--config-name",
        "mine",
        "--cfg",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert "path: /models/my-llama" in done.stdout


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=lambda path: path.stem)
def test_python_of_guides_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, str(block), "exec")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: path.name)
def test_documented_commands_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language == "console":
            for line in block.code.replace("\\\n", " ").splitlines():
                if line.startswith("$ edgeopt "):
                    main._parsed(shlex.split(line.removeprefix("$ edgeopt "), comments=True))


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    assert len([line for line in lines if re.fullmatch(r"\|(?: ?-+ ?\|)+", line)]) <= 1


def markdown_files() -> list[Path]:
    """Return the Markdown files of the repository that people read."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").glob("*.md")]
    found += [*(ROOT / "sweeps").glob("*.md"), *(ROOT / "registry").glob("*.md")]
    return [path for path in found if "generated" not in path.parts]


@pytest.mark.parametrize("page", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    missing = [
        link for link in INTERNAL_LINK.findall(text) if "generated/" not in link and not (page.parent / link).exists()
    ]
    assert not missing


def test_both_notebooks_exist() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_sweep", "from_front_to_release"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_stores_no_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_executes(path: Path, workspace: Path, environment: dict[str, str]) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(workspace)}})
    with mock.patch.dict("os.environ", environment, clear=True):
        client.execute()
    errors = [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    assert not errors
