"""A study as the commands see it: its trials, its runs in MLflow, its front and its champion."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.config import assemble
from edgeopt.config import parse as configs
from edgeopt.config.assemble import Request
from edgeopt.config.compose import Config
from edgeopt.core.artifact import Engine
from edgeopt.core.protocols import Progress
from edgeopt.core.redaction import without_password
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, InfeasibleError, InputError, TrackingError
from edgeopt.release import policy as policies
from edgeopt.release.policy import Policy
from edgeopt.search.pareto.front import Objective, as_row
from edgeopt.search.pareto.param_importance import importance
from edgeopt.search.space.definition import Search
from edgeopt.search.status import status as study_status
from edgeopt.search.storage import database, trial_store
from edgeopt.search.storage.trial_store import Ledger
from edgeopt.search.study import Study
from edgeopt.studies.progress import Reporter, SilentReporter
from edgeopt.studies.recorder import StudyLog

Document = dict[str, Any]

if TYPE_CHECKING:
    from edgeopt.tracking.recorder import MlflowRecorder


@dataclass(frozen=True, kw_only=True)
class OpenStudy:
    """A study, the request and config that made it, and the recorder of its runs.

    Attributes:
        metrics: all that its probes may report, each with its unit.
        tracking_uri: goes before MLflow's own default, and after the config's.
        promoted: the registered model that its trials were promoted to, if they ever were.
        reporter: shows progress; silent by default.
    """

    study: Study
    request: Request
    config: Config
    metrics: Mapping[str, str]
    tracking_uri: str | None = None
    promoted: str | None = None
    reporter: Reporter = field(default_factory=SilentReporter)

    @classmethod
    def of(
        cls,
        request: Request,
        config: Config,
        *,
        store: str | None = None,
        metrics: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
    ) -> OpenStudy:
        """The study that `config` describes; nothing is written yet. `store` goes before the config's.

        `metrics` are those of the study where it was opened before: they are not looked for then.
        """
        reporter = reporter or SilentReporter()
        search = configs.part(config, "search")
        if not isinstance(search, Search):
            raise ConfigError(
                "it is no search", location="search._target_", hint="Name edgeopt.search.space.definition.Search"
            )
        known = metrics or assemble.known_metrics(request.config_dir)
        study = Study(
            ledger=Ledger(store or assemble.store_url(config), search.study, tell=reporter.message),
            search=search,
            objectives=tuple(Objective.parse(m, direction, known) for m, direction in search.directions.items()),
            limits=configs.limits(config, known),
            predict_trial=partial(assemble.predict_trial, request)
            if configs.part(config, "measure").stop_early
            else None,
        )
        return cls(study=study, request=request, config=config, metrics=known, reporter=reporter)

    @classmethod
    def find(cls, name: str | None, state: Path, store: str | None, *, reporter: Reporter | None = None) -> OpenStudy:
        """A study of a store, by name or the latest; `state` is the folder that its workers share."""
        url = store or os.environ.get("EDGEOPT_STORE") or database.file_url(state.absolute() / "studies.db")
        file = url.removeprefix("sqlite:///")
        known = trial_store.studies(url) if file == url or Path(file).is_file() else {}
        location = without_password(url)
        if not known:
            raise InputError(
                "there is no study", location=location, hint="Run edgeopt sweep first, or give --state or --store"
            )
        name = name or list(known)[-1]
        if name not in known:
            raise InputError(
                f"there is no study {name!r}", location=location, hint=f"Choose one of: {', '.join(known)}"
            )
        sweep = known[name]
        uri = sweep["tracking_uri"]
        own = _snapshot(state, name)
        request = Request(
            name=sweep["name"],
            overrides=(*sweep["overrides"], f"state='{state}'"),
            config_dir=own if own.is_dir() else None,
        )
        config = {**sweep["config"], "state": str(state)}
        return replace(
            cls.of(request, config, store=url, metrics=sweep.get("metrics"), reporter=reporter),
            tracking_uri=None if "***" in uri else uri,
            promoted=sweep.get("promoted"),
        )

    @cached_property
    def recorder(self) -> MlflowRecorder:
        """Made where it is needed: importing MLflow takes longer than reading a study."""
        recorder: MlflowRecorder = configs.part(self.config, "tracking")
        return replace(recorder, tracking_uri=self._uri)

    @property
    def _uri(self) -> str | None:
        """None is MLflow's default."""
        configured: str | None = self.config["tracking"].get("tracking_uri")
        return configured or os.environ.get("MLFLOW_TRACKING_URI") or self.tracking_uri

    def open(self) -> None:
        """Begin the study or go on with it, and keep what `find` needs, here and on other machines."""
        from edgeopt.tracking import server

        self.study.open(
            {
                "name": self.request.name,
                "overrides": list(self.request.overrides),
                "config": self.config,
                "metrics": dict(self.metrics),
                "tracking_uri": without_password(server.absolute(self.recorder.uri)),
            }
        )
        folder = _snapshot(Path(self.config["state"]), self.name)
        if self.request.config_dir is not None and self.request.config_dir.resolve() != folder.resolve():
            shutil.rmtree(folder, ignore_errors=True)
            for path in sorted(self.request.config_dir.rglob("*.yaml")):
                copied = folder / path.relative_to(self.request.config_dir)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)

    @property
    def name(self) -> str:
        return self.study.name

    def front(self) -> Document:
        """The document of `edgeopt front`, without the champion."""
        rows, ranks = self.study.rows(), self.study.ranks()
        bounds = {m: h.bound for r in rows if r.summary for m, h in r.summary.verdicts.items() if h.bound is not None}
        return {
            "study": self.name,
            "objectives": [
                {"metric": o.metric, "unit": self.metrics.get(o.metric, ""), "direction": o.direction}
                for o in self.study.objectives
            ],
            "limits": [
                {"metric": x.metric, "limit": str(x), "bound": bounds.get(x.metric, x.absolute), "unit": x.unit}
                for x in self.study.limits
            ],
            "trials": [as_row(row, ranks.get(row.number)) for row in rows],
            "front": sorted(number for number, rank in ranks.items() if rank == 1),
            "champion": None,
        }

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> Document:
        """End the study's run with all that is known of its front, whose document this returns.

        Raises TrackingError where MLflow does not take it, and says how to send it later.
        """
        from edgeopt.tracking.report import Course

        document, known = self.front(), study_status(self.study)
        course = Course(
            hypervolumes=self.study.volumes(),
            importance=self._importance(),
            spent_s=known["spent_s"],
            spent_j=known["spent_j"],
            saved_s=known["saved_s"],
        )
        try:
            self.recorder.release(self.name, document["front"])
            self.recorder.close_study(
                self.name,
                rows=document["trials"],
                objectives=document["objectives"],
                limits=document["limits"],
                status=status,
                course=course,
            )
        except TrackingError as error:
            raise TrackingError(
                f"the front and {known['unrecorded']} trials are kept and not in MLflow yet: {error.message}",
                location=error.location,
                hint=f"Once it answers, send them: edgeopt sync {self.name}",
            ) from error
        return document

    def _importance(self) -> dict[str, dict[str, float]]:
        """Objective → parameter → how much it decides, among the trials in which it was measured."""
        found = {}
        for metric in (objective.metric for objective in self.study.objectives):
            known = [
                (row.params, value)
                for row in self.study.rows()
                if row.summary is not None and math.isfinite(value := row.summary.metrics.get(metric, math.nan))
            ]
            found[metric] = importance([params for params, _ in known], [value for _, value in known])
        return found

    def policy(self, name: str, config_dir: Path | None = None) -> Policy:
        return policies.load(name, config_dir or self.request.config_dir)

    def sweep_policy(self) -> Policy | None:
        """The policy by which the sweep itself promotes, where its config names one."""
        name = self.config.get("promote")
        return None if name is None else self.policy(name)

    def log(self) -> StudyLog:
        """Where its workers record their trials."""
        return StudyLog(recorder=self.recorder, study=self.name, request=self.request, document=self.front)

    def promote(
        self,
        document: Document,
        policy: Policy,
        config_dir: Path | None = None,
        *,
        reason: str = "",
        private_key: Path | None = None,
        dry_run: bool = False,
    ) -> Document:
        """Register the front's members; `document` is the front's. InfeasibleError where there is none."""
        from edgeopt.release import webhook
        from edgeopt.release.promote import promote

        if not document["front"]:
            raise nothing_feasible(document)
        with self.reporter.step("promoting") as progress:
            promotion = promote(
                study=self.name,
                rows=document["trials"],
                objectives=document["objectives"],
                limits=document["limits"],
                policy=policy.on(self.config["target"]["name"]),
                remeasure=partial(self._measured, progress),
                tracking_uri=self.recorder.uri,
                config_dir=config_dir or self.request.config_dir,
                private_key=private_key,
                secret=webhook.secret_of_environment(),
                reason=reason,
                dry_run=dry_run,
                progress=progress,
            ).to_json()
        if not dry_run:
            self.study.ledger.note(promoted=policy.model)
        return promotion

    def _measured(self, progress: Progress, engine: Engine, metrics: Collection[str]) -> tuple[Measurement, ...]:
        """Figures of an engine on this machine, by those of the study's probes that give `metrics`."""
        bound = assemble.bench(self.config)
        probes = [name for name, probe in bound.bench.probes.items() if set(metrics) & set(probe.METRICS)]
        return bound.alone(engine, progress, probes)

    def champion(self, model: str) -> Document | None:
        """The champion of a registered model where it comes from this study."""
        from edgeopt.release.registry import fast_reader

        return fast_reader.champion(model, self._uri, study=self.name)


