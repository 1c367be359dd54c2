"""Compose Hydra configs into plain data and report faults in one line. Only this module and hydra_plugins use Hydra."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.core.config_objects import did_you_mean
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Config = dict[str, Any]

PARTS = ("model", "calibration", "evaluation", "runtime", "target", "measure", "tracking")
REQUIRED = (*PARTS, "rounding", "importance", "step", "order", "limits", "state", "store", "cache", "workers")
OPTIONAL = ("search", "promote")  # of a sweep


def root(name: str) -> Path:
    """Return the folder `conf`, `sweeps` or `registry` of the installed package, or of the checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def compose(
    overrides: Sequence[str] = (), *, name: str = "config", config_dir: Path | None = None, complete: bool = True
) -> Config:
    """Return the resolved config `name` with overrides.

    Args:
        name: a file of conf/, of sweeps/ or of `config_dir`.
        config_dir: the user's folder of configs; its files take precedence over those of edgeopt.
        complete: raise for mandatory values that are not set. Otherwise they stay `???`.

    Raises:
        ConfigError: Hydra cannot compose the config, or edgeopt does not read one of its top-level keys. The hint
            suggests the closest name. Keys that begin with _ are allowed, for the user's interpolations.
    """
    with _explaining(overrides, name, config_dir):
        return _resolved(_composed(overrides, name, config_dir), complete=complete)


class Composer:
    """Composes the configs of trials; it composes again only if a trial selects another file of a config group.

    Composing takes 100 ms, setting a value 1 ms.
    """

    def __init__(self, name: str, overrides: Sequence[str], config_dir: Path | None) -> None:
        self._name, self._overrides, self._config_dir = name, tuple(overrides), config_dir
        self._composed: dict[tuple[str, ...], bytes] = {}  # unpickling a tree is eight times as fast as copying it

    def compose(self, values: dict[str, Any], to_overrides: Callable[[dict[str, Any]], list[str]]) -> Config:
        """Return the config with `values` by key: the result of `compose` with the overrides `to_overrides(values)`."""
        from omegaconf import OmegaConf

        plain = {key: value for key, value in values.items() if "." in key and re.fullmatch(r"[\w.]+", key)}
        plain = {key: value for key, value in plain.items() if not key.startswith("limits.")}
        chosen = [*self._overrides, *to_overrides({key: value for key, value in values.items() if key not in plain})]
        all_overrides = [*self._overrides, *to_overrides(values)]
        with _explaining(all_overrides, self._name, self._config_dir):
            key = tuple(chosen)
            if key not in self._composed:
                self._composed[key] = pickle.dumps(_composed(chosen, self._name, self._config_dir))
            tree = pickle.loads(self._composed[key])  # noqa: S301 - pickled by this object, one line above
            if any(
                OmegaConf.select(tree, name, default=tree) is tree for name in plain
            ):  # unknown key: let Hydra report it
                return _resolved(_composed(all_overrides, self._name, self._config_dir), complete=True)
            for name, value in plain.items():
                OmegaConf.update(tree, name, value, merge=False)
            return _resolved(tree, complete=True)


def _composed(overrides: Sequence[str], name: str, config_dir: Path | None) -> DictConfig:
    from hydra import compose as hydra_compose

    with _hydra(config_dir):
        composed: DictConfig = hydra_compose(config_name=name, overrides=[_force_add(o, name) for o in overrides])
        return composed


def _resolved(composed: DictConfig, *, complete: bool) -> Config:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(composed, resolve=True, throw_on_missing=complete)
    assert isinstance(found, dict)
    config = {str(key): value for key, value in found.items()}
    _require_keys(config)
    return config


@contextmanager
def _explaining(overrides: Sequence[str], name: str, config_dir: Path | None) -> Iterator[None]:
    """Turn the exceptions of Hydra, OmegaConf and YAML into ConfigError."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise _explained(error, overrides, name, config_dir) from error


def choices(group: str, *, config_dir: Path | None = None) -> list[str]:
    """Return the names of the files of a config group."""
    from hydra.core.global_hydra import GlobalHydra

    with _hydra(config_dir):
        return list(GlobalHydra.instance().config_loader().get_group_options(group))


@contextmanager
def _hydra(config_dir: Path | None) -> Iterator[None]:
    """Initialize Hydra with the user's folder, conf/ and sweeps/ on its search path, in that order."""
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(
            f"`--config-dir` must be a folder, got {str(config_dir)!r}",
            location="--config-dir",
            hint="Give a folder of configs",
        )
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


def _force_add(override: str, name: str) -> str:
    """Prefix the override of a limit or a search setting with ++, so that it may add a key.

    Slashes in the metric of a limit become dots. The dataclass of the search checks its own field names.
    """
    key, sign, value = override.partition("=")
    if not sign:
        return override
    if key == "limits" or key.startswith("limits."):
        return f"++{key.replace('/', '.')}={value}"
    return f"++{override}" if name != "config" and re.fullmatch(r"search\.[a-z_]+", key) else override


