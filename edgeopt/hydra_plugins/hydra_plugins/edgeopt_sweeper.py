"""Search the parameters of any Hydra application under hard limits: `hydra/sweeper=edgeopt`.

Workers run under any Hydra launcher. The application returns its metrics: one number, one number per objective, or a
mapping by metric, which limits require.

Hydra imports every file in this folder when an application starts, so this module imports edgeopt lazily. It cannot use
`from __future__ import annotations`, because Hydra reads the annotations before the module is registered.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig, OmegaConf

log = logging.getLogger(__name__)


@dataclass
class EdgeoptSweeperConf:
    """Fields of `hydra.sweeper`. Fields without a description have the meaning of those under `search` in sweeps/.

    Attributes:
        study: name of the study. An existing study of this name in the store is continued.
        store: `sqlite:///FILE` or `postgresql://USER@HOST/DATABASE`; None uses a file in hydra.sweep.dir.
        workers: number of jobs to launch; each evaluates trials until the search ends.
        objectives: direction by metric; empty if the application returns one number to minimize.
        limits: hard limits by metric, such as `5` or `at least 0.6`.
    """

    _target_: str = "hydra_plugins.edgeopt_sweeper.EdgeoptSweeper"
    study: str = "study"
    store: str | None = None
    workers: int = 1
    objectives: dict[str, str] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    enqueue: list[Any] = field(default_factory=list)
    sampler: str = "tpe"
    seed: int = 0
    trials: int = 20
    time: str | None = None
    stagnation: int | None = None
    lease_s: float = 60.0


ConfigStore.instance().store(group="hydra/sweeper", name="edgeopt", node=EdgeoptSweeperConf, provider="edgeopt")


class EdgeoptSweeper(Sweeper):  # type: ignore[misc]  # Hydra has no type information
    """Sweeper that launches `workers` jobs. They share one study and never wait for each other."""

    def __init__(self, **settings: Any) -> None:
        self._settings: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in settings.items()
        }
        self._config: Any = MISSING

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._hydra_context, self._task_function, self._config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> dict[str, Any]:
        """Run the search, write its trials and Pareto front to `front.yaml` in hydra.sweep.dir and return them."""
        from pathlib import Path

        from edgeopt.hydra_plugins.sweeping import Sweep

        folder = Path(str(self._config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        sweep = Sweep.from_config(self._settings, arguments, folder)
        worker = sweep.worker(self._task_function, self._hydra_context, self._config)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._hydra_context, task_function=worker, config=self._config
        )
        jobs: Sequence[list[str]] = [list(sweep.fixed_overrides)] * self._settings["workers"]
        for job in launcher.launch(jobs, initial_job_idx=0):
            _ = job.return_value  # raises the exception that ended the worker, if any
        document = sweep.front()
        OmegaConf.save(OmegaConf.create(document), folder / "front.yaml")
        log.info(f"{len(document['trials'])} trials, {len(document['front'])} on the front: {folder / 'front.yaml'}")
        return document
