"""The engine that a command is given, or the bundled one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine
    from edgeopt.core.protocols import Runtime


def argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine",
        nargs="?",
        metavar="ENGINE",
        help="engine folder or models:/NAME@ALIAS (default: the bundled model in PyTorch)",
    )


@contextmanager
def opened(given: str | None) -> Iterator[tuple[Engine, Runtime]]:
    """A verified engine and its runtime, not evicted meanwhile: a folder or models:/NAME@ALIAS, or the bundled one."""
    from edgeopt.cache.entry_locks import protect_paths
    from edgeopt.config import assemble

    if given is None:
        with _bundled() as folder:
            yield assemble.open_engine(folder)
    else:
        folder = _folder(given)
        with protect_paths([folder]):
            yield assemble.open_engine(folder)


def _folder(given: str) -> Path:
    if given.startswith("models:/"):
        from edgeopt.release.registry import client as registry
        from edgeopt.tracking import server

        server.probe(server.resolve(None))  # MLflow's own client tries for minutes
        return registry.resolve(given)
    return Path(given)


@contextmanager
def _bundled() -> Iterator[Path]:
    """The reference model in PyTorch, made once a state folder."""
    from edgeopt.config import assemble
    from edgeopt.config.compose import compose
    from edgeopt.models.reference import ReferenceModel
    from edgeopt.pipeline.evaluate import build_engine
    from edgeopt.runtimes.torch_eager import Torch

    store = assemble.store(compose())
    with store.protect():
        yield build_engine(ReferenceModel(), Torch(), store, lambda _: None).directory