def _require_keys(config: Config) -> None:
    for key in config:
        if key not in (*REQUIRED, *OPTIONAL) and not key.startswith("_"):
            hint = did_you_mean(key, (*REQUIRED, *OPTIONAL)) or f"The keys are: {', '.join((*REQUIRED, *OPTIONAL))}"
            raise ConfigError("edgeopt does not read this key", location=key, hint=hint)
    for key in REQUIRED:
        if key not in config:
            raise ConfigError(
                "a required key is missing", location=key, hint="Put `- config` first in the file's defaults"
            )
    if not isinstance(config["state"], str) or not config["state"]:
        raise ConfigError(
            f"`state` must be the path of a folder, got {config['state']!r}",
            location="state",
            hint="Give a folder that can be written",
        )
    if not isinstance(config["step"], Mapping):
        raise ConfigError(
            f"`step` must be a mapping from names to steps, got {config['step']!r}",
            location="step",
            hint="Choose a recipe, or add +step@step.NAME=CHOICE",
        )


def _explained(error: Exception, overrides: Sequence[str], name: str, config_dir: Path | None) -> ConfigError:
    """Return a one-line ConfigError with the location of the fault and the closest existing name."""
    from hydra.errors import OverrideParseException
    from omegaconf.errors import MissingMandatoryValue
    from yaml import MarkedYAMLError

    message = str(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"{error.override!r} cannot be read",
            location="arguments",
            hint="Give key=value, and quote a value that has = , : or brackets: \"key='a=b'\"",
        )
    if isinstance(error, MissingMandatoryValue):
        key = str(error.full_key)
        return ConfigError("a value is required", location=key, hint=f"Give {key}=…")
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        location = f"{error.problem_mark.name}:{error.problem_mark.line + 1}"
        return ConfigError(f"invalid YAML: {error.problem}", location=location, hint="Correct the file")
    if "Cannot find primary config" in message:
        files = [f for f in choices("", config_dir=config_dir) if f != "config" and not f.startswith("_")]
        return ConfigError(f"there is no config {name!r}", location="--config-name", hint=_choose(name, files))
    if found := re.match(r"(?:In '(?P<file>.+?)': )?Could not find '(?P<group>[^']+)/(?P<choice>[^'/]+)'", message):
        group, choice = found["group"], found["choice"]
        own = (config_dir or root("conf")) / f"{found['file']}.yaml"
        return ConfigError(
            f"there is no {choice!r} in the group {group}",
            location=str(own) if found["file"] != name and own.is_file() else group,
            hint=_choose(choice, choices(group, config_dir=config_dir)),
        )
    if found := re.match(r"Could not (?:override|delete)(?: from config\.)? '(?P<key>[^']+?)(?:=[^']*)?'", message):
        return _unknown(found["key"], overrides, name, config_dir)
    if found := re.search(r"config group '(?P<key>[^']+)' does not exist", message):
        return _unknown(found["key"], overrides, name, config_dir)
    first = next((line.strip().rstrip(".") for line in message.splitlines() if line.strip()), type(error).__name__)
    if "must be a string or a list" in first:
        return ConfigError(
            f"a config group needs the name of a file ({first})", location=" ".join(overrides), hint="Give GROUP=CHOICE"
        )
    if first.startswith("Ambiguous value"):
        return ConfigError(first, location="arguments", hint="Give one value, or a list in brackets")
    return ConfigError(first, location=str(getattr(error, "full_key", None) or "") or " ".join(overrides))


def _unknown(key: str, overrides: Sequence[str], name: str, config_dir: Path | None) -> ConfigError:
    """Return the error for an override of an unknown key; the hint names the keys that exist at that level."""
    others = [o for o in overrides if o.partition("=")[0].lstrip("+~") != key]
    known: Any = compose(others, name=name, config_dir=config_dir) if len(others) < len(overrides) else {}
    group, at, _ = key.partition("@")
    groups = _groups(config_dir)
    if at or "/" in key:
        if group in groups:
            near = did_you_mean(key, _packages(known, groups))
            hint = f"{near} Add it by +{key}=CHOICE".strip()
        else:
            hint = _choose(group, groups)
        return ConfigError("the defaults list has no such entry", location=key, hint=hint)
    parts, depth = key.split("."), 0
    while isinstance(known, Mapping) and depth < len(parts) and parts[depth] in known:
        known, depth = known[parts[depth]], depth + 1
    above, names = ".".join(parts[:depth]), [k for k in known if k != "_target_"] if isinstance(known, Mapping) else []
    if not above:
        names += [g for g in groups if g not in names and g not in parts]
    if depth == len(parts) or not names:
        return ConfigError(
            "there is no such key", location=key, hint=f"{above} has no keys yet; a recipe, target or sweep adds them"
        )
    near = did_you_mean(parts[depth], names, ".".join([*parts[:depth], "{}", *parts[depth + 1 :]]))
    hint = near or f"{above or 'The config'} has: {', '.join(names)}"
    return ConfigError("there is no such key", location=key, hint=hint)


def _packages(config: Any, groups: Iterable[str]) -> list[str]:
    """Return `group@group.name` for the config objects under each group, such as step@step.quantize."""
    if not isinstance(config, Mapping):
        return []
    names = ((group, config.get(group)) for group in groups)
    return [f"{group}@{group}.{key}" for group, found in names if isinstance(found, Mapping) for key in found]


def _groups(config_dir: Path | None) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    with _hydra(config_dir):
        return [g for g in GlobalHydra.instance().config_loader().list_groups("") if g != "hydra"]


def _choose(given: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{did_you_mean(given, known)} Choose one of: {', '.join(known) or 'nothing, the folder is empty'}".strip()
