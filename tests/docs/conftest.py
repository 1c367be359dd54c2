"""Provide the folder in which notebooks and code blocks of the documentation run, and the blocks themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TIMEOUT_S = 1500
"""Of a process or notebook: measurements of other programs on this machine may hold the device meanwhile."""
QUICK = (
    "search.trials=3",
    "search.spread=0",
    "target.context_length=256",
    "measure.max_windows=2",
    "measure.window_tokens=128",
    "measure.prompt_lengths=[16]",
    "measure.retries=0",
    "measure.foreign_cpu_share=2.0",
    "measure.halves_tolerance=100.0",
    "measure.slowed_share=1.0",
    "measure.probes.energy=null",
    "measure.probes.parity=null",
    "measure.probes.continuations=null",
    "measure.probes.latency.processes=1",
    "measure.probes.memory.processes=1",
)
"""Overrides of a sweep whose metrics nobody reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced code block of a Markdown file.

    Attributes:
        skip_reason: text of the `<!-- skip: reason -->` above the block; empty if it runs.
    """

    file: Path
    line: int
    language: str
    code: str
    skip_reason: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks(file: Path) -> Iterator[Block]:
    """Yield the fenced code blocks of a Markdown file."""
    lines = file.read_text().splitlines()
    skip_reason, start, language = "", None, ""
    for number, line in enumerate(lines, start=1):
        fence = re.fullmatch(r"```(\S*)", line)
        if start is None and fence:
            start, language = number, fence[1]
        elif start is not None and line == "```":
            yield Block(
                file=file,
                line=start,
                language=language,
                code="\n".join(lines[start : number - 1]) + "\n",
                skip_reason=skip_reason,
            )
            start, skip_reason = None, ""
        elif start is None and line.strip():
            marker = re.fullmatch(r"<!-- skip: (.+) -->", line)
            skip_reason = marker[1] if marker else ""


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Return the environment of processes that run commands and notebooks of the documentation."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EDGEOPT_"))}
    paths = [str(ROOT), str(ROOT / "edgeopt" / "hydra_plugins"), *filter(None, [own.get("PYTHONPATH")])]
    return {**own, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all notebooks and blocks share, so that they share the cache."""
    return tmp_path_factory.mktemp("docs")
