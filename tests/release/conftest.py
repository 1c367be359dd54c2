from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import samples

from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.release import policy
from edgeopt.release.policy import Policy
from edgeopt.release.registry import client as registry
from edgeopt.tracking.recorder import MlflowRecorder

FIGURES = ((0.9, 1.01, 85.0), (0.7, 1.05, 75.0), (0.5, 1.12, 65.0))
"""Decode in ms, perplexity ratio and peak RSS in MiB of three members of a front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """A store with a finished study, and what `promote` is called with."""

    uri: str
    rows: list[TrialSnapshot]
    policy: Policy

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    def arguments(
        self, *, rows: Sequence[TrialSnapshot] | None = None, study: str = "s", **changed: Any
    ) -> dict[str, Any]:
        known = {
            "snapshot": samples.snapshot(self.rows if rows is None else rows, study=study),
            "policy": self.policy,
            "tracking_uri": self.uri,
        }
        return known | changed

    def versions(self) -> list[Any]:
        found = self.client.search_model_versions(f"name = '{self.policy.model}'")
        return sorted(found, key=lambda version: int(version.version))

    def damage(self, version: Any) -> None:
        """Change a file of a version's engine where it lies in this store."""
        with registry.answering(self.uri):
            folder = registry.fetch(version).directory
        (folder / "table.npy").write_bytes(b"other")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[TrialSnapshot]]:
    """A store with one study: three members of the front, and one trial that breaks a limit."""
    folder = tmp_path_factory.mktemp("desk")
    recorder = MlflowRecorder(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    recorder.connect()
    recorder.open_study("s", {}, {})
    rows = []
    for number, (decode_ms, ratio, rss_mib) in enumerate((*FIGURES, (0.6, 1.5, 60.0))):
        built = samples.engine(folder / f"engine{number}", seed=number)
        outcome = samples.result(built, decode_ms=decode_ms, ratio=ratio, rss_mib=rss_mib)
        run_id = recorder.record("s", number, {"bits": 4}, {}, outcome)
        rows.append(samples.trial(number, outcome, run_id, 1 if outcome.feasible else None))
    return recorder.uri, rows


@pytest.fixture
def desk(store: tuple[str, list[TrialSnapshot]], request: pytest.FixtureRequest) -> Desk:
    """The store, with a registered model name that no other test uses."""
    name = request.node.name.replace("[", "-").replace("]", "")
    return Desk(uri=store[0], rows=store[1], policy=replace(policy.load(), model=name))


@pytest.fixture
def spare(desk: Desk, tmp_path: Path) -> TrialSnapshot:
    """The row of a recorded, feasible trial whose artifacts a test may damage."""
    recorder = MlflowRecorder(tracking_uri=desk.uri)
    study = desk.policy.model
    recorder.open_study(study, {}, {})
    unlike_others = 1000 + sum(map(ord, study))  # equal engines would share their artifacts
    outcome = samples.result(samples.engine(tmp_path / "engine", seed=unlike_others))
    return samples.trial(0, outcome, recorder.record(study, 0, {}, {}, outcome), 1)
