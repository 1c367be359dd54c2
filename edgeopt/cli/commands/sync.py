"""Implement `edgeopt sync`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import TrackingError

SUMMARY = "Send results to MLflow that a sweep could not send"
EXAMPLE = "edgeopt sync reference"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.study(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import trial_process
    from edgeopt.search.workers import loop
    from edgeopt.studies.open_study import OpenStudy

    trial_process.silence_libraries()
    opened = OpenStudy.find(args.study, args.state, args.store, reporter=display.REPORTER)
    study, recorder = opened.study, opened.recorder
    lacking = {row.number for row in study.unrecorded()}
    recorder.connect()
    recorder.open_study(opened.name, opened.config, {})
    loop.sync_tracking(study, opened.log(), display.err.print)
    left = {row.number for row in study.unrecorded()}
    sent = {row.number for row in study.trials() if row.recorded} & lacking
    document: Document = {
        "study": opened.name,
        "sent": sorted(sent),
        "left": sorted(left),
        "evicted": sorted(lacking - sent - left),
    }
    if left:
        error = TrackingError(
            f"{len(left)} trials of {opened.name} belong to running workers",
            hint="Wait: the workers send them, or another worker takes over when they stop",
        )
        return Outcome(document=document, error=error)
    if study.storage.active_workers():
        return Outcome(document=document)
    opened.close("FINISHED" if study.is_complete() else "KILLED")
    return Outcome(document=document | {"mlflow": asdict(recorder.study_links(opened.name))})


def show(document: Document) -> None:
    from edgeopt.cli import display

    display.out.print(f"sent {display.count(len(document['sent']), 'trial')} of {document['study']}")
    if document["evicted"]:
        numbers = ", ".join(map(str, document["evicted"]))
        display.out.print(f"the cache evicted the files of trials {numbers}: run the sweep again to rebuild them")
    if "mlflow" in document:
        display.out.print(document["mlflow"]["url"])
