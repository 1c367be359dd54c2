"""`edgeopt sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.commands import arguments as shared
from edgeopt.commands import front, promote
from edgeopt.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.assembly import Request
    from edgeopt.result import TrialResult
    from edgeopt.search.study import Search

SUMMARY = "Search recipes under the target's limits, promote the best"
EXAMPLE = "edgeopt sweep --config-name reference"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    shared.cfg(parser)
    parser.add_argument(
        "--config-name", "-n", default="reference", metavar="NAME", help="a file of sweeps/ (default: reference)"
    )


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt import assembly, display
    from edgeopt import config as configs
    from edgeopt.commands.studies import OpenStudy, nothing_feasible
    from edgeopt.search import loop
    from edgeopt.search.worker import Worker

    request = shared.request(args, name=args.config_name)
    config = request.compose()
    if args.cfg:
        return Outcome(document={"config": config})
    assembly.quiet()
    _check(request, configs.part(config, "search"))
    opened = OpenStudy.of(config, request.config_dir)
    study, recorder, policy = opened.study, opened.recorder, opened.sweep_policy()
    recorder.connect()
    recorder.open_study(opened.name, config, {})
    opened.save()

    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with display.sweep(study) as watcher:
            loop.run(
                loop.Sweep(
                    study=study,
                    worker=Worker(partial(assembly.evaluate_trial, request), timeout_s=study.search.trial_timeout_s),
                    log=_StudyLog(recorder=recorder, study=opened.name, request=request),
                    watcher=watcher,
                    blank=partial(assembly.blank, request),
                )
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        document = opened.front()
        recorder.close_study(
            opened.name,
            rows=document["trials"],
            objectives=document["objectives"],
            limits=document["limits"],
            status=status,
        )
    document["mlflow"] = asdict(recorder.ui_hint(opened.name))
    if not document["front"]:
        return Outcome(document=document, error=nothing_feasible(document))
    if policy is not None:
        document["promotion"] = opened.promote(document, policy)
        document["champion"] = opened.champion(policy)
    return Outcome(document=document)


def _check(request: Request, search: Search) -> None:
    """Faults of the sweep itself show before it starts, not in its trials."""
    from edgeopt import assembly

    for params in search.enqueue or [{}]:
        assembly.checked(request.compose(dict(params)), request.config_dir)
    for params in search.space.examples():
        assembly.job(request.compose(params), request.config_dir)


def show(document: Document) -> None:
    from edgeopt import display

    if display.config(document):
        return
    front.show(document)
    if "promotion" in document:
        promote.show(document["promotion"])
    hint = document["mlflow"]
    if hint["command"]:
        display.out.print(f"see it: {hint['command']}")
    display.out.print(f"        {hint['url']}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _StudyLog:
    """The recorder bound to one study."""

    recorder: Any
    study: str
    request: Request

    def begin(self, number: int, params: Mapping[str, Any]) -> None:
        self.recorder.begin(self.study, number, params)

    def record(self, number: int, params: Mapping[str, Any], result: TrialResult) -> None:
        try:
            config = self.request.compose(dict(params))
        except ConfigError:
            config = self.request.compose()  # the trial's own values do not compose: that is its recorded failure
        self.recorder.record(self.study, number, params, config, result)

    def kill(self, number: int, why: str) -> None:
        self.recorder.kill(self.study, number, why)

    def open_trials(self) -> list[int]:
        return list(self.recorder.open_runs(self.study))
