"""Hydra configs to parts: compose, validate, construct. No other file of the package knows Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeopt.errors import ConfigError
from edgeopt.part import construct, resolve
from edgeopt.recipe import Recipe
from edgeopt.target import Limit

Config = dict[str, Any]


def root(name: str) -> Path:
    """The folder `conf`, `sweeps` or `registry`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def compose(overrides: Sequence[str] = (), *, name: str = "config", config_dir: Path | None = None) -> Config:
    """The resolved config `name` (a file of conf/ or sweeps/) with overrides.

    `config_dir` is a user's folder whose files come before those of edgeopt. Raises ConfigError for what
    Hydra cannot compose, with the choices that there are.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _hydra(config_dir):
        try:
            composed = hydra_compose(config_name=name, overrides=list(overrides))
            found = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_one_line(error), place=_place(error), mend=_mend(error)) from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def choices(group: str, *, config_dir: Path | None = None) -> list[str]:
    """The files of a config group."""
    from hydra.core.global_hydra import GlobalHydra

    with _hydra(config_dir):
        return list(GlobalHydra.instance().config_loader().get_group_options(group))


def known_metrics(config_dir: Path | None = None) -> dict[str, str]:
    """Every metric that some probe of the `probe` group may report, with its unit."""
    metrics: dict[str, str] = {}
    for choice in choices("probe", config_dir=config_dir):
        description = compose([f"+probe@_edgeopt_probe={choice}"], config_dir=config_dir)["_edgeopt_probe"]
        metrics |= resolve(description["_target_"], f"probe/{choice}").METRICS
    return metrics


def limits(config: Config, known: Mapping[str, str]) -> tuple[Limit, ...]:
    """The limits of a composed config; ConfigError for an unknown metric or a bad quantity."""
    return tuple(Limit.parse(metric, text, known) for metric, text in _leaves(config["limits"]) if text is not None)


def recipe(config: Config) -> Recipe:
    """The recipe of a composed config; every step must stand in `order`, once."""
    steps, order = config["step"], config["order"]
    for name in order:
        if name not in steps:
            raise ConfigError(
                f"step {name!r} is not configured", place="order", mend=f"Add it by +step@step.{name}=CHOICE, or take it out of order"
            )
    if len(set(order)) < len(order):
        raise ConfigError("a step stands in it twice", place="order", mend="Give the second one a name of its own")
    for name in steps:
        if name not in order:
            raise ConfigError(
                f"step {name!r} is configured but not part of order {order}", place=f"step.{name}",
                mend=f"Add it: order=[{','.join([*order, name])}]",
            )
    return Recipe(model=config["model"], steps=tuple((n, steps[n]) for n in order), runtime=config["runtime"])


def part(config: Config, key: str) -> Any:
    """The part configured under a top-level key."""
    if not isinstance(config.get(key), dict):
        raise ConfigError(f"nothing is configured under {key!r}", place=key, mend=f"Choose one of the group {key}")
    return construct(config[key], key)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dots in the keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def _hydra(config_dir: Path | None) -> Iterator[None]:
    """Hydra with the user's folder, conf/ and sweeps/ on its search path, in that order."""
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"{str(config_dir)!r} is no folder", place="--config-dir", mend="Give a folder of configs")
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    if config_dir is not None:
        path.append("user", f"file://{config_dir.resolve()}")
    for name in ("conf", "sweeps"):
        path.append("edgeopt", f"file://{root(name)}")
    path.append("schema", "structured://")
    Plugins.instance()  # registers Hydra's own config sources
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("edgeopt", path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _place(error: Exception) -> str:
    return str(getattr(error, "full_key", "") or "")


def _mend(error: Exception) -> str:
    """The rest of Hydra's message (the choices of a group, how to append), on one line."""
    rest = " ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip())
    cause = error.__cause__ or error.__context__
    detail = str(cause).splitlines()[0] if cause is not None and str(cause) not in str(error) else ""
    return " ".join(part for part in (detail, rest) if part)
