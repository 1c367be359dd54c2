"""Run a sweep: check it, search, close the study, and promote its front."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.config import assemble, parse, trial_process
from edgeopt.errors import ConfigError
from edgeopt.studies import launch
from edgeopt.studies.open_study import OpenStudy
from edgeopt.studies.work import start_evaluator, work

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request
    from edgeopt.core.study_snapshot import StudySnapshot
    from edgeopt.release.promote import Promotion
    from edgeopt.studies.progress import Reporter
    from edgeopt.tracking.recorder import StudyLinks


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        links: URLs of the study in the MLflow UI.
        promotion: registered versions; None if the config names no policy or the front is empty.
    """

    study: OpenStudy
    snapshot: StudySnapshot
    links: StudyLinks
    promotion: Promotion | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the document of `edgeopt sweep --json`."""
        document = {**self.snapshot.to_json(), "mlflow": asdict(self.links)}
        return document if self.promotion is None else {**document, "promotion": self.promotion.to_json()}


def run_sweep(request: Request, reporter: Reporter) -> SweepResult:
    """Search recipes until the study is over, then promote its front.

    An interrupted study continues where it stopped. An empty front raises no error.

    Raises:
        ConfigError: the sweep is invalid; no trial has started.
        TrackingError: MLflow does not accept the results. They stay in the trial storage.
        GateError: a release gate refused a trial of the front.
    """
    from edgeopt.release import signature

    config = request.compose()
    trial_process.silence_libraries()
    workers = config["workers"]
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigError(
            f"`workers` must be a positive integer, got {workers!r}", location="workers", hint="Give 1 or more"
        )
    study = OpenStudy.from_config(request, config, reporter=reporter)
    with _prepared_search(study, workers) as search:
        _check(study)
        recorder, policy = study.recorder, study.sweep_policy()
        recorder.connect()
        study.open()
        recorder.open_study(study.name, study.config, {})
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            search()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            snapshot = study.close(status)
    links = recorder.study_links(study.name)
    if policy is None or not snapshot.front:
        return SweepResult(study=study, snapshot=snapshot, links=links)
    promotion = study.promote(snapshot, policy, private_key=signature.key_from_environment())
    study = replace(study, promoted=policy.model)
    snapshot = replace(snapshot, champion=study.champion(policy.model))
    return SweepResult(study=study, snapshot=snapshot, links=links, promotion=promotion)


@contextmanager
def _prepared_search(study: OpenStudy, workers: int) -> Iterator[Callable[[], None]]:
    """Yield the function that runs the search.

    The subprocess of a single local worker starts first, because its imports take seconds.
    """
    if workers > 1 or study.study.search.engine != "local":
        yield partial(launch.run, study, workers)
        return
    with closing(start_evaluator(study.request, study.study.search)) as evaluator:
        yield partial(work, study, evaluator)


def _check(study: OpenStudy) -> None:
    """Raise ConfigError or InputError for an unmeasured objective or an invalid recipe, before any trial starts."""
    measured = parse.instantiate_group(study.config, "measure").metrics
    for objective in study.study.objectives:
        if objective.metric not in measured:
            raise ConfigError(
                f"the objective {objective.metric} is not measured by any active probe",
                location=f"search.objectives.{objective.metric}",
                hint="Enable a probe that measures it, or set the objective to null",
            )
    request, search = study.request, study.study.search
    for params in search.enqueue or [{}]:
        assemble.build_checked_job(request.compose(dict(params)), request.config_dir)
    for params in search.space.examples():
        assemble.build_job(request.compose(params), request.config_dir)
