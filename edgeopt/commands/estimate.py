"""`edgeopt estimate`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.commands import arguments as shared
from edgeopt.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError, InfeasibleError

SUMMARY = "Predict size and memory of a recipe by arithmetic"
EXAMPLE = "edgeopt estimate recipe=int4 target=sbc_4gib"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt import assembly, intake
    from edgeopt.pipeline import plan
    from edgeopt.rungs import refusal
    from edgeopt.runtimes.genai import Genai
    from edgeopt.search.lever import lever

    request = shared.request(args)
    job = assembly.job(request.compose(), request.config_dir)
    folder = job.source.locate()
    spec = intake.spec_of(folder)
    planned = plan(job.steps, job.runtime, spec)
    carried = intake.carried_bytes(folder)
    predictions = planned.runtime.predict(planned.spec, job.target, carried_bytes=carried)
    figures = {m.metric: m.value for m in predictions}
    if not isinstance(planned.runtime, Genai) or "size/engine_mib" not in figures:
        raise ConfigError(
            f"no size is known by arithmetic of {type(planned.runtime).__name__} with these settings",
            place="runtime",
            mend="Measure it: edgeopt run",
        )
    predicted = planned.runtime.estimate(planned.spec, job.target, carried_bytes=carried)
    verdicts = [
        {
            "metric": limit.metric,
            "limit": str(limit),
            "unit": limit.unit,
            "predicted": figures[limit.metric],
            "fits": not refusal(predictions, [limit], {}),
        }
        for limit in job.limits
        if limit.metric in figures and limit.absolute is not None
    ]
    document = {
        "recipe": str(job.recipe),
        "target": job.target.name,
        "method": "estimated by arithmetic, nothing was measured",
        **asdict(predicted),
        "disk_bytes": predicted.disk_bytes,
        "peak_bytes": predicted.peak_bytes,
        "decode_ms": figures.get("latency/decode_p50_ms"),
        "limits": verdicts,
        "next_lever": lever(planned.spec),
    }
    broken = [v for v in verdicts if not v["fits"]]
    error = (
        InfeasibleError(
            f"{broken[0]['metric']} is predicted beyond its limit, whatever its error", mend=document["next_lever"]
        )
        if broken
        else None
    )
    return Outcome(document=document, error=error)


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt import display, units

    table = Table(title=f"{document['recipe']} on {document['target']} ({document['method']})")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    on_disk = ("weights", "tables", "adapters", "graphs", "carried", "disk_bytes")
    for name in (*on_disk, "resident", "kv_cache", "activations", "peak_bytes"):
        table.add_row(name.replace("_bytes", ""), f"{document[name] / 2**20:.2f}")
    display.out.print(table)
    display.out.print(f"{document['parameters']:,} parameters, tier {document['tier']}")
    if document["decode_ms"] is not None:
        display.out.print(f"{document['decode_ms']:.3g} ms a token, by the times of the target's kernels")
    for verdict in document["limits"]:
        told = "fits" if verdict["fits"] else "does not fit"
        shown = units.show(verdict["predicted"], verdict["unit"])
        display.out.print(f"{verdict['metric']} {shown}, {verdict['limit']}: {told}")
    display.out.print(f"next lever: {document['next_lever']}")
