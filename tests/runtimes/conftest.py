"""What tests of several runtimes look at."""

from pathlib import Path

import pytest

from edgeopt.checkpoints.importing import take_in
from edgeopt.core.artifact import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return take_in(tiny_model, tmp_path_factory.mktemp("checkpoint"))
