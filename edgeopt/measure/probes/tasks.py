"""Measure task accuracy with lm-evaluation-harness on tasks defined in local files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from edgeopt.core.config_objects import digest
from edgeopt.core.protocols import ProbeContext, Samples
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.probes import lm_eval_tasks
from edgeopt.measure.probes.lm_eval_model import Scorer
from edgeopt.measure.stats.confidence_intervals import bootstrap_group_means

_DEFAULT_MAX_NEW_TOKENS = 256  # the default of lm-eval's own models


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Mean accuracy of the named tasks in a folder; needs the extra `tasks`.

    The accuracy of a task is the mean of its first metric among acc, acc_norm and exact_match. All tasks have equal
    weight, independent of their number of documents. Nothing is downloaded: the data files are in the folder, and
    templates run in a sandbox.

    Attributes:
        path: folder with the YAML and data files of the tasks.
        names: tasks to evaluate.
        documents: number of documents per task, from the first; 0 uses all.
        trusted: tasks that may run their `!function` code.
        digest: digest of the folder and the lm-eval version, computed at construction. It invalidates cached
            measurements when either changes.

    Raises ConfigError if a value or a task file is invalid, lm-eval is missing, or the folder differs from `digest`.
    """

    METRICS: ClassVar[Mapping[str, str]] = {"tasks/accuracy": ""}
    GROUP: ClassVar[str] = "tasks"
    TIMING_SENSITIVE: ClassVar[bool] = False
    processes: int = 1
    path: str
    names: tuple[str, ...]
    documents: int = 0
    trusted: tuple[str, ...] = ()
    digest: str = ""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(
                f"`processes` must be at least 1, got {self.processes}", location="processes", hint="Use 1 or more"
            )
        if self.documents < 0:
            raise ConfigError(
                f"`documents` must be at least 0, got {self.documents}", location="documents", hint="Use 0 for all"
            )
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"`names` must list different tasks, got {list(self.names)}",
                location="names",
                hint="Name each task once",
            )
        if find_spec("lm_eval") is None:
            raise ConfigError(
                "task accuracy needs the lm-eval package", hint="Install it: pip install 'edgeopt[tasks]'"
            )
        self._read_tasks()
        current_digest = digest([lm_eval_tasks.compute_folder_digest(self._folder), metadata.version("lm-eval")])
        if self.digest not in ("", current_digest):
            raise ConfigError(
                "the task files or the lm-eval version must match `digest`, but they changed",
                location="path",
                hint="Restart the study",
            )
        object.__setattr__(self, "digest", current_digest)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser().resolve()

    def _read_tasks(self) -> dict[str, lm_eval_tasks.Task]:
        return lm_eval_tasks.read_tasks(self._folder, self.names, self.trusted)

    def collect(self, context: ProbeContext) -> Samples:
        """Return the metric of each task and its score on each document."""
        scorer = Scorer(context.session, context.engine.directory, context.context_length)
        return {name: _evaluate_task(name, task, scorer, self.documents) for name, task in self._read_tasks().items()}

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return the mean accuracy of the tasks; the bootstrap resamples the documents of each task."""
        tasks = runs[0]
        scores = [task["scores"] for task in tasks.values()]
        value, low, high = bootstrap_group_means(scores)
        by_task = ", ".join(
            f"{name} {task['metric']} {bootstrap_group_means([task['scores']])[0]:.3g}" for name, task in tasks.items()
        )
        return [
            Measurement(
                metric="tasks/accuracy",
                unit=self.METRICS["tasks/accuracy"],
                value=value,
                low=low,
                high=high,
                count=sum(map(len, scores)),
                method=f"mean of {by_task}; lm-eval, bootstrap over the documents of each task",
            )
        ]


def _evaluate_task(name: str, task: lm_eval_tasks.Task, scorer: Scorer, documents: int) -> dict[str, Any]:
    """Return the metric of a task and lm-eval's score on each document."""
    # the libraries read these variables when they are imported
    os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"))
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    _sandbox_templates()
    metric = task["metric_list"][0]["metric"]
    with TemporaryDirectory(prefix="edgeopt-tasks-") as cache:
        config = lm_eval_tasks.load_functions(task)
        config["dataset_kwargs"]["cache_dir"] = cache
        for key in ("tag", "group", "task_list"):  # these keys group tasks and do not belong to a single task
            config.pop(key, None)
        results = evaluate(
            lm=_language_model(scorer),
            task_dict={name: ConfigurableTask(config=config)},
            limit=documents or None,
            bootstrap_iters=0,
        )
    samples = results["samples"][name]
    scores = [float(sample[metric]) for sample in samples if sample["filter"] == samples[0]["filter"]]
    return {"metric": metric, "scores": scores}


def _sandbox_templates() -> None:
    """Replace lm-eval's Jinja environment by a sandbox, because templates of task files could run any code in it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    sandbox = ImmutableSandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _language_model(scorer: Scorer) -> Any:
    """Return the scorer as an lm-eval language model."""
    from lm_eval.api.model import LM

    class Engine(LM):  # type: ignore[misc]  # lm-eval is optional; if absent, it has no types
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [scorer.log_likelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [scorer.rolling_log_likelihood(*request.args) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generate_until(scorer, *request.args) for request in requests]

    return Engine()


def _generate_until(scorer: Scorer, context: str, options: Mapping[str, Any]) -> str:
    if options.get("do_sample"):
        raise MeasureError(
            "a task must decode greedily, got do_sample: true", hint="Set do_sample: false in its generation_kwargs"
        )
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else until
    return scorer.generate_until(context, stops, int(options.get("max_gen_toks", _DEFAULT_MAX_NEW_TOKENS)))
