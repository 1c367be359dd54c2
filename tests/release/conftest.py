from __future__ import annotations

import zlib
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

FRONT_VALUES = ((0.9, 1.01, 85.0), (0.7, 1.05, 75.0), (0.5, 1.12, 65.0))
"""Decode latency in ms, perplexity ratio and peak RSS in MiB of the three trials on the front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStudy:
    """A finished study in a store, with the arguments for promoting it."""

    uri: str
    trials: list[TrialSnapshot]
    policy: Policy

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    def arguments(
        self, *, trials: Sequence[TrialSnapshot] | None = None, study: str = "s", **overrides: Any
    ) -> dict[str, Any]:
        arguments = {
            "snapshot": samples.snapshot(self.trials if trials is None else trials, study=study),
            "policy": self.policy,
            "tracking_uri": self.uri,
        }
        return arguments | overrides

    def versions(self) -> list[Any]:
        versions = self.client.search_model_versions(f"name = '{self.policy.model}'")
        return sorted(versions, key=lambda version: int(version.version))

    def damage(self, version: Any) -> None:
        """Overwrite a file of a version's engine in the store."""
        with registry.connect(self.uri):
            folder = registry.fetch_engine(version).directory
        (folder / "table.npy").write_bytes(b"other")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[TrialSnapshot]]:
    """Return a store with one study: three trials on the front, and one that exceeds a limit."""
    folder = tmp_path_factory.mktemp("store")
    recorder = MlflowRecorder(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    recorder.connect()
    recorder.open_study("s", {}, {})
    trials = []
    for number, (decode_ms, ratio, rss_mib) in enumerate((*FRONT_VALUES, (0.6, 1.5, 60.0))):
        engine = samples.engine(folder / f"engine{number}", seed=number)
        outcome = samples.result(engine, decode_ms=decode_ms, ratio=ratio, rss_mib=rss_mib)
        run_id = recorder.record("s", number, {"bits": 4}, {}, outcome)
        trials.append(samples.trial(number, outcome, run_id, 1 if outcome.feasible else None))
    return recorder.uri, trials


@pytest.fixture
def study(store: tuple[str, list[TrialSnapshot]], request: pytest.FixtureRequest) -> FinishedStudy:
    """Return the study in the store, with a registered model name that no other test uses."""
    name = request.node.name.replace("[", "-").replace("]", "")
    return FinishedStudy(uri=store[0], trials=store[1], policy=replace(policy.load(), model=name))


@pytest.fixture
def damageable_trial(study: FinishedStudy, tmp_path: Path) -> TrialSnapshot:
    """Return a recorded, feasible trial whose artifacts a test may damage."""
    recorder = MlflowRecorder(tracking_uri=study.uri)
    name = study.policy.model
    recorder.open_study(name, {}, {})
    unique_seed = zlib.crc32(name.encode())  # equal engines would share their artifacts
    outcome = samples.result(samples.engine(tmp_path / "engine", seed=unique_seed))
    return samples.trial(0, outcome, recorder.record(name, 0, {}, {}, outcome), 1)
