"""Open, snapshot, close and promote a study with its config and its MLflow recorder."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.config import assemble, parse, prediction
from edgeopt.config.assemble import Request
from edgeopt.config.compose import Config
from edgeopt.core.artifact import Engine
from edgeopt.core.config_objects import did_you_mean
from edgeopt.core.protocols import Progress
from edgeopt.core.redaction import redact_password
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, InfeasibleError, InputError, TrackingError
from edgeopt.release import policy as policies
from edgeopt.release.policy import Policy
from edgeopt.search.pareto.front import Objective
from edgeopt.search.pareto.param_importance import compute_importance
from edgeopt.search.snapshot import take_snapshot
from edgeopt.search.space.definition import Search
from edgeopt.search.space.search_space import to_overrides
from edgeopt.search.status import collect_status
from edgeopt.search.storage import database, trial_storage
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.study import Study
from edgeopt.studies.progress import Reporter, SilentReporter
from edgeopt.studies.recorder import StudyLog

if TYPE_CHECKING:
    from edgeopt.core.study_snapshot import Champion, StudySnapshot
    from edgeopt.release.promote import Promotion
    from edgeopt.tracking.recorder import MlflowRecorder


@dataclass(frozen=True, kw_only=True)
class OpenStudy:
    """A study with the request and config that created it and the recorder of its runs.

    Attributes:
        metrics: unit of every metric that the probes can report.
        tracking_uri: tracking URI if neither the config nor MLFLOW_TRACKING_URI sets one.
        promoted: registered model to which trials were promoted; None before the first promotion.
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
    def from_config(
        cls,
        request: Request,
        config: Config,
        *,
        store: str | None = None,
        metrics: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
    ) -> OpenStudy:
        """Return the study that `config` describes, without writing anything.

        Args:
            store: database URL; by default the one in `config`.
            metrics: unit by metric, as stored when the study was opened; by default those of all probes.

        Raises:
            ConfigError: the search, an objective or a limit is invalid.
        """
        reporter = reporter or SilentReporter()
        search = parse.instantiate_group(config, "search")
        if not isinstance(search, Search):
            raise ConfigError(
                "`search._target_` must name a search",
                location="search._target_",
                hint="Use edgeopt.search.space.definition.Search",
            )
        metrics = metrics or assemble.known_metrics(request.config_dir)
        study = Study(
            storage=TrialStorage(store or assemble.store_url(config), search.study, on_message=reporter.message),
            search=search,
            objectives=tuple(Objective.parse(m, direction, metrics) for m, direction in search.directions.items()),
            limits=parse.limits(config, metrics),
            predict_trial=partial(prediction.predict_trial, request)
            if parse.instantiate_group(config, "measure").stop_early
            else None,
        )
        return cls(study=study, request=request, config=config, metrics=metrics, reporter=reporter)

    @classmethod
    def find(cls, name: str | None, state: Path, store: str | None, *, reporter: Reporter | None = None) -> OpenStudy:
        """Return a stored study by name, by default the latest opened one. Raises InputError if it does not exist.

        Args:
            state: folder that the workers of the study share.
            store: database URL; by default EDGEOPT_STORE, or the database in `state`.
        """
        url = store or os.environ.get("EDGEOPT_STORE") or database.file_url(state.absolute() / "studies.db")
        file = url.removeprefix("sqlite:///")
        studies = trial_storage.list_studies(url) if file == url or Path(file).is_file() else {}
        location = redact_password(url)
        if not studies:
            raise InputError(
                "there is no study", location=location, hint="Run edgeopt sweep first, or give --state or --store"
            )
        name = name or list(studies)[-1]
        if name not in studies:
            raise InputError(
                f"there is no study {name!r}",
                location=location,
                hint=f"{did_you_mean(name, studies)} Choose one of: {', '.join(studies)}".strip(),
            )
        sweep = studies[name]
        uri = sweep["tracking_uri"]
        config_dir = _config_copy(state, name)
        request = Request(
            name=sweep["name"],
            overrides=(*sweep["overrides"], *to_overrides({"state": str(state)})),
            config_dir=config_dir if config_dir.is_dir() else None,
        )
        config = {**sweep["config"], "state": str(state)}
        return replace(
            cls.from_config(request, config, store=url, metrics=sweep.get("metrics"), reporter=reporter),
            tracking_uri=None if "***" in uri else uri,  # a stored URI has its password redacted
            promoted=sweep.get("promoted"),
        )

    @cached_property
    def recorder(self) -> MlflowRecorder:
        """Return the MLflow recorder, created on first use because importing MLflow is slow."""
        recorder: MlflowRecorder = parse.instantiate_group(self.config, "tracking")
        return replace(recorder, tracking_uri=self._resolved_tracking_uri)

    @property
    def _resolved_tracking_uri(self) -> str | None:
        """Return the tracking URI, or None to use the default of MLflow."""
        configured: str | None = self.config["tracking"].get("tracking_uri")
        return configured or os.environ.get("MLFLOW_TRACKING_URI") or self.tracking_uri

    def open(self) -> None:
        """Create or continue the study, and store the request and configs that `find` reads."""
        from edgeopt.tracking import server

        self.study.open(
            {
                "name": self.request.name,
                "overrides": list(self.request.overrides),
                "config": self.config,
                "metrics": dict(self.metrics),
                "tracking_uri": redact_password(server.absolute_uri(self.recorder.uri)),
            }
        )
        folder = _config_copy(Path(self.config["state"]), self.name)
        if self.request.config_dir is not None and self.request.config_dir.resolve() != folder.resolve():
            shutil.rmtree(folder, ignore_errors=True)
            for path in sorted(self.request.config_dir.rglob("*.yaml")):
                copied = folder / path.relative_to(self.request.config_dir)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return self.study.name

    def snapshot(self) -> StudySnapshot:
        """Return the study as it is now, without the champion."""
        return take_snapshot(self.study, self.metrics)

    def snapshot_with_champion(self) -> StudySnapshot:
        """Return the study as it is now, with the champion if one of its trials is the champion."""
        snapshot = self.snapshot()
        return snapshot if self.promoted is None else replace(snapshot, champion=self.champion(self.promoted))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> StudySnapshot:
        """End the study's run in MLflow with its front and report, and return the logged snapshot.

        Raises TrackingError if MLflow does not accept them. The error says how to send them later.
        """
        from edgeopt.tracking.report import SearchStatistics

        snapshot, study_status = self.snapshot(), collect_status(self.study)
        statistics = SearchStatistics(
            hypervolumes=self.study.hypervolume_history(),
            importance=self._importance(),
            spent_s=study_status.spent_s,
            spent_j=study_status.spent_j,
            saved_s=study_status.saved_s,
        )
        try:
            self.recorder.release(self.name, [trial.number for trial in snapshot.front])
            self.recorder.close_study(snapshot, status=status, statistics=statistics)
        except TrackingError as error:
            raise TrackingError(
                f"the front and {study_status.unrecorded} trials are stored locally and not in MLflow yet: "
                f"{error.message}",
                location=error.location,
                hint=f"Once it answers, send them: edgeopt sync {self.name}",
            ) from error
        return snapshot

    def _importance(self) -> dict[str, dict[str, float]]:
        """Return the importance of each parameter by objective metric, over the trials that measured it."""
        importance = {}
        for metric in (objective.metric for objective in self.study.objectives):
            measured = [
                (trial.params, value)
                for trial in self.study.trials()
                if trial.summary is not None and math.isfinite(value := trial.summary.metrics.get(metric, math.nan))
            ]
            recipes, values = [params for params, _ in measured], [value for _, value in measured]
            importance[metric] = compute_importance(recipes, values)
        return importance

    def policy(self, name: str, config_dir: Path | None = None) -> Policy:
        """Load a release policy, by default from the user's configs of this study."""
        return policies.load(name, config_dir or self.request.config_dir)

    def sweep_policy(self) -> Policy | None:
        """Return the release policy that the sweep applies at its end; None if its config names none."""
        name = self.config.get("promote")
        return None if name is None else self.policy(name)

    def log(self) -> StudyLog:
        """Return the log that records the trials of this study in MLflow."""
        return StudyLog(recorder=self.recorder, study=self.name, request=self.request, take_snapshot=self.snapshot)

    def promote(
        self,
        snapshot: StudySnapshot,
        policy: Policy,
        config_dir: Path | None = None,
        *,
        trial: int | None = None,
        reason: str = "",
        private_key: Path | None = None,
        dry_run: bool = False,
    ) -> Promotion:
        """Register the trials on the front of a snapshot, or only `trial`.

        Raises InfeasibleError if the front is empty, InputError if `trial` is not on the front.
        """
        from edgeopt.release import webhook
        from edgeopt.release.promote import promote

        if not snapshot.front:
            raise nothing_feasible(snapshot)
        if trial is not None:
            snapshot = _with_single_trial(snapshot, trial)
        with self.reporter.step("promoting") as progress:
            promotion = promote(
                snapshot,
                policy=policy.for_target(self.config["target"]["name"]),
                remeasure=partial(self._measure_engine, progress),
                tracking_uri=self.recorder.uri,
                config_dir=config_dir or self.request.config_dir,
                private_key=private_key,
                secret=webhook.secret_from_environment(),
                reason=reason,
                dry_run=dry_run,
                progress=progress,
            )
        if not dry_run:
            self.study.storage.update_sweep_info(promoted=policy.model)
        return promotion

    def _measure_engine(self, progress: Progress, engine: Engine, metrics: Collection[str]) -> tuple[Measurement, ...]:
        """Measure an engine on this machine with the probes of the study that report `metrics`."""
        bench = assemble.build_bench(self.config)
        probes = [name for name, probe in bench.bench.probes.items() if set(metrics) & set(probe.METRICS)]
        return bench.measure_engine(engine, progress, probes)

    def champion(self, model: str) -> Champion | None:
        """Return the champion of a registered model; None unless it comes from this study."""
        from edgeopt.release.registry import fast_reader

        return fast_reader.champion(model, self._resolved_tracking_uri, study=self.name)


