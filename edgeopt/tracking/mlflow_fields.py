"""A trial as MLflow's flat params, metrics and tags, within MLflow's limits."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

import edgeopt
from edgeopt.core import library_versions
from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import TrialResult

BESIDE = ("optuna", "mlflow")
"""Libraries that decide no engine, but how it was found and what is known of it."""
OF_THE_STUDY = ("search", "tracking", "promote", "state", "store", "workers", "cache")
"""Parts of a config that are alike in all trials of a study: its own run keeps them, in config.yaml."""
KEY_LENGTH = 250
VALUE_LENGTH = 6000
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
SYSTEM_METRICS_PREFIX = "system/"
_CUT = " … (cut, the whole value is in config.yaml)"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b.c`, lists of mappings as `a.0.b`, everything else as JSON text (strings bare)."""
    return dict(_leaves(data, prefix)) if data else {}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}.{number}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def trial_params(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """A trial's config without the parts of its study, and what was `chosen` for it; and the keys that were cut."""
    own = {part: value for part, value in config.items() if part not in OF_THE_STUDY}
    return params({**flatten(own), **flatten(chosen)})


def params(values: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """`values` within MLflow's lengths and alphabet, and the keys whose value had to be cut."""
    kept, cut = {}, []
    for key, value in values.items():
        name = _key(key)
        if len(value) > VALUE_LENGTH:
            value = value[: VALUE_LENGTH - len(_CUT)] + _CUT
            cut.append(name)
        kept[name] = value
    return kept, cut


def _key(name: str) -> str:
    allowed = re.sub(r"[^\w./ :-]", "_", name)
    if posixpath.normpath(allowed) != allowed or allowed.startswith((".", "/")):  # MLflow takes a name for a path
        allowed = "_" + allowed.replace("/", "_").replace(".", "_")
    if len(allowed) <= KEY_LENGTH:
        return allowed
    return f"{allowed[: KEY_LENGTH - 17]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def metrics(result: TrialResult) -> tuple[dict[str, float], list[str]]:
    """Figures, `excess/<metric>`, `time/<stage>_s`, `time_saved/<stage>_s` and `feasible`; and the names left out
    because not finite.

    What was predicted is `predicted/<metric>` and `predicted_excess/<metric>`.

    MLflow stores infinity as 1.8e308, which would pass for a figure.
    """
    found: dict[str, float] = {m.metric: m.value for m in result.measurements}
    found |= {f"predicted/{m.metric}": m.value for m in result.predictions}
    excess = {True: "predicted_excess", False: "excess"}
    found |= {f"{excess[v.predicted]}/{v.metric}": v.excess for v in result.verdicts if v.excess is not None}
    found |= {f"time/{stage}_s": seconds for stage, seconds in result.timings_s.items()}
    found |= {f"time_saved/{stage}_s": seconds for stage, seconds in result.saved_s.items()}
    if result.energy_method:
        kind = "measured" if "estimated" not in result.energy_method else "estimated"
        found[f"spent/{kind}/energy_j"] = result.energy_j
    found[tags.FEASIBLE] = float(result.feasible)
    finite = {_key(name): float(value) for name, value in found.items() if math.isfinite(value)}
    return finite, sorted(name for name, value in found.items() if not math.isfinite(value))


def datasets(result: TrialResult) -> list[DatasetInput]:
    """The texts of a trial as MLflow's datasets, each with what it was for."""
    return [
        DatasetInput(
            Dataset(
                name=str(text["name"])[:KEY_LENGTH],
                digest=_dataset_digest(text),
                source_type="text",
                source=json.dumps({"name": text["name"], "sha256": text["digest"]}),
                profile=json.dumps({key: text[key] for key in ("documents", "characters")}),
            ),
            tags=[InputTag(MLFLOW_DATASET_CONTEXT, use)],
        )
        for use, text in result.texts.items()
    ]


def metric_entities(
    result: TrialResult, values: Mapping[str, float], *, run_id: str, model_id: str | None, at_ms: int
) -> list[Metric]:
    """Figures for a run, linked to the model that they are of and, of quality, to the text that it was judged on.

    Each is told with the same time stamp whenever it is told: MLflow then drops what it has already.
    """
    judged_on = result.texts.get("evaluation")
    dataset = (judged_on["name"][:KEY_LENGTH], _dataset_digest(judged_on)) if judged_on else (None, None)
    found = []
    for name, value in values.items():
        of = dataset if name.startswith("quality/") else (None, None)
        found.append(
            Metric(name, value, at_ms, 0, model_id=model_id, dataset_name=of[0], dataset_digest=of[1], run_id=run_id)
        )
    return found + [
        Metric(f"{SYSTEM_METRICS_PREFIX}{name}", value, int(1000 * reading["at_s"]), step)
        for step, reading in enumerate(result.system)
        for name, value in reading.items()
        if name != "at_s"
    ]


def _dataset_digest(text: Mapping[str, Any]) -> str:
    return str(text["digest"])[:DIGEST_LENGTH]


def trial_tags(result: TrialResult) -> dict[str, str]:
    """What was evaluated, where and with which versions."""
    found = {
        tags.RECIPE: str(result.recipe.get("text", "")),
        tags.RECIPE_DIGEST: str(result.recipe.get("digest", "")),
        tags.TARGET: result.target,
        tags.DEVICE: str(result.device.get("name", "")),
        tags.EMULATED: "true" if result.emulated else "false",
        **surroundings(),
    }
    if result.engine is not None:
        found[tags.ENGINE_DIGEST] = str(result.engine["digest"])
        found[tags.MANIFEST_SHA256] = str(result.engine.get("manifest_sha256", ""))
    if result.refused:
        found[tags.REFUSED] = result.refused
    if result.failure is not None:
        found[tags.FAILURE] = f"{result.failure.stage}: {result.failure.kind}: {result.failure.message}"
    return {key: value[:TAG_LENGTH] for key, value in found.items() if value}


@cache
def surroundings() -> dict[str, str]:
    """Versions of the libraries that decide a result, and the git commit of the working folder or of edgeopt."""
    known = {"edgeopt": edgeopt.__version__, **library_versions.versions(), **library_versions.installed(BESIDE)}
    found = {tags.VERSION_PREFIX + name: version for name, version in known.items()}
    commit = _commit(Path.cwd()) or _commit(Path(__file__).parent)
    if commit:
        found |= {tags.GIT_COMMIT: commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")}
    return found


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git on this machine: the tag is left out
    return answer.stdout.strip() if answer.returncode == 0 else ""


def plain(value: Any) -> Any:
    """`value` for strict JSON: numbers that are not finite become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
