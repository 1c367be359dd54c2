"""From a composed config to everything that an evaluation is handed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeopt.cache import StageCache
from edgeopt.checkpoints import importing, tokenizer
from edgeopt.config import parse as configs
from edgeopt.config.compose import Composer, Config
from edgeopt.core.artifact import MANIFEST, Engine
from edgeopt.core.config_objects import canonical_json, instantiate, to_config
from edgeopt.core.corpus import Text, require_disjoint
from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import Lease, Progress, Runtime
from edgeopt.core.result import Failure, Measurement, TrialResult
from edgeopt.core.target import Device, Target
from edgeopt.errors import ConfigError, EdgeoptError, InputError
from edgeopt.machine import device_lease, process_identity
from edgeopt.machine.codecarbon_meter import EnergyMeter
from edgeopt.machine.postgres_lease import PostgresLease
from edgeopt.machine.utilization import UtilizationMonitor
from edgeopt.measure.harness import samples
from edgeopt.measure.harness.bench import Bench, measure
from edgeopt.measure.quality_prediction import QualityPredictor, restrict_to_quality
from edgeopt.pipeline import evaluate as pipeline
from edgeopt.pipeline.evaluate import evaluate
from edgeopt.pipeline.job import Job
from edgeopt.runtimes.torch_eager import Torch
from edgeopt.search.expected_error import expected_error
from edgeopt.search.prediction import Prediction
from edgeopt.search.space.parameter import Params
from edgeopt.search.space.search_space import to_overrides
from edgeopt.search.storage.database import file_url

_held = ExitStack()
"""What the last trial of this process returned, until it is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundBench:
    """A bench with the target, the machine and the evaluation text that it measures for."""

    bench: Bench
    target: Target
    device: Device
    evaluation: Text

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        return self.bench.groups

    @property
    def uncapped(self) -> BoundBench:
        return replace(self, target=replace(self.target, memory_cap=None))

    def identity(self, probes: Sequence[str]) -> Mapping[str, Any]:
        bench = to_config(self.bench.select_probes(probes))
        del bench["stop_early"]  # when to stop changes no figure
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
        bench = self.bench.select_probes(probes) if probes else self.bench
        return measure(
            engine, runtime, bench, self.target, self.evaluation, directory, references, progress, isolated=isolated
        )

    def alone(self, engine: Engine, progress: Progress, probes: Sequence[str] = ()) -> tuple[Measurement, ...]:
        """Figures of an engine by itself, on the runtime that its manifest names; only they are kept."""
        runtime = instantiate(engine.made_by["runtime"], str(engine.directory / MANIFEST))
        with TemporaryDirectory(prefix="edgeopt-bench-") as folder:
            return self(engine, runtime, Path(folder), {}, progress, probes)

    def gather(self, folders: Sequence[Path], directory: Path) -> None:
        samples.merge(folders, directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a command was asked for: a config, overrides, and a user's folder of configs."""

    name: str = "config"
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None

    def compose(self, params: Params | None = None) -> Config:
        return _composer(self).compose(params or {}, to_overrides)


@cache
def _composer(request: Request) -> Composer:
    return Composer(request.name, request.overrides, request.config_dir)


@cache
def known_metrics(config_dir: Path | None) -> Mapping[str, str]:
    return configs.known_metrics(config_dir)


@cache
def this_machine() -> Device:
    from edgeopt.machine.inventory import detect_device

    return detect_device(measure_rates=False)


@cache
def text(description: str) -> Text:
    """The text of a described source, read once a process; `description` is its canonical JSON."""
    import json

    loaded = instantiate(json.loads(description), "text").load()
    assert isinstance(loaded, Text)
    return loaded


def bench(config: Config) -> BoundBench:
    """How the engines of `config` are measured on this machine."""
    return BoundBench(
        bench=configs.part(config, "measure"),
        target=configs.part(config, "target"),
        device=this_machine(),
        evaluation=text(canonical_json(config["evaluation"])),
    )


def job(config: Config, config_dir: Path | None) -> Job:
    """Construct and check every part. Raises ConfigError or InputError before any work is done."""
    recipe = configs.recipe(config)
    configs.cache_limit(config)
    bound = bench(config)
    calibration = text(canonical_json(config["calibration"]))
    require_disjoint(calibration, bound.evaluation)
    short = restrict_to_quality(bound.bench)
    return Job(
        recipe=recipe,
        source=configs.part(config, "model"),
        steps=tuple((name, instantiate(step, f"step.{name}")) for name, step in recipe.steps),
        runtime=configs.part(config, "runtime"),
        reference=Torch(),
        bench=bound,
        quality_predictor=None if short is None else QualityPredictor(bench=replace(bound, bench=short)),
        lease=_lease(store_url(config)),
        target=bound.target,
        device=bound.device,
        limits=configs.limits(config, known_metrics(config_dir)),
        calibration=calibration,
        stop_early=bound.bench.stop_early,
    )


def _lease(store: str) -> Lease:
    """Workers that share a database share the lease on the device by it, wherever they run."""
    if not store.startswith("postgresql"):
        return device_lease
    return PostgresLease(url=store, device=process_identity.boot_id())


def checked(config: Config, config_dir: Path | None) -> Job:
    """The job, after model, order, values and the length of the texts were found good; nothing is built for it."""
    made = job(config, config_dir)
    pipeline.plan_job(made, store(config))
    folder = made.source.locate()
    for key in ("calibration", "evaluation"):
        tokenizer.windows(text(canonical_json(config[key])), folder, length=made.target.context_length, limit=1)
    return made


def store(config: Config) -> StageCache:
    return StageCache(cache_folder(Path(config["state"])), limit_bytes=configs.cache_limit(config))


def cache_folder(state: Path) -> Path:
    return state / "cache"


def blank(request: Request, params: Params) -> TrialResult:
    """A result without figures: what was to be tried, for whom, on which machine."""
    recipe = {"text": " ".join(to_overrides(params)), "digest": ""}
    return TrialResult(recipe=recipe, target=_target_name(request), device=to_config(this_machine()), emulated=False)


@cache
def _target_name(request: Request) -> str:
    return str(request.compose()["target"]["name"])


def store_url(config: Config) -> str:
    """Where the studies of `config` are kept. ConfigError for an address that would show a password in every log."""
    if config["store"] is None:
        return os.environ.get("EDGEOPT_STORE") or file_url(Path(config["state"]).absolute() / "studies.db")
    if re.search(r"://[^/@]*:[^/@]+@", str(config["store"])):
        raise ConfigError(
            "a password in a config would be logged",
            location="store",
            hint="Set EDGEOPT_STORE to this address, or keep the password in ~/.pgpass",
        )
    return str(config["store"])


def predict_trial(request: Request, params: Params) -> Prediction:
    """What arithmetic says of one trial, in milliseconds; what is wrong with its values is part of the answer."""
    expected = blank(request, params)
    try:
        config = request.compose(params)
        target, runtime, recipe = (
            configs.part(config, "target"),
            configs.part(config, "runtime"),
            configs.recipe(config),
        )
        original, carried_bytes = _model(canonical_json(config["model"]))
        steps = [(name, instantiate(step, f"step.{name}")) for name, step in recipe.steps]
        plan = pipeline.plan(steps, runtime, original)
    except EdgeoptError as error:
        failure = Failure(stage="plan", kind=type(error).__name__, message=str(error))
        return Prediction(result=replace(expected, failure=failure))
    emulated = target.is_emulated_by(this_machine())
    predictions = plan.runtime.predict(plan.spec, target, carried_bytes=carried_bytes)
    uncompressed = plan.runtime.baseline.predict(original, target, carried_bytes=carried_bytes)
    return Prediction(
        result=replace(
            expected, recipe=recipe.summary(), predictions=predictions, emulated=emulated, target=target.name
        ),
        expected_error=expected_error([step for _, step in steps], plan.specs),
        baseline={m.metric: m.value for m in uncompressed},
    )


@cache
def _model(description: str) -> tuple[ModelSpec, int]:
    """The sizes of a described model, and the bytes that engines take over from it; looked at once a process."""
    import json

    folder = instantiate(json.loads(description), "model").locate()
    return importing.spec_of(folder), importing.carried_bytes(folder)


def evaluate_trial(
    request: Request, params: Params, progress: Callable[[str], None], *, build_only: bool = False
) -> TrialResult:
    """Compose, construct and evaluate one trial, or build it only; what is wrong with its values is its outcome.

    What the result names stays in the cache until this process evaluates the next trial or ends.
    """
    quiet()
    _held.close()
    meter = _meter()
    try:
        config = request.compose(params)
        made = job(config, request.config_dir)
        kept = store(config)
    except EdgeoptError as error:
        failure = Failure(stage="config", kind=type(error).__name__, message=str(error))
        return replace(blank(request, params), failure=failure)
    _held.enter_context(kept.protect(progress))
    meter.joules()  # from here on
    result = observed(lambda: evaluate(made, kept, progress, build_only=build_only))
    return replace(result, energy_j=meter.joules(), energy_method=meter.method)


def observed(evaluation: Callable[[], TrialResult]) -> TrialResult:
    """The result of an evaluation with how busy the machine was meanwhile."""
    with UtilizationMonitor() as use:
        result = evaluation()
    return replace(result, system=tuple(use.readings))


def prepare() -> None:
    """Have what every evaluation needs and what takes seconds to get."""
    import torch  # noqa: F401

    quiet()
    _meter()


@cache
def _meter() -> EnergyMeter:
    return EnergyMeter()


def open_engine(folder: Path) -> tuple[Engine, Runtime]:
    """A verified engine and the runtime that its manifest names."""
    if not folder.is_dir():
        raise InputError(
            "there is no such folder",
            location=str(folder),
            hint="Give an engine folder or models:/NAME@ALIAS; edgeopt run makes again what the cache evicted",
        )
    engine = Engine.read(folder)
    engine.verify()
    if "runtime" not in engine.made_by:
        raise InputError(
            "this is no engine", location=str(folder), hint="Give the folder of an engine, not of a checkpoint"
        )
    return engine, instantiate(engine.made_by["runtime"], str(folder / "edgeopt.json"))


def quiet() -> None:
    """Other libraries' progress bars and advice stay out of the way of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("transformers", "codecarbon", "alembic", "mlflow", "onnx_ir", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
