"""What tests of several runtimes look at."""

from pathlib import Path

import pytest

from edgeopt.artifact import Checkpoint
from edgeopt.intake import take_in


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return take_in(tiny_model, tmp_path_factory.mktemp("checkpoint"))
