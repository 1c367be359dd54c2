"""The Python API: what a notebook or a service calls. Every name is also available as `edgeopt.NAME`.

Common settings are keyword arguments, all other settings are Hydra overrides. The functions raise the exceptions of
edgeopt.errors, never exit the process, and print nothing unless `progress=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeopt.config.assemble import Request
from edgeopt.core.result import Measurement, TrialResult, Verdict
from edgeopt.core.study_snapshot import Champion, StudySnapshot, TrialSnapshot
from edgeopt.core.target import Target
from edgeopt.errors import ConfigError
from edgeopt.release.promote import Promotion
from edgeopt.release.rollback import Rollback
from edgeopt.release.verify import Verification
from edgeopt.studies.engine import LoadedEngine
from edgeopt.studies.progress import Reporter, SilentReporter
from edgeopt.studies.recipe_prediction import RecipePrediction
from edgeopt.studies.single_run import SingleRun
from edgeopt.studies.study import Study, Trials

__all__ = [
    "Champion",
    "LoadedEngine",
    "Measurement",
    "Promotion",
    "RecipePrediction",
    "Rollback",
    "SingleRun",
    "Study",
    "StudySnapshot",
    "Target",
    "TrialResult",
    "TrialSnapshot",
    "Trials",
    "Verdict",
    "Verification",
    "load_engine",
    "load_study",
    "predict",
    "profile",
    "promote",
    "rollback",
    "run",
    "sweep",
    "verify",
]

Limits = Mapping[str, str | float]
"""Limits by metric, with dots or slashes: `{"memory.peak_rss_mib": "200 MiB", "quality.perplexity_ratio": 1.05}`."""


def run(
    *,
    model: str | Path | None = None,
    recipe: str | None = None,
    runtime: str | None = None,
    target: str | None = None,
    limits: Limits | None = None,
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    progress: bool = False,
) -> SingleRun:
    """Compress, build and measure one recipe, and log it to MLflow.

    Example:
        `edgeopt.run(model="./my-llama", recipe="int4").result.metrics["size/engine_mib"]`

    Args:
        model: folder of a model in Hugging Face layout, or a choice of conf/model. Default: the bundled model.
        recipe: choice of conf/recipe, such as `int4`.
        runtime: choice of conf/runtime: `genai`, `onnx`, `llamacpp`, `tensorrt` or `torch`.
        target: choice of conf/target.
        limits: hard limits by metric.
        overrides: further Hydra overrides, such as `step.quantize.block_size=64`.
        config_dir: folder of your own configs, which take precedence over the bundled ones.
        progress: show progress on stderr.

    Raises:
        ConfigError: a value is invalid; nothing was done.
        InputError: the model or text cannot be read.
        TrackingError: MLflow does not accept the run.
    """
    from edgeopt.studies.single_run import evaluate_recipe

    choices = {"recipe": recipe, "runtime": runtime, "target": target}
    request = _request("config", model, choices, limits, overrides, config_dir)
    return evaluate_recipe(request, _reporter(progress))


def predict(
    *,
    model: str | Path | None = None,
    recipe: str | None = None,
    runtime: str | None = None,
    target: str | None = None,
    limits: Limits | None = None,
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
) -> RecipePrediction:
    """Predict size, memory and, on a profiled target, speed of a recipe's engine by arithmetic, in a second.

    Arguments as for `run`. Raises ConfigError if the recipe is invalid or nothing can be predicted.
    """
    from edgeopt.studies.recipe_prediction import predict_recipe

    choices = {"recipe": recipe, "runtime": runtime, "target": target}
    return predict_recipe(_request("config", model, choices, limits, overrides, config_dir))


def profile(name: str = "", *, threads: int = 0, out: str | Path | None = None, progress: bool = False) -> Target:
    """Measure this machine as a target: bandwidth, compute rates and kernel times. Takes some minutes.

    Args:
        name: name of the target; the host name by default.
        threads: compute threads of engines; 0 for one per core.
        out: YAML file to write, such as `my_configs/target/box.yaml`.
        progress: show progress on stderr.
    """
    from edgeopt.machine.inventory import target_yaml
    from edgeopt.studies.device_profile import profile_machine

    with _reporter(progress).step("measuring this machine") as step:
        target = profile_machine(name, threads=threads, progress=step)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(target_yaml(target))
    return target


def sweep(
    *,
    model: str | Path | None = None,
    sweep: str = "reference",
    target: str | None = None,
    limits: Limits | None = None,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    config_dir: str | Path | None = None,
    progress: bool = False,
) -> Study:
    """Search recipes under hard limits until the study is complete; promote its front if the sweep names a policy.

    The same call continues a sweep that was interrupted.

    Example:
        `edgeopt.sweep(model="./my-llama", limits={"memory.peak_rss_mib": "200 MiB"}, overrides=["search.trials=30"])`

    Args:
        sweep: name of a file in sweeps/ or `config_dir`.
        workers: processes that evaluate trials in parallel. Default: `workers` of the sweep file, or 1.
        model, target, limits, overrides, config_dir, progress: as for `run`.

    Raises:
        ConfigError: the sweep is invalid; nothing was started.
        GateError: a release gate refused a trial of the front. The study is complete: use `load_study`.
        TrackingError: MLflow does not accept the results, which stay in the study.
    """
    from edgeopt.studies.sweep import run_sweep

    request = _request(sweep, model, {"target": target, "workers": workers}, limits, overrides, config_dir)
    return Study(run_sweep(request, _reporter(progress)).study)


def load_study(
    name: str | None = None, *, state: str | Path = ".edgeopt", store: str | None = None, progress: bool = False
) -> Study:
    """Return a study of an earlier sweep.

    Args:
        name: name of the study; the latest one by default.
        state: state folder of the sweep.
        store: `sqlite:///FILE` or `postgresql://USER@HOST/DATABASE`. Default: EDGEOPT_STORE, or a file in `state`.
        progress: show progress of later operations on stderr.

    Raises:
        InputError: the study does not exist.
    """
    from edgeopt.studies.open_study import OpenStudy

    return Study(OpenStudy.find(name, Path(state), store, reporter=_reporter(progress)))


def promote(
    study: Study | str | None = None,
    *,
    policy: str = "default",
    trial: int | None = None,
    reason: str = "",
    private_key: str | Path | None = None,
    dry_run: bool = False,
    config_dir: str | Path | None = None,
) -> Promotion:
    """Register the front of a study in the MLflow registry and set the aliases of a release policy.

    Args:
        study: a study or its name; the latest one by default.
        policy: name of a file in registry/.
        trial: register only this trial of the front; the whole front by default.
        reason: reason to record in the ledger.
        private_key: PEM file that signs the engines. Default: the environment variable EDGEOPT_SIGNING_KEY.
        dry_run: run the gates and change nothing.
        config_dir: folder of your own configs, whose registry/ takes precedence.

    Raises:
        InputError: the study does not exist, or `trial` is not on its front.
        InfeasibleError: the front is empty.
        GateError: a gate refused, or an approval is missing.
    """
    opened = study if isinstance(study, Study) else load_study(study)
    return opened.promote(
        policy=policy, trial=trial, reason=reason, private_key=private_key, dry_run=dry_run, config_dir=config_dir
    )


def rollback(
    reference: str,
    *,
    reason: str,
    to: int | str | None = None,
    tracking_uri: str | None = None,
    config_dir: str | Path | None = None,
) -> Rollback:
    """Point an alias back at its previous version, or at an earlier one.

    Args:
        reference: `NAME@ALIAS`.
        reason: reason to record in the ledger.
        to: an earlier version to which the alias pointed; the previous one by default.
        tracking_uri: MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or ./mlflow.db.
        config_dir: folder of your own configs, whose registry/ contains the policy of the model.

    Raises:
        InputError: the alias or version does not exist.
        GateError: the earlier version is damaged, or its signature does not match.
    """
    from edgeopt.studies.releases import roll_back

    return roll_back(
        reference,
        reason,
        to=None if to is None else str(to),
        tracking_uri=tracking_uri,
        config_dir=None if config_dir is None else Path(config_dir),
    )


def verify(
    reference: str,
    *,
    public_key: str | Path | None = None,
    folder: str | Path | None = None,
    tracking_uri: str | None = None,
) -> Verification:
    """Check the files, signature and ledger of a registered version, or a pulled copy of it.

    Args:
        reference: `NAME/VERSION` or `NAME@ALIAS`, with or without `models:/`.
        public_key: PEM file to check the signature with.
        folder: check the engine in this folder, which `edgeopt pull` wrote, instead of the registry's files.
        tracking_uri: MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or ./mlflow.db.

    Returns:
        The result of every check. `Verification.require` raises GateError if a check failed.
    """
    from edgeopt.release.registry.client import Reference
    from edgeopt.release.verify import verify as verify_version

    key = None if public_key is None else Path(public_key)
    pulled = None if folder is None else Path(folder)
    return verify_version(Reference.parse(reference), public_key=key, folder=pulled, tracking_uri=tracking_uri)


def load_engine(source: str | Path | None = None, *, threads: int = 0) -> LoadedEngine:
    """Open a verified engine for generation.

    Example:
        `edgeopt.load_engine("edgeopt@champion").generate("def read_lines(path):")`

    Args:
        source: engine folder, `NAME@ALIAS` or `models:/NAME/VERSION`. Default: the bundled model in PyTorch.
        threads: compute threads; 0 for one per core.

    Raises:
        InputError: the engine does not exist, or one of its files was modified.
        BuildError: the engine's runtime is not installed or cannot open it.
    """
    return LoadedEngine(source, threads=threads)


def _request(
    name: str,
    model: str | Path | None,
    choices: Mapping[str, str | int | None],
    limits: Limits | None,
    overrides: Sequence[str],
    config_dir: str | Path | None,
) -> Request:
    """Return the request for the config `name`, with the arguments as Hydra overrides.

    `choices` are values by config key; None keeps the value of the config. `overrides` come last and take precedence.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"`overrides` must be a list of strings, got {overrides!r}",
            location="overrides",
            hint='Give a list: overrides=["key=value"]',
        )
    arguments = _model_overrides(model) if model is not None else []
    arguments += [f"{key}={value}" for key, value in choices.items() if value is not None]
    arguments += [f"limits.{metric.replace('/', '.')}={_quoted(text)}" for metric, text in (limits or {}).items()]
    folder = None if config_dir is None else Path(config_dir)
    return Request(name=name, overrides=(*arguments, *overrides), config_dir=folder)


def _model_overrides(model: str | Path) -> list[str]:
    is_folder = isinstance(model, Path) or "/" in model or model.startswith((".", "~")) or Path(model).is_dir()
    return ["model=local", f"model.path={_quoted(str(model))}"] if is_folder else [f"model={model}"]


def _quoted(value: str | float) -> str:
    """Return a value in the quotes of Hydra's override grammar."""
    if not isinstance(value, str):
        return str(value)
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def _reporter(progress: bool) -> Reporter:
    if not progress:
        return SilentReporter()
    from edgeopt.studies.terminal import TerminalReporter

    return TerminalReporter()
