"""Load release policies: name of the registered model, gates, ranking behind each alias, approvals, retention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import edgeopt
from edgeopt.core import config_objects
from edgeopt.errors import ConfigError
from edgeopt.release import webhook
from edgeopt.release.ranking import Criterion

DIRECTIONS = ("minimize", "maximize")
_KEYS = ("model", "gates", "aliases", "approvals", "signature", "webhooks", "tags", "retention")
TARGET_PLACEHOLDER = "{target}"
"""Placeholder in an alias for the name of the study's target."""
_ALIAS = re.compile(r"[A-Za-z][\w-]*")
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A release policy.

    Attributes:
        model: name of the registered model.
        gates: gates that run after the built-in ones, see edgeopt.release.candidate.Gate.
        aliases: alias to the criteria that choose its version; contains `champion`.
        approvals: number of users, other than the one who registered a version, who must approve it before an alias
            points at it.
        public_key: every version must be signed with this key; None requires no signature.
        webhooks: URLs that receive a message about every moved alias.
        versions_kept: number of versions of earlier fronts without an alias that are kept; None keeps all.
    """

    name: str
    model: str
    gates: tuple[Any, ...]
    aliases: Mapping[str, tuple[Criterion, ...]]
    tags: Mapping[str, str]
    approvals: int = 0
    public_key: Path | None = None
    webhooks: tuple[str, ...] = ()
    versions_kept: int | None = None

    def for_target(self, target: str) -> Policy:
        """Return the policy with the name of a target in place of the placeholder in aliases."""
        aliases = {alias.replace(TARGET_PLACEHOLDER, target): criteria for alias, criteria in self.aliases.items()}
        return replace(self, aliases=aliases)


def policy_folders(config_dir: Path | None = None) -> list[Path]:
    """Return the folders with policies and model cards: the user's comes before the one that ships with edgeopt."""
    package = Path(edgeopt.__file__).parent
    shipped = [package, package.parent]  # of the wheel; of the repository
    user = [config_dir / "registry"] if config_dir else []
    return [*user, *(folder / "registry" for folder in shipped if (folder / "registry").is_dir())]


def find_file(file: str, config_dir: Path | None = None) -> Path:
    """Return the first `file` in `policy_folders`. Raises ConfigError with the existing files if there is none."""
    searched = policy_folders(config_dir)
    for folder in searched:
        if (folder / file).is_file():
            return folder / file
    existing = sorted({p.name for folder in searched for p in folder.glob(f"*{Path(file).suffix}")})
    raise ConfigError(
        f"{file} was not found in {', '.join(map(str, searched)) or 'any registry folder'}",
        location="registry",
        hint=f"Choose one of: {', '.join(existing)}" if existing else "Give the path of a policy",
    )


