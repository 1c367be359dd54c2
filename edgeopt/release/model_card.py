"""The description of a registered version, from the template registry/model_card.md.j2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from edgeopt.core import mlflow_tags as tags
from edgeopt.core import units
from edgeopt.errors import ConfigError
from edgeopt.release.candidate import Candidate

LENGTH = 5000  # of a description in MLflow's registry
_CUT = "\n\n… (cut; the run holds the whole)"


def render(
    template: Path, candidate: Candidate, *, study: str, model: str, objectives: Sequence[Mapping[str, Any]]
) -> str:
    """The card of one candidate. Raises ConfigError where the template is faulty or names an unknown variable."""
    environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "/").split())
    try:
        text = environment.from_string(template.read_text(encoding="utf-8")).render(
            _variables(candidate, study, model, objectives)
        )
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the model card cannot be made ({error})", location=str(template)) from error
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text if len(text) <= LENGTH else text[: LENGTH - len(_CUT)] + _CUT


def _variables(candidate: Candidate, study: str, model: str, objectives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row, run = candidate.row, candidate.run_tags
    versions = {k.removeprefix(tags.VERSION): v for k, v in run.items() if k.startswith(tags.VERSION)}
    return {
        "model": model,
        "study": study,
        "trial": row["number"],
        "recipe": run.get(tags.RECIPE, ""),
        "target": run.get(tags.TARGET, ""),
        "device": run.get(tags.DEVICE, "") or "this machine",
        "emulated": run.get(tags.EMULATED) == "true",
        "limits": [_limit(limit, row) for limit in candidate.limits],
        "objectives": [{"name": o["metric"], "figure": _figure(row, o["metric"], o["unit"])} for o in objectives],
        "params": row["params"],
        "run_id": candidate.run_id,
        "model_id": candidate.model_id,
        "recipe_digest": run.get(tags.RECIPE_DIGEST, ""),
        "engine_digest": run.get(tags.ENGINE_DIGEST, ""),
        "commit": run.get(tags.GIT, ""),
        "versions": [f"{library} {version}" for library, version in sorted(versions.items())],
    }


def _limit(limit: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    excess = row["excess"].get(limit["metric"])
    allowed = limit["limit"]
    if limit["bound"] is not None and "baseline" in allowed:
        allowed = f"{allowed} = {units.show(limit['bound'], limit['unit'])}"
    return {
        "name": limit["metric"],
        "text": allowed,
        "measured": _figure(row, limit["metric"], limit["unit"]),
        "headroom": "–" if excess is None else f"{-excess:.0%}",
    }


def _figure(row: Mapping[str, Any], metric: str, unit: str) -> str:
    value = row["metrics"].get(metric)
    return "not measured" if value is None else units.show(value, unit)
