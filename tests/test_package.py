"""Build wheel and source distribution, and check what they contain."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a wheel and a source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run("build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return folder


def run(module: str, *arguments: str) -> None:
    """Run a Python module and fail with its output if it fails."""
    process = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr


def test_metadata_is_valid(distributions: Path) -> None:
    run("twine", "check", "--strict", *map(str, distributions.iterdir()))


def test_wheel_passes_check_wheel_contents(distributions: Path) -> None:
    run("check_wheel_contents", *map(str, distributions.glob("*.whl")))


@pytest.mark.parametrize("folder", ["conf", "sweeps", "registry"])
def test_wheel_contains_configuration(folder: str, distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".yaml", ".j2")]
    assert files
    assert {f"edgeopt/{path.relative_to(ROOT)}" for path in files} <= names


def test_sdist_contains_sources_tests_and_docs(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {"edgeopt/api.py", "conf/config.yaml", "tests/test_package.py", "docs/conf.py", "CHANGELOG.md"} <= names
