"""`edgeopt sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from edgeopt.cli.commands import arguments as shared
from edgeopt.cli.commands import front, promote
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.studies.open_study import OpenStudy

SUMMARY = "Search recipes under the target's limits, promote the best"
EXAMPLE = "edgeopt sweep --config-name reference workers=2"


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.overrides(parser)
    shared.cfg(parser)
    parser.add_argument(
        "--config-name", "-n", default="reference", metavar="NAME", help="a file of sweeps/ (default: reference)"
    )


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.config import assemble
    from edgeopt.studies.open_study import OpenStudy

    request = shared.request(args, name=args.config_name)
    config = request.compose()
    if args.cfg:
        return Outcome(document={"config": config})
    assemble.quiet()
    workers = config["workers"]
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigError(f"{workers!r} workers cannot work", location="workers", hint="Give 1 or more")
    opened = OpenStudy.of(request, config, reporter=display.REPORTER)
    with _starting(opened, workers) as work:
        return _swept(opened, work)


@contextmanager
def _starting(opened: OpenStudy, count: int) -> Iterator[Callable[[], None]]:
    """How the study is worked on. The process of one worker alone starts already: its imports take seconds."""
    from edgeopt.studies import launch
    from edgeopt.studies.work import start_evaluator, work

    if count > 1 or opened.study.search.engine != "local":
        yield partial(launch.run, opened, count)
        return
    with closing(start_evaluator(opened.request, opened.study.search)) as evaluator:
        yield partial(work, opened, evaluator)


def _swept(opened: OpenStudy, work: Callable[[], None]) -> Outcome:
    from edgeopt.release import signature
    from edgeopt.studies.open_study import nothing_feasible

    _check(opened)
    recorder, policy = opened.recorder, opened.sweep_policy()
    recorder.connect()
    opened.open()
    recorder.open_study(opened.name, opened.config, {})

    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        work()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        snapshot = opened.close(status)
    links = asdict(recorder.ui_hint(opened.name))
    if not snapshot.front:
        return Outcome(document={**snapshot.to_json(), "mlflow": links}, error=nothing_feasible(snapshot))
    if policy is None:
        return Outcome(document={**snapshot.to_json(), "mlflow": links})
    promotion = opened.promote(snapshot, policy, private_key=signature.key_of_environment())
    snapshot = replace(snapshot, champion=opened.champion(policy.model))
    return Outcome(document={**snapshot.to_json(), "mlflow": links, "promotion": promotion.to_json()})


def _check(opened: OpenStudy) -> None:
    """Faults of the sweep itself show before it starts, not in its trials."""
    from edgeopt.config import assemble
    from edgeopt.config import parse as configs

    measured = configs.part(opened.config, "measure").metrics
    for objective in opened.study.objectives:
        if objective.metric not in measured:
            raise ConfigError(
                f"no active probe measures {objective.metric}",
                location=f"search.objectives.{objective.metric}",
                hint="Switch its probe on, or set the objective to null",
            )
    request, search = opened.request, opened.study.search
    for params in search.enqueue or [{}]:
        assemble.checked(request.compose(dict(params)), request.config_dir)
    for params in search.space.examples():
        assemble.job(request.compose(params), request.config_dir)


def show(document: Document) -> None:
    from edgeopt.cli import display

    if display.config(document):
        return
    front.show(document)
    if "promotion" in document:
        promote.show(document["promotion"])
    links = document["mlflow"]
    if links["command"]:
        display.out.print(f"see it: {links['command']}")
    pages = {"study": links["page_url"], "MLflow": links["url"], **links["view_urls"]}
    for name, url in pages.items():
        if url:
            display.out.print(f"{name:>10}  {url}")
