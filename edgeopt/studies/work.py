"""Work on a study in this process: start the trial subprocess and run the worker loop."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from edgeopt.config import assemble, trial_process
from edgeopt.search.workers import loop
from edgeopt.search.workers.subprocess_evaluator import SubprocessEvaluator

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request
    from edgeopt.search.space.definition import Search
    from edgeopt.studies.open_study import OpenStudy


def start_evaluator(request: Request, search: Search, *, role: str = "all") -> SubprocessEvaluator:
    """Start the process that evaluates the trials of a search. Its imports take seconds, so start it early."""
    evaluate = partial(trial_process.evaluate_trial, request, build_only=role == "build")
    evaluator = SubprocessEvaluator(evaluate, timeout_s=search.trial_timeout_s, prepare=trial_process.prepare)
    evaluator.start()
    return evaluator


def work(opened: OpenStudy, evaluator: SubprocessEvaluator, *, role: str = "all") -> None:
    """Run one worker of the study in this process until the study ends."""
    study = opened.study
    study.built = {"build": False, "measure": True}.get(role)
    with opened.reporter.sweep(study) as watcher:
        loop.run_worker(
            loop.WorkerContext(
                study=study,
                evaluator=evaluator,
                log=opened.log(),
                watcher=watcher,
                empty_result=partial(assemble.empty_result, opened.request),
                role=role,
                patience_s=opened.recorder.patience_s,
            )
        )
