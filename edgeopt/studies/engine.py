"""Open an engine by folder or registry URI and generate text with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from edgeopt.cache.entry_locks import protect_paths
from edgeopt.checkpoints import adapters, tokenizer
from edgeopt.config import assemble
from edgeopt.config.compose import compose
from edgeopt.errors import ConfigError, InputError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.core.protocols import Runtime


@contextmanager
def verified_engine(source: str | Path | None) -> Iterator[tuple[Engine, Runtime]]:
    """Yield a verified engine with its runtime. The cache does not evict the engine inside the block.

    Args:
        source: an engine folder, `NAME@ALIAS` or `models:/NAME/VERSION`. An existing folder takes precedence. None is
            the bundled reference model in PyTorch.
    """
    if source is None:
        with _bundled_engine() as folder:
            yield assemble.open_engine(folder)
    else:
        folder = _resolve(str(source))
        with protect_paths([folder]):
            yield assemble.open_engine(folder)


def _resolve(source: str) -> Path:
    if source.startswith("models:/") or ("@" in source and not Path(source).exists()):
        from edgeopt.release.registry import client as registry
        from edgeopt.tracking import server

        server.probe(server.resolve_uri(None))  # MLflow's own client retries for minutes
        return registry.resolve(source)
    return Path(source)


@contextmanager
def _bundled_engine() -> Iterator[Path]:
    """Yield the folder of the reference model in PyTorch, built once per state folder."""
    from edgeopt.models.reference import ReferenceModel
    from edgeopt.pipeline.evaluate import build_engine
    from edgeopt.runtimes.torch_eager import Torch

    store = assemble.open_cache(compose())
    with store.protect():
        yield build_engine(ReferenceModel(), Torch(), store, lambda _: None).directory


class LoadedEngine:
    """A verified engine that is open for inference. Use it as a context manager, or call `close`.

    Attributes:
        engine: folder, digest, files and model spec of the engine.
    """

    def __init__(self, source: str | Path | None = None, *, threads: int = 0) -> None:
        """Open an engine; see `edgeopt.load_engine`."""
        self._resources = ExitStack()
        try:
            self.engine, runtime = self._resources.enter_context(verified_engine(source))
            self._session = runtime.open(self.engine, threads=threads or assemble.this_machine().cores)
            self._resources.callback(self._session.close)
            self._tokenizer = tokenizer.load(self.engine.directory)
        except BaseException:
            self._resources.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine's memory. Calling it twice is harmless."""
        self._resources.close()

    @property
    def digest(self) -> str:
        """Return the sha256 of the engine's format, model spec and files."""
        return self.engine.digest

    def tokens(self, prompt: str, *, max_new_tokens: int = 64, adapter: str | None = None) -> Iterator[int]:
        """Yield the token ids of a greedy completion as they are generated.

        Raises:
            ConfigError: `max_new_tokens` is below 1, or the engine has no such adapter.
            InputError: the prompt does not fit into the context of the model.
        """
        if max_new_tokens < 1:
            raise ConfigError(
                f"`max_new_tokens` must be at least 1, got {max_new_tokens}",
                location="--max-new-tokens",
                hint="Give 1 or more",
            )
        adapters.require(adapter, self.engine.spec, location="--adapter")
        ids = tokenizer.prefix_ids(self.engine.directory) + self._tokenizer.encode(prompt, add_special_tokens=False).ids
        free_tokens = self.engine.spec.context_length - len(ids)
        if free_tokens < 1:
            raise InputError(
                f"the prompt must be shorter than the context of {self.engine.spec.context_length} tokens, "
                f"got {len(ids)} tokens",
                location="--prompt",
                hint="Give a shorter prompt",
            )
        return self._session.generate(ids, min(max_new_tokens, free_tokens), adapter=adapter)

    def generate(self, prompt: str, *, max_new_tokens: int = 64, adapter: str | None = None) -> str:
        """Return the greedy completion of a prompt; see `tokens` for the errors."""
        return self.decode(list(self.tokens(prompt, max_new_tokens=max_new_tokens, adapter=adapter)))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(tokens))

    def __repr__(self) -> str:
        return f"LoadedEngine({self.engine.format}, {self.digest[:12]}, {self.engine.size_bytes / 2**20:.1f} MiB)"
