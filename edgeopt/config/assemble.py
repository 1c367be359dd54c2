"""Assemble the job of an evaluation from a composed config: recipe, bench, texts, cache, lease and limits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeopt.cache import StageCache
from edgeopt.checkpoints import tokenizer
from edgeopt.config import parse
from edgeopt.config.compose import Composer, Config
from edgeopt.core.artifact import MANIFEST, Engine
from edgeopt.core.config_objects import canonical_json, instantiate, to_config
from edgeopt.core.corpus import Text, require_disjoint
from edgeopt.core.protocols import Lease, Progress, Runtime
from edgeopt.core.result import Measurement, TrialResult
from edgeopt.core.target import Device, Target
from edgeopt.errors import ConfigError, InputError
from edgeopt.machine import device_lease, process_identity
from edgeopt.machine.postgres_lease import PostgresLease
from edgeopt.measure.harness import samples
from edgeopt.measure.harness.bench import Bench, measure
from edgeopt.measure.quality_prediction import QualityPredictor, restrict_to_quality
from edgeopt.pipeline import evaluate as pipeline
from edgeopt.pipeline.job import Job
from edgeopt.runtimes.torch_eager import Torch
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import to_overrides
from edgeopt.search.storage.database import file_url


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBench:
    """Bench on this machine, with the target and the evaluation text of its measurements.

    Implements `edgeopt.pipeline.job.EngineBench`.
    """

    bench: Bench
    target: Target
    device: Device
    evaluation: Text

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return the probe names by group, in the order of measurement."""
        return self.bench.groups

    @property
    def uncapped(self) -> DeviceBench:
        """Return this bench without the target's memory cap."""
        return replace(self, target=replace(self.target, memory_cap=None))

    def identity(self, probes: Sequence[str]) -> Mapping[str, Any]:
        """Return plain data that determines the results of these probes; part of the cache key."""
        bench = to_config(self.bench.select_probes(probes))
        del bench["stop_early"]  # early stopping changes no measured value
        return {
            "bench": bench,
            "threads": self.target.threads,
            "context_length": self.target.context_length,
            "memory_cap_bytes": self.target.memory_cap_bytes,
            "device": self.device.fingerprint,
            "evaluation": self.evaluation.digest,
        }

    def __call__(
        self,
        engine: Engine,
        runtime: Runtime,
        directory: Path,
        references: Mapping[str, Path],
        progress: Progress,
        probes: Sequence[str] = (),
        *,
        isolated: bool = True,
    ) -> tuple[Measurement, ...]:
        """Run `probes`, or all probes if empty, and return their measurements; see `EngineBench`."""
        bench = self.bench.select_probes(probes) if probes else self.bench
        return measure(
            engine, runtime, bench, self.target, self.evaluation, directory, references, progress, isolated=isolated
        )

    def measure_engine(self, engine: Engine, progress: Progress, probes: Sequence[str] = ()) -> tuple[Measurement, ...]:
        """Measure an engine without references, on the runtime in its manifest. The raw samples are discarded."""
        runtime = instantiate(engine.runtime_config, str(engine.directory / MANIFEST))
        with TemporaryDirectory(prefix="edgeopt-bench-") as folder:
            return self(engine, runtime, Path(folder), {}, progress, probes)

    def merge_samples(self, folders: Sequence[Path], directory: Path) -> None:
        """Merge `samples.json`, `tables` and `logs` of the measurement folders of one engine into `directory`."""
        samples.merge(folders, directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Config that a command requests.

    Attributes:
        name: name of a file in conf/, in sweeps/ or in the user's folder.
        overrides: Hydra overrides, in order.
        config_dir: the user's folder of configs; its files take precedence over those of edgeopt.
    """

    name: str = "config"
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None

    def compose(self, params: Params | None = None) -> Config:
        """Return the resolved config with the parameters of a trial. Raises ConfigError if Hydra cannot compose it."""
        return _composer(self).compose(params or {}, to_overrides)


@cache
def _composer(request: Request) -> Composer:
    return Composer(request.name, request.overrides, request.config_dir)


@cache
def known_metrics(config_dir: Path | None) -> Mapping[str, str]:
    """Return the result of `parse.known_metrics`, computed once per process."""
    return parse.known_metrics(config_dir)


@cache
def this_machine() -> Device:
    """Return the description of this machine without bandwidths and compute rates; detected once per process."""
    from edgeopt.machine.inventory import detect_device

    return detect_device(measure_rates=False)


@cache
def load_text(config_json: str) -> Text:
    """Load a text from the canonical JSON of its source; read once per process."""
    text = instantiate(json.loads(config_json), "text").load()
    assert isinstance(text, Text)
    return text


def build_bench(config: Config) -> DeviceBench:
    """Build the bench that measures the engines of `config` on this machine."""
    return DeviceBench(
        bench=parse.instantiate_group(config, "measure"),
        target=parse.instantiate_group(config, "target"),
        device=this_machine(),
        evaluation=load_text(canonical_json(config["evaluation"])),
    )


def build_job(config: Config, config_dir: Path | None) -> Job:
    """Build the job of `config`: instantiate and check all its config objects, and load both texts.

    Raises ConfigError for an invalid config, InputError for an invalid text.
    """
    recipe = parse.recipe(config)
    parse.cache_limit(config)  # raises ConfigError if it is invalid
    bench = build_bench(config)
    calibration = load_text(canonical_json(config["calibration"]))
    require_disjoint(calibration, bench.evaluation)
    quality_bench = restrict_to_quality(bench.bench)
    return Job(
        recipe=recipe,
        source=parse.instantiate_group(config, "model"),
        steps=tuple((name, instantiate(step, f"step.{name}")) for name, step in recipe.steps),
        runtime=parse.instantiate_group(config, "runtime"),
        reference=Torch(),
        bench=bench,
        quality_predictor=None
        if quality_bench is None
        else QualityPredictor(bench=replace(bench, bench=quality_bench)),
        lease=_lease(store_url(config)),
        target=bench.target,
        device=bench.device,
        limits=parse.limits(config, known_metrics(config_dir)),
        calibration=calibration,
        stop_early=bench.bench.stop_early,
    )


def _lease(database_url: str) -> Lease:
    """Return the lease on this machine's device.

    Workers that share a PostgreSQL database lease the device there, because they may run in separate containers.
    """
    if not database_url.startswith("postgresql"):
        return device_lease
    return PostgresLease(url=database_url, device=process_identity.boot_id())


def build_checked_job(config: Config, config_dir: Path | None) -> Job:
    """Build a job, and check the model, the order and values of the steps and the length of both texts.

    This downloads a remote model but compresses and builds nothing. Raises ConfigError or InputError for the first
    error found.
    """
    job = build_job(config, config_dir)
    pipeline.check_job(job, open_cache(config))
    folder = job.source.locate()
    for key in ("calibration", "evaluation"):
        text = load_text(canonical_json(config[key]))
        tokenizer.windows(text, folder, length=job.target.context_length, limit=1)
    return job


def open_cache(config: Config) -> StageCache:
    """Return the stage cache of `config`. Raises ConfigError for an invalid `cache.limit`."""
    return StageCache(cache_folder(Path(config["state"])), limit_bytes=parse.cache_limit(config))


def cache_folder(state: Path) -> Path:
    """Return the folder of the stage cache inside a state folder."""
    return state / "cache"


def empty_result(request: Request, params: Params) -> TrialResult:
    """Return a result without measurements: the parameters, the target and this machine."""
    recipe = {"text": " ".join(to_overrides(params)), "digest": ""}
    return TrialResult(recipe=recipe, target=_target_name(request), device=to_config(this_machine()), emulated=False)


@cache
def _target_name(request: Request) -> str:
    return str(request.compose()["target"]["name"])


def store_url(config: Config) -> str:
    """Return the database URL of the studies of `config`.

    Raises ConfigError if `store` contains a password, because the config is logged with every run.
    """
    if config["store"] is None:
        return os.environ.get("EDGEOPT_STORE") or file_url(Path(config["state"]).absolute() / "studies.db")
    if re.search(r"://[^/@]*:[^/@]+@", str(config["store"])):
        raise ConfigError(
            "`store` must not contain a password, because the config is logged",
            location="store",
            hint="Set EDGEOPT_STORE to this URL, or store the password in ~/.pgpass",
        )
    return str(config["store"])


def open_engine(folder: Path) -> tuple[Engine, Runtime]:
    """Return the engine in `folder`, after verifying its files, and the runtime in its manifest.

    Raises InputError if the folder does not contain an engine or a file was modified.
    """
    if not folder.is_dir():
        raise InputError(
            "no such folder",
            location=str(folder),
            hint="Use an engine folder or NAME@ALIAS. `edgeopt run` rebuilds an engine that the cache evicted",
        )
    engine = Engine.read(folder)
    engine.verify()
    return engine, instantiate(engine.runtime_config, str(folder / MANIFEST))
