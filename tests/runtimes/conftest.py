"""Share the small model between the tests of all runtimes."""

from pathlib import Path

import pytest

from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.core.artifact import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))
