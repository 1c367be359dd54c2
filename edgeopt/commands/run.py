"""`edgeopt run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edgeopt.commands import arguments as shared
from edgeopt.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError, EdgeoptError, InfeasibleError, InputError
from edgeopt.result import undone

if TYPE_CHECKING:
    from edgeopt.result import TrialResult

SUMMARY = "Evaluate one recipe and log it"
EXAMPLE = "edgeopt run recipe=prune_lora_int4 step.prune.ratio=0.2"
STUDY = "single-runs"
"""The study that single runs are logged into."""


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    shared.cfg(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt import assembly, display
    from edgeopt import config as configs
    from edgeopt.pipeline import evaluate

    request = shared.request(args)
    config = request.compose()
    if args.cfg:
        return Outcome(document={"config": config})
    assembly.quiet()
    made = assembly.checked(config, request.config_dir)
    recorder = configs.part(config, "tracking")
    recorder.connect()
    recorder.open_study(STUDY, config, {})
    number = max(recorder.runs(STUDY), default=-1) + 1
    recorder.begin(STUDY, number, {}, config)
    store = assembly.store(config)
    with store.holding():
        try:
            with display.progress(str(made.recipe)) as progress:
                result = assembly.observed(lambda: evaluate(made, store, progress))
        except KeyboardInterrupt:
            recorder.kill(STUDY, number, "interrupted by Ctrl-C")
            raise
        run_id = recorder.record(STUDY, number, {}, config, result)
    document = {**result.to_json(), "feasible": result.feasible, "run_id": run_id}
    return Outcome(document=document, error=_error_of(result))


def show(document: Document) -> None:
    from edgeopt import display

    if display.config(document):
        return
    display.measurements(document["measurements"])
    display.verdicts(document["verdicts"])
    for note in document["notes"]:
        display.out.print(f"note: {note}")
    if document["engine"]:
        display.out.print(f"engine: {document['engine']['directory']}")
    display.out.print(f"MLflow run: {document['run_id']}")


def _error_of(result: TrialResult) -> EdgeoptError | None:
    """How a single run ends: its failure, or the first limit that it does not keep."""
    if result.failure is not None:
        kind = {"ConfigError": ConfigError, "InputError": InputError}.get(result.failure.kind, EdgeoptError)
        return kind(result.failure.message)
    if result.refused:
        return InfeasibleError(
            f"{undone(result.refused)}: {result.broken[0].told}", mend="Compress further, or set wider limits"
        )
    broken = [v for v in result.verdicts if not v.kept]
    if broken:
        return InfeasibleError(
            f"{len(broken)} of {len(result.verdicts)} limits are not kept: {broken[0].told}",
            mend="Compress further, or set wider limits",
        )
    return None
