"""Provide a deterministic runtime for tests of measurements.

Its engine is a bigram model: row t of a fixed table has the logits of the token after t.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeopt.checkpoints import tokenizer as tokens
from edgeopt.checkpoints.adapters import require
from edgeopt.errors import BuildError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from edgeopt.core.artifact import Checkpoint, Engine
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRuntime:
    """Runtime of bigram tables with adjustable error, speed, memory use and failures.

    Attributes:
        noise: standard deviation of the error added to each logit of the table, as compression would.
        token_s: additional seconds per generated token.
        allocate_mib: memory that an open session allocates.
        crash: failure that replaces the first generated token; empty for none.
    """

    format: ClassVar[str] = "stub/1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("numpy",)
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset({"token_s", "allocate_mib", "crash"})
    fallback: ClassVar[None] = None
    noise: float = 0.0
    token_s: float = 0.0
    allocate_mib: int = 0
    crash: Literal["", "error", "segfault", "out_of_memory", "hang"] = ""

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if the table would be too large."""
        if spec.vocabulary_size > 2**14:
            raise ConfigError(
                f"the vocabulary must have at most {2**14} tokens, got {spec.vocabulary_size}", location="runtime"
            )

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        """Return no predictions."""
        return ()

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        """Write the table and the tokenizer files to `directory`."""
        import numpy as np

        progress("writing the table")
        size = checkpoint.spec.vocabulary_size
        table = 3 * np.random.default_rng(0).standard_normal((size, size))
        table += self.noise * np.random.default_rng(1).standard_normal((size, size))
        np.save(directory / "table.npy", table.astype(np.float32))
        for name in tokens.FILES:
            if (checkpoint.directory / name).is_file():
                shutil.copyfile(checkpoint.directory / name, directory / name)

    def lint(self, engine: Engine) -> list[str]:
        """Return no findings."""
        return []

    def open(self, engine: Engine, *, threads: int) -> FakeSession:
        """Load the table. Raises BuildError if the engine has another format."""
        import numpy as np

        engine.require_format(self.format)
        table = np.load(engine.directory / "table.npy")
        return FakeSession(runtime=self, spec=engine.spec, table=table, ballast=b"\1" * (self.allocate_mib * 2**20))


@dataclass(slots=True, kw_only=True)
class FakeSession:
    """Open bigram table.

    Attributes:
        table: logits, shape (vocabulary, vocabulary).
        ballast: memory that `allocate_mib` requests.
    """

    runtime: FakeRuntime
    spec: ModelSpec
    table: np.ndarray
    ballast: bytes
    backends: ClassVar[tuple[str, ...]] = ("table",)

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        """Yield the most probable next token; the end-of-sequence token does not end the iteration."""
        require(adapter, self.spec)
        last = tokens[-1]
        for _ in range(max_new_tokens):
            self._crash()
            if self.runtime.token_s:
                time.sleep(self.runtime.token_s)
            last = int(self.table[last].argmax())
            yield last

    def _crash(self) -> None:
        match self.runtime.crash:
            case "error":
                raise BuildError("crash=error: the fake runtime fails on request")
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "out_of_memory":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Return the rows of `tokens`, shape (tokens, vocabulary)."""
        require(adapter, self.spec)
        return self.table[list(tokens)]

    def close(self) -> None:
        """Release the allocated memory."""
        self.ballast = b""
