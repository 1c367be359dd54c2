"""A release policy: what is registered, what must hold before, and which version gets which alias."""

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
TARGET = "{target}"
"""Stands in the name of an alias for the name of the study's target."""
_ALIAS = re.compile(r"[A-Za-z][\w-]*")
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Attributes:
    model: name of the registered model.
    gates: parts with a `check` as in edgeopt.release.gates, run after those that always run.
    aliases: alias → the criteria that choose its version; `champion` is always among them.
    approvals: how many people approve a version before an alias points at it, beside who registered it.
    public_key: that of the key which signs every version; None where none needs to be signed.
    webhooks: addresses that are told of every alias that moved.
    versions_kept: how many versions of earlier fronts stay at which no alias points; None keeps all.
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

    def on(self, target: str) -> Policy:
        """The policy for studies of one target, whose name takes its place in those of aliases."""
        named = {alias.replace(TARGET, target): criteria for alias, criteria in self.aliases.items()}
        return replace(self, aliases=named)


def folders(config_dir: Path | None = None) -> list[Path]:
    """Where policies and model cards are looked for: in the user's folder of configs, then as shipped with edgeopt."""
    package = Path(edgeopt.__file__).parent
    shipped = [package, package.parent]  # in the wheel; in the repository
    own = [config_dir / "registry"] if config_dir else []
    return [*own, *(folder / "registry" for folder in shipped if (folder / "registry").is_dir())]


def find(file: str, config_dir: Path | None = None) -> Path:
    """The first `file` in `folders`. Raises ConfigError that lists what there is."""
    searched = folders(config_dir)
    for folder in searched:
        if (folder / file).is_file():
            return folder / file
    known = sorted({p.name for folder in searched for p in folder.glob(f"*{Path(file).suffix}")})
    raise ConfigError(
        f"there is no {file} in {', '.join(map(str, searched)) or 'any registry folder'}",
        location="registry",
        hint=f"Choose one of: {', '.join(known)}" if known else "Give the path of a policy",
    )


def load(name: str = "default", config_dir: Path | None = None) -> Policy:
    """The policy `registry/<name>.yaml`, or the YAML file whose path is given.

    Raises ConfigError that names the file and every fault in it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else find(f"{name}.yaml", config_dir)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the policy cannot be read ({error})", location=str(path)) from error
    return parse(data, name=path.stem, location=str(path), folder=path.parent)


def for_model(model: str, config_dir: Path | None = None) -> list[Policy]:
    """Return the valid policies in registry/ for a registered model. The user's folder comes before edgeopt's own."""
    found: dict[str, Policy] = {}
    for folder in folders(config_dir):
        for path in sorted(folder.glob("*.yaml")):
            try:
                policy = load(str(path))
            except ConfigError:
                continue  # a policy of another model may be invalid: it does not matter here
            if policy.model == model:
                found.setdefault(policy.name, policy)
    return list(found.values())


def parse(data: object, *, name: str, location: str, folder: Path = Path()) -> Policy:
    """The policy that `data` describes; files that it names lie beside it in `folder`.

    Raises ConfigError with all faults at once.
    """
    faults: list[str] = []
    if not isinstance(data, Mapping):
        raise ConfigError("a policy is a mapping", location=location, hint=f"Give the keys {', '.join(_KEYS)}")
    faults += [f"{key}: unknown key, known are {', '.join(_KEYS)}" for key in data if key not in _KEYS]
    model = data.get("model")
    if not isinstance(model, str) or not model.strip() or set(model) & set("/:'\""):
        faults.append(f"model: {model!r} is no name for a registered model (no slash, colon or quote)")
    gates = [_gate(entry, f"gates[{i}]", faults.append) for i, entry in enumerate(_list(data, "gates", faults.append))]
    aliases = _aliases(data.get("aliases"), faults.append)
    approvals = data.get("approvals", 0)
    if not isinstance(approvals, int) or isinstance(approvals, bool) or approvals < 0:
        faults.append(f"approvals: {approvals!r} is no number of people")
    public_key = _public_key(data.get("signature"), folder, faults.append)
    webhooks = _list(data, "webhooks", faults.append)
    faults += [f"webhooks: {fault}" for fault in webhook.checked(webhooks)]
    versions_kept = _versions_kept(data.get("retention"), faults.append)
    tags = data.get("tags") or {}
    if not isinstance(tags, Mapping):
        faults.append(f"tags: {tags!r} is not a mapping")
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(f"{count} in the policy: " + "; ".join(faults), location=location)
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
    report(f"{key}: {value!r} is not a list")
    return []


def _public_key(entry: Any, folder: Path, report: Report) -> Path | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or set(entry) != {"public_key"} or not isinstance(entry["public_key"], str):
        report("signature: give exactly public_key, the path of a PEM file")
        return None
    path = folder / entry["public_key"]
    if not path.is_file():
        report(f"signature.public_key: {path} is no file")
    return path


def _versions_kept(entry: Any, report: Report) -> int | None:
    if entry is None:
        return None
    count = entry.get("versions") if isinstance(entry, Mapping) and set(entry) == {"versions"} else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        report("retention: give exactly versions, how many of those stay at which no alias points (1 or more)")
        return None
    return count


def _gate(entry: Any, key: str, report: Report) -> Any:
    try:
        gate = config_objects.instantiate(entry if isinstance(entry, Mapping) else {}, location=key)
    except ConfigError as error:
        report(str(error))
        return None
    if not callable(getattr(gate, "check", None)):
        report(f"{key}: {entry['_target_']} is no gate, it has no check")
    return gate


def _aliases(entries: Any, report: Report) -> dict[str, tuple[Criterion, ...]]:
    if not isinstance(entries, Mapping) or "champion" not in entries:
        report("aliases: a mapping with the key champion is needed")
        return {}
    found = {}
    for alias, criteria in entries.items():
        key = f"aliases.{alias}"
        if not _ALIAS.fullmatch(str(alias).replace(TARGET, "target")) or _RESERVED.fullmatch(str(alias)):
            report(f"{key}: not an alias: use letters, digits, - and _, and leave latest and v1, v2, … to MLflow")
        if not isinstance(criteria, list) or not criteria:
            report(f"{key}: a list of at least one criterion is needed")
            continue
        checked = [_criterion(entry, f"{key}[{i}]", report) for i, entry in enumerate(criteria)]
        found[str(alias)] = tuple(c for c in checked if c is not None)
    return found


def _criterion(entry: Any, key: str, report: Report) -> Criterion | None:
    if not isinstance(entry, Mapping) or set(entry) != {"metric", "direction", "weight"}:
        report(f"{key}: give exactly metric, direction and weight")
        return None
    metric, direction, weight = entry["metric"], entry["direction"], entry["weight"]
    faults = []
    if not isinstance(metric, str) or not metric:
        faults.append(f"{key}.metric: {metric!r} is no metric")
    if direction not in DIRECTIONS:
        faults.append(f"{key}.direction: {direction!r} is not one of {', '.join(DIRECTIONS)}")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        faults.append(f"{key}.weight: {weight!r} is not a number above zero")
    for fault in faults:
        report(fault)
    return None if faults else Criterion(metric=metric, direction=direction, weight=float(weight))
