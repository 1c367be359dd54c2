"""Execute the notebooks of the documentation."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient

from .conftest import DOCS, TIMEOUT_S

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


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