def _snapshot(state: Path, study: str) -> Path:
    """The user's configs as they were when the study was opened, for all of its workers."""
    return state / "studies" / study


def nothing_feasible(document: Document) -> InfeasibleError:
    """Which limit most trials break, or which objective was not measured, so that a person knows where to look."""
    feasible = [trial for trial in document["trials"] if trial["feasible"]]
    if feasible:
        asked = [objective["metric"] for objective in document["objectives"]]
        missing = [metric for metric in asked if any(metric not in trial["metrics"] for trial in feasible)]
        return InfeasibleError(
            f"{len(feasible)} trials keep every limit, and {', '.join(missing)} was not measured; nothing was promoted",
            location="search.objectives",
            hint="Switch on a probe that measures it, or leave the objective out",
        )
    broken: dict[str, int] = {}
    for trial in document["trials"]:
        for metric, excess in trial["excess"].items():
            if excess is None or excess > 0:
                broken[metric] = broken.get(metric, 0) + 1
    worst = max(broken, key=lambda m: broken[m], default=None)
    why = f": {broken[worst]} of {len(document['trials'])} break {worst}" if worst else ""
    return InfeasibleError(
        f"no trial keeps every limit{why}; nothing was promoted",
        location=f"study {document['study']}",
        hint="Search longer, add smaller recipes, or set wider limits",
    )