def _config_copy(state: Path, study: str) -> Path:
    """Return the folder with a copy of the user's configs, made for the workers when the study was opened."""
    return state / "studies" / study


def _with_single_trial(snapshot: StudySnapshot, number: int) -> StudySnapshot:
    """Return the snapshot with a single trial of its front."""
    chosen = tuple(trial for trial in snapshot.front if trial.number == number)
    if not chosen:
        numbers = ", ".join(str(trial.number) for trial in snapshot.front)
        raise InputError(
            f"only trials on the front can be promoted, got trial {number}",
            location="--trial",
            hint=f"Choose one of: {numbers}. `edgeopt explain {number}` says why it is not on the front",
        )
    return replace(snapshot, trials=chosen)


def nothing_feasible(snapshot: StudySnapshot) -> InfeasibleError:
    """Return the error for an empty front.

    It names the limit that most trials exceed and the number of disturbed trials, or the missing objective.
    """
    if snapshot.feasible:
        names = [o.metric for o in snapshot.objectives]
        missing = [name for name in names if any(name not in trial.metrics for trial in snapshot.feasible)]
        return InfeasibleError(
            f"no feasible trial measured every objective: {', '.join(missing)} is missing; nothing was promoted",
            location="search.objectives",
            hint="Enable a probe that measures it, or remove the objective",
        )
    counts = Counter(metric for trial in snapshot.trials for metric in (*trial.exceeded, *trial.unmeasured))
    disturbed, total = sum(trial.is_disturbed for trial in snapshot.trials), len(snapshot.trials)
    causes = [f"{count} of {total} do not satisfy {metric}" for metric, count in counts.most_common(1)]
    causes += [f"{disturbed} of {total} were disturbed by other processes"] if disturbed else []
    hint = "Search longer, add smaller recipes, or set wider limits"
    if disturbed > total / 2:
        hint = "Stop other programs and search again under another name: search.study=NAME"
    cause = f": {', '.join(causes)}" if causes else ""
    return InfeasibleError(
        f"no trial satisfies every limit{cause}; nothing was promoted", location=f"study {snapshot.study}", hint=hint
    )
