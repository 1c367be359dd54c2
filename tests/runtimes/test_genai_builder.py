"""What building an engine leaves behind in the process that builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeopt.artifact import Checkpoint

BUILD = """
import logging, sys
from pathlib import Path
from edgeopt.artifact import Checkpoint
from edgeopt.runtimes.genai import Genai

Genai().build(Checkpoint.read(Path(sys.argv[1])), Path(sys.argv[2]), lambda _: None)
assert logging.getLogger().level == logging.WARNING and logging.getLogger().handlers == []
"""


def test_a_program_that_builds_an_engine_keeps_its_own_logging(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The builder imports a library that makes the root logger tell everything on stderr."""
    (tmp_path / "engine").mkdir()
    command = [sys.executable, "-c", BUILD, str(checkpoint.directory), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
