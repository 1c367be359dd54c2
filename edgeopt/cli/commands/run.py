"""`edgeopt run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.core.result import skipped_work
from edgeopt.errors import ConfigError, EdgeoptError, InfeasibleError, InputError

if TYPE_CHECKING:
    from edgeopt.core.result import TrialResult

SUMMARY = "Evaluate one recipe and log it"
EXAMPLE = "edgeopt run recipe=prune_lora_int4 step.prune.ratio=0.2"
STUDY = "single-runs"
"""The study that single runs are logged into."""


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    shared.cfg(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.config import parse as configs
    from edgeopt.pipeline.evaluate import evaluate

    request = shared.request(args)
    config = request.compose()
    if args.cfg:
        return Outcome(document={"config": config})
    assemble.quiet()
    made = assemble.checked(config, request.config_dir)
    recorder = configs.part(config, "tracking")
    recorder.connect()
    recorder.open_study(STUDY, config, {})
    number = max(recorder.runs(STUDY), default=-1) + 1
    recorder.begin(STUDY, number, {}, config)
    store = assemble.store(config)
    with store.protect():
        try:
            with display.progress(str(made.recipe)) as progress:
                result = assemble.observed(lambda: evaluate(made, store, progress))
        except KeyboardInterrupt:
            recorder.kill(STUDY, number, "interrupted by Ctrl-C")
            raise
        run_id = recorder.record(STUDY, number, {}, config, result)
    document = {**result.to_json(), "feasible": result.feasible, "run_id": run_id}
    return Outcome(document=document, error=_error_of(result))


def show(document: Document) -> None:
    from edgeopt.cli import display

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
            f"{skipped_work(result.refused)}: {result.violated[0].message}",
            hint="Compress further, or set wider limits",
        )
    broken = [v for v in result.verdicts if not v.satisfied]
    if broken:
        return InfeasibleError(
            f"{len(broken)} of {len(result.verdicts)} limits are not kept: {broken[0].message}",
            hint="Compress further, or set wider limits",
        )
    return None
