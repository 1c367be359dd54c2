"""How many tasks an engine still solves, by lm-evaluation-harness, for tasks that are given as local files."""

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
from edgeopt.core.protocols import Samples, Subject
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.probes import lm_eval_tasks
from edgeopt.measure.probes.lm_eval_model import Scorer
from edgeopt.measure.stats.confidence_intervals import bootstrap_group_means

_MAX_NEW_TOKENS = 256  # where a task gives no max_gen_toks, as in lm-eval's own models


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Accuracy over the named tasks of a folder; needs the extra `tasks`.

    A task's accuracy is the mean of its first metric among acc, acc_norm and exact_match. Tasks count
    equally, however many documents they have. Nothing is fetched: data files lie in the folder, and
    templates run in a sandbox.

    Attributes:
        path: the folder of the tasks' YAML and data files.
        documents: of each task, from its beginning; 0 takes all.
        trusted: tasks whose `!function` may run.
        digest: of the folder and the library, filled in: other files or another version are measured anew.
    """

    METRICS: ClassVar[Mapping[str, str]] = {"tasks/accuracy": ""}
    GROUP: ClassVar[str] = "tasks"
    TIMED: ClassVar[bool] = False
    processes: int = 1
    path: str
    names: tuple[str, ...]
    documents: int = 0
    trusted: tuple[str, ...] = ()
    digest: str = ""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"{self.processes} measures nothing", location="processes", hint="Give 1 or more")
        if self.documents < 0:
            raise ConfigError(
                f"{self.documents} documents cannot be taken", location="documents", hint="Give 0 or more"
            )
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(f"{list(self.names)} are no tasks", location="names", hint="Name each task once")
        if find_spec("lm_eval") is None:
            raise ConfigError("task accuracy needs the lm-eval package", hint="pip install 'edgeopt[tasks]'")
        self._files()
        found = digest([lm_eval_tasks.content(self._folder), metadata.version("lm-eval")])
        if self.digest not in ("", found):
            raise ConfigError("the folder has changed since", location="path", hint="Start again")
        object.__setattr__(self, "digest", found)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser().resolve()

    def _files(self) -> dict[str, lm_eval_tasks.Task]:
        return lm_eval_tasks.read(self._folder, self.names, self.trusted)

    def collect(self, subject: Subject) -> Samples:
        """Of each task the metric and, by document, its scores."""
        scorer = Scorer(subject.session, subject.engine.directory, subject.context_length)
        return {name: _scores(name, task, scorer, self.documents) for name, task in self._files().items()}

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        tasks = runs[0]
        scores = [task["scores"] for task in tasks.values()]
        value, low, high = bootstrap_group_means(scores)
        each = ", ".join(
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
                method=f"mean of {each}; lm-eval, bootstrap over the documents of each task",
            )
        ]


def _scores(name: str, task: lm_eval_tasks.Task, scorer: Scorer, documents: int) -> dict[str, Any]:
    """What lm-eval says of each document of one task."""
    os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"))  # read by its libraries' import
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    _sandbox_templates()
    metric = task["metric_list"][0]["metric"]
    with TemporaryDirectory(prefix="edgeopt-tasks-") as cache:
        config = lm_eval_tasks.loaded(task)
        config["dataset_kwargs"]["cache_dir"] = cache
        for key in ("tag", "group", "task_list"):  # they sort tasks, and are no part of one
            config.pop(key, None)
        found = evaluate(
            lm=_language_model(scorer),
            task_dict={name: ConfigurableTask(config=config)},
            limit=documents or None,
            bootstrap_iters=0,
        )
    samples = found["samples"][name]
    scores = [float(sample[metric]) for sample in samples if sample["filter"] == samples[0]["filter"]]
    return {"metric": metric, "scores": scores}


def _sandbox_templates() -> None:
    """Have lm-eval render the templates of task files in Jinja's sandbox: its own environment runs any code in them."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    sandbox = ImmutableSandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _language_model(scorer: Scorer) -> Any:
    from lm_eval.api.model import LM

    class Engine(LM):  # type: ignore[misc]  # the library is optional, and has no types where it is absent
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [scorer.log_likelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [scorer.rolling_log_likelihood(*request.args) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generated(scorer, *request.args) for request in requests]

    return Engine()


def _generated(scorer: Scorer, context: str, options: Mapping[str, Any]) -> str:
    if options.get("do_sample"):
        raise MeasureError("the task samples at random", hint="Set do_sample: false in its generation_kwargs")
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else until
    return scorer.continuation(context, stops, int(options.get("max_gen_toks", _MAX_NEW_TOKENS)))
