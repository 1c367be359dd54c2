"""`edgeopt predict`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError, InfeasibleError

SUMMARY = "Predict size and memory of a recipe by arithmetic"
EXAMPLE = "edgeopt predict recipe=int4 target=sbc_4gib"
TIERS = ((100e6, "tiny"), (1e9, "small"), (7e9, "medium"), (float("inf"), "large"))
"""What a model is called that has fewer parameters."""


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.checkpoints import importing
    from edgeopt.config import assemble
    from edgeopt.core.protocols import SupportsBreakdown
    from edgeopt.pipeline.early_stop import early_stop_verdicts
    from edgeopt.pipeline.evaluate import plan
    from edgeopt.pipeline.next_steps import suggest_next_step

    request = shared.request(args)
    job = assemble.job(request.compose(), request.config_dir)
    folder = job.source.locate()
    planned = plan(job.steps, job.runtime, importing.spec_of(folder))
    runtime, given = planned.runtime, (planned.spec, job.target)
    carried = importing.carried_bytes(folder)
    predictions = runtime.predict(*given, carried_bytes=carried)
    figures = {m.metric: m for m in predictions}
    if not figures:
        raise ConfigError(
            f"nothing is known by arithmetic of {type(runtime).__name__} with these settings",
            location="runtime",
            hint="Measure it: edgeopt run",
        )
    verdicts = [
        {
            "metric": limit.metric,
            "limit": str(limit),
            "unit": limit.unit,
            "predicted": figures[limit.metric].value,
            "fits": not early_stop_verdicts(predictions, [limit], {}),
        }
        for limit in job.limits
        if limit.metric in figures and limit.absolute is not None
    ]
    next_lever = suggest_next_step(planned.spec)
    document = {
        "recipe": str(job.recipe),
        "target": job.target.name,
        "method": "predicted by arithmetic, nothing was measured",
        "parameters": planned.spec.parameters,
        "tier": next(name for bound, name in TIERS if planned.spec.parameters < bound),
        "parts": runtime.breakdown(*given, carried_bytes=carried) if isinstance(runtime, SupportsBreakdown) else {},
        "figures": {m.metric: {"value": m.value, "low": m.low, "high": m.high, "unit": m.unit} for m in predictions},
        "limits": verdicts,
        "next_lever": next_lever,
    }
    broken = [v["metric"] for v in verdicts if not v["fits"]]
    if not broken:
        return Outcome(document=document)
    beyond = f"{broken[0]} is predicted beyond its limit, whatever its error"
    return Outcome(document=document, error=InfeasibleError(beyond, hint=next_lever))


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display
    from edgeopt.core import units

    title = f"{document['recipe']} on {document['target']} ({document['method']})"
    if document["parts"]:
        table = Table(title=title)
        table.add_column("part")
        table.add_column("MiB", justify="right")
        for name, value in document["parts"].items():
            table.add_row(name.replace("_bytes", ""), f"{value / 2**20:.2f}")
        display.out.print(table)
    else:
        display.out.print(title)
    display.out.print(f"{document['parameters']:,} parameters, tier {document['tier']}")
    for metric, figure in document["figures"].items():
        value, low, high = (units.show(figure[name], figure["unit"]) for name in ("value", "low", "high"))
        display.out.print(f"{metric} {value}, between {low} and {high}")
    for verdict in document["limits"]:
        told = "fits" if verdict["fits"] else "does not fit"
        shown = units.show(verdict["predicted"], verdict["unit"])
        display.out.print(f"{verdict['metric']} {shown}, {verdict['limit']}: {told}")
    display.out.print(f"next lever: {document['next_lever']}")
