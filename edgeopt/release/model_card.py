"""Render the description of a registered version from the template registry/model_card.md.j2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from edgeopt.core import mlflow_tags as tags
from edgeopt.core import units
from edgeopt.core.study_snapshot import LimitSnapshot, ObjectiveSnapshot, TrialSnapshot
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate

MAX_CHARACTERS = 5000  # limit of a description in the MLflow registry
_CUT = "\n\n… (cut; see the run for all values)"


def render(
    template: Path, candidate: Candidate, *, study: str, model: str, objectives: Sequence[ObjectiveSnapshot]
) -> str:
    """Return the model card of a candidate. Raises ConfigError if the template is invalid."""
    environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "/").split())
    try:
        text = environment.from_string(template.read_text(encoding="utf-8")).render(
            _variables(candidate, study, model, objectives)
        )
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the model card template is invalid ({error})", location=str(template)) from error
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - len(_CUT)] + _CUT


def _variables(candidate: Candidate, study: str, model: str, objectives: Sequence[ObjectiveSnapshot]) -> dict[str, Any]:
    trial, run = candidate.snapshot, candidate.run_tags
    versions = {k.removeprefix(tags.VERSION_PREFIX): v for k, v in run.items() if k.startswith(tags.VERSION_PREFIX)}
    return {
        "model": model,
        "study": study,
        "trial": trial.number,
        "recipe": run.get(tags.RECIPE, ""),
        "target": run.get(tags.TARGET, ""),
        "device": run.get(tags.DEVICE, "") or "this machine",
        "emulated": run.get(tags.EMULATED) == "true",
        "limits": [_limit(limit, trial) for limit in candidate.limits],
        "objectives": [{"name": o.metric, "figure": _value(trial, o.metric, o.unit)} for o in objectives],
        "params": trial.params,
        "run_id": candidate.run_id,
        "model_id": candidate.model_id,
        "recipe_digest": run.get(tags.RECIPE_DIGEST, ""),
        "engine_digest": run.get(tags.ENGINE_DIGEST, ""),
        "commit": run.get(tags.GIT_COMMIT, ""),
        "versions": [f"{library} {version}" for library, version in sorted(versions.items())],
    }


def _limit(limit: LimitSnapshot, trial: TrialSnapshot) -> dict[str, str]:
    excess = trial.excess.get(limit.metric)
    allowed = limit.text
    if limit.bound is not None and "baseline" in allowed:
        allowed = f"{allowed} = {units.format_quantity(limit.bound, limit.unit)}"
    return {
        "name": limit.metric,
        "text": allowed,
        "measured": _value(trial, limit.metric, limit.unit),
        "headroom": "–" if excess is None else f"{-excess:.0%}",
    }


def _value(trial: TrialSnapshot, metric: str, unit: str) -> str:
    value = trial.metrics.get(metric)
    return "not measured" if value is None else units.format_quantity(value, unit)
