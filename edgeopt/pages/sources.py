"""What the pages show, read from an MLflow server by its stock interface."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import TrialResult
from edgeopt.core.study_snapshot import Champion, StudySnapshot
from edgeopt.errors import InputError
from edgeopt.release import overview
from edgeopt.release.ledger.hash_chain import SUFFIX
from edgeopt.release.registry import client as registry
from edgeopt.tracking import files, front, lookup, server

Table = Mapping[str, Any]
_NOTHING: Table = {"columns": [], "data": []}
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study's run with the snapshot that was published last.

    Attributes:
        hypervolumes: hypervolume of the front after each trial, from 0 to 1.
        released: names of registered models with a version from this study.
    """

    run: Run
    snapshot: StudySnapshot
    hypervolumes: tuple[float, ...] = ()
    released: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.run.data.tags[tags.STUDY])

    @property
    def live(self) -> bool:
        return bool(self.run.info.status == "RUNNING")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial's run with what it found out.

    Attributes:
        layers, generations: tables of the run; without rows where it has none.
    """

    run: Run
    result: TrialResult
    layers: Table
    generations: Table


@dataclass(frozen=True, slots=True)
class Source:
    """Raises UnreachableError where the server at `uri` does not answer, InputError for what it does not have."""

    uri: str

    def studies(self) -> list[Run]:
        """Runs of studies, the latest first."""
        with server.answering(self.uri) as client:
            return lookup.studies(client)

    def study(self, run_id: str) -> Study:
        with self._reading(run_id) as client:
            run = client.get_run(run_id)
            if run.data.tags.get(tags.ROLE) != "study":
                raise InputError(f"run {run_id} is no study", hint="Choose one from the list")
            name = str(run.data.tags[tags.STUDY])
            empty: Mapping[str, Any] = {"study": name, "objectives": [], "limits": [], "trials": []}
            document = StudySnapshot.from_json(_json(client, run_id, front.TRIALS, empty))
            history = client.get_metric_history(run_id, "progress/hypervolume")
            champions = _champions(client, name)
            return Study(
                run=run,
                snapshot=replace(document, champion=next(iter(champions), None)),
                hypervolumes=tuple(m.value for m in sorted(history, key=lambda m: m.step)),
                released=tuple(champion.name for champion in champions),
            )

    def trial(self, run_id: str) -> Trial:
        with self._reading(run_id) as client:
            run = client.get_run(run_id)
            result = _json(client, run_id, "result.json", {})
            if not result:
                raise InputError(f"run {run_id} holds no result", hint="Choose trials that have ended")
            return Trial(
                run=run,
                result=TrialResult.from_json(result),
                layers=_json(client, run_id, f"{files.TABLES}/layers.json", _NOTHING),
                generations=_json(client, run_id, f"{files.TABLES}/generations.json", _NOTHING),
            )

    def models(self) -> dict[str, dict[str, str]]:
        """Aliases of every model that was released by edgeopt, by its name."""
        with server.answering(self.uri) as client:
            known = {model.name: model for model in client.search_registered_models(max_results=1000)}
        released = sorted(name for name in known if f"{name}{SUFFIX}" in known)
        return {name: {a: str(v) for a, v in known[name].aliases.items()} for name in released}

    def release(self, name: str) -> dict[str, Any]:
        with server.answering(self.uri) as client:
            return overview.described(name, *(registry.registered(client, n) for n in (name, name + SUFFIX)))

    @contextmanager
    def _reading(self, run_id: str) -> Iterator[MlflowClient]:
        if not re.fullmatch(r"[0-9a-f]{32}", run_id):
            raise InputError(f"{run_id!r} is no id of a run", hint="Choose one from the list")
        with server.answering(self.uri) as client:
            try:
                yield client
            except MlflowException as error:
                if error.error_code not in _ABSENT:
                    raise
                raise InputError(f"there is no run {run_id}", hint="Choose one from the list") from error


def _champions(client: MlflowClient, study: str) -> list[Champion]:
    """Return the champions of all registered models whose champion comes from the study."""
    found = []
    for model in client.search_registered_models(max_results=1000):
        number = model.aliases.get("champion")
        if number is None or model.name.endswith(SUFFIX):
            continue
        labels = client.get_model_version(model.name, str(number)).tags
        if labels.get(tags.STUDY) == study:
            trial = labels.get(tags.TRIAL, "").rpartition("/")[2]
            found.append(Champion(name=model.name, version=str(number), trial=int(trial) if trial.isdigit() else None))
    return found


def _json(client: MlflowClient, run_id: str, path: str, absent: Mapping[str, Any]) -> Any:
    """A JSON artifact; `absent` where the run has none of this name."""
    folder = path.rpartition("/")[0]
    if path not in {file.path for file in client.list_artifacts(run_id, folder or None)}:
        return absent
    with TemporaryDirectory() as scratch:
        return json.loads(Path(client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8"))