def load(name: str = "default", config_dir: Path | None = None) -> Policy:
    """Load the policy `registry/<name>.yaml`, or the YAML file at the path `name`.

    Raises ConfigError with the file and every problem in it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else find_file(f"{name}.yaml", config_dir)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the policy cannot be read ({error})", location=str(path)) from error
    return parse(data, name=path.stem, location=str(path), folder=path.parent)


def for_model(model: str, config_dir: Path | None = None) -> list[Policy]:
    """Return the valid policies in registry/ for a registered model. The user's folder comes before edgeopt's own."""
    found: dict[str, Policy] = {}
    for folder in policy_folders(config_dir):
        for path in sorted(folder.glob("*.yaml")):
            try:
                policy = load(str(path))
            except ConfigError:
                continue  # an invalid policy may belong to another model
            if policy.model == model:
                found.setdefault(policy.name, policy)
    return list(found.values())


def parse(data: object, *, name: str, location: str, folder: Path = Path()) -> Policy:
    """Return the policy in `data`. Relative paths in it start at `folder`.

    Raises ConfigError with all problems.
    """
    problems: list[str] = []
    if not isinstance(data, Mapping):
        raise ConfigError("a policy must be a mapping", location=location, hint=f"Give the keys {', '.join(_KEYS)}")
    problems += [f"{key}: unknown key, valid keys are {', '.join(_KEYS)}" for key in data if key not in _KEYS]
    model = data.get("model")
    if not isinstance(model, str) or not model.strip() or set(model) & set("/:'\""):
        problems.append(f"model: must be a name without slash, colon or quote, got {model!r}")
    gates = [
        _gate(entry, f"gates[{i}]", problems.append) for i, entry in enumerate(_list(data, "gates", problems.append))
    ]
    aliases = _aliases(data.get("aliases"), problems.append)
    approvals = data.get("approvals", 0)
    if not isinstance(approvals, int) or isinstance(approvals, bool) or approvals < 0:
        problems.append(f"approvals: must be a non-negative integer, got {approvals!r}")
    public_key = _public_key(data.get("signature"), folder, problems.append)
    webhooks = _list(data, "webhooks", problems.append)
    problems += [f"webhooks: {problem}" for problem in webhook.url_problems(webhooks)]
    versions_kept = _versions_kept(data.get("retention"), problems.append)
    tags = data.get("tags") or {}
    if not isinstance(tags, Mapping):
        problems.append(f"tags: must be a mapping, got {tags!r}")
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        raise ConfigError(f"{count} in the policy: " + "; ".join(problems), location=location)
    return Policy(
        name=name,
        model=str(model),
        gates=tuple(gates),
        aliases=aliases,
        tags={str(k): str(v) for k, v in tags.items()},
        approvals=approvals,
        public_key=public_key,
        webhooks=tuple(webhooks),
        versions_kept=versions_kept,
    )


Report = Callable[[str], None]


def _list(data: Mapping[Any, Any], key: str, report: Report) -> list[Any]:
    value = data.get(key) or []
    if isinstance(value, list):
        return value
    report(f"{key}: must be a list, got {value!r}")
    return []


def _public_key(entry: Any, folder: Path, report: Report) -> Path | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or set(entry) != {"public_key"} or not isinstance(entry["public_key"], str):
        report("signature: must have exactly the key public_key, the path of a PEM file")
        return None
    path = folder / entry["public_key"]
    if not path.is_file():
        report(f"signature.public_key: {path} does not exist")
    return path


def _versions_kept(entry: Any, report: Report) -> int | None:
    if entry is None:
        return None
    count = entry.get("versions") if isinstance(entry, Mapping) and set(entry) == {"versions"} else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        report(
            "retention: must have exactly the key versions, the number of versions without an alias to keep (1 or more)"
        )
        return None
    return count


def _gate(entry: Any, key: str, report: Report) -> Any:
    try:
        gate = config_objects.instantiate(entry if isinstance(entry, Mapping) else {}, location=key)
    except ConfigError as error:
        report(str(error))
        return None
    if not callable(getattr(gate, "check", None)):
        report(f"{key}: {entry['_target_']} is not a gate, because it has no method check")
    return gate


def _aliases(entries: Any, report: Report) -> dict[str, tuple[Criterion, ...]]:
    if not isinstance(entries, Mapping) or "champion" not in entries:
        report("aliases: must be a mapping with the key champion")
        return {}
    parsed = {}
    for alias, criteria in entries.items():
        key = f"aliases.{alias}"
        if not _ALIAS.fullmatch(str(alias).replace(TARGET_PLACEHOLDER, "target")) or _RESERVED.fullmatch(str(alias)):
            report(
                f"{key}: an alias must consist of letters, digits, - and _; latest and v1, v2, … are reserved by MLflow"
            )
        if not isinstance(criteria, list) or not criteria:
            report(f"{key}: must be a list of at least one criterion")
            continue
        valid = [_criterion(entry, f"{key}[{i}]", report) for i, entry in enumerate(criteria)]
        parsed[str(alias)] = tuple(c for c in valid if c is not None)
    return parsed


def _criterion(entry: Any, key: str, report: Report) -> Criterion | None:
    if not isinstance(entry, Mapping) or set(entry) != {"metric", "direction", "weight"}:
        report(f"{key}: must have exactly the keys metric, direction and weight")
        return None
    metric, direction, weight = entry["metric"], entry["direction"], entry["weight"]
    problems = []
    if not isinstance(metric, str) or not metric:
        problems.append(f"{key}.metric: must be the name of a metric, got {metric!r}")
    if direction not in DIRECTIONS:
        problems.append(f"{key}.direction: must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        problems.append(f"{key}.weight: must be a positive number, got {weight!r}")
    for problem in problems:
        report(problem)
    return None if problems else Criterion(metric=metric, direction=direction, weight=float(weight))
