"""The engine that a command is given, or the bundled one."""

from __future__ import annotations

from pathlib import Path


def folder(given: str) -> Path:
    if given.startswith("models:/"):
        from edgeopt.release import registry
        from edgeopt.tracking import server

        server.probe(server.resolve(None))  # MLflow's own client tries for minutes
        return registry.resolve(given)
    return Path(given)


def bundled() -> Path:
    """The reference model in PyTorch, made once a state folder."""
    from edgeopt import assembly
    from edgeopt import config as configs
    from edgeopt.models.reference import ReferenceModel
    from edgeopt.pipeline import engine_of
    from edgeopt.runtimes.eager import Torch

    config = configs.compose()
    return engine_of(ReferenceModel(), Torch(), assembly.store(config), lambda _: None).directory
