from __future__ import annotations

import json
import math
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support import samples

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.result import Failure, Measurement
from edgeopt.errors import ConfigError, TrackingError
from edgeopt.tracking import server
from edgeopt.tracking.recorder import MlflowRecorder

CONFIG = {"model": {"_target_": "edgeopt.models.reference.Reference"}, "steps": [{"bits": 4}], "note": "x" * 7000}
PARAMS = {"step.quantize.bits": 4}


def client(recorder: MlflowRecorder) -> MlflowClient:
    return MlflowClient(tracking_uri=recorder.uri)


def runs_of(recorder: MlflowRecorder, study: str) -> list[Run]:
    api = client(recorder)
    experiment = api.get_experiment_by_name(recorder.experiment)
    return list(api.search_runs([experiment.experiment_id], f"tags.`{tags.STUDY}` = '{study}'"))


def trial_run(recorder: MlflowRecorder, study: str, number: int = 0) -> Run:
    (found,) = [r for r in runs_of(recorder, study) if r.data.tags.get(tags.TRIAL) == f"{study}/{number}"]
    return found


def artifact(recorder: MlflowRecorder, run_id: str, path: str) -> str:
    uri = f"runs:/{run_id}/{path}"
    return Path(mlflow.artifacts.download_artifacts(uri, tracking_uri=recorder.uri)).read_text()


def test_trial_is_logged_completely(recorder: MlflowRecorder, study: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.json").write_text("[1]")
    (tmp_path / "build.txt").write_text("built")
    outcome = samples.result(
        samples.engine(tmp_path / "engine"),
        artifacts={"measurements": str(tmp_path / "raw"), "logs/build.log": str(tmp_path / "build.txt")},
    )
    started = recorder.begin(study, 0, PARAMS, CONFIG)
    known = client(recorder).get_run(started).data.params
    assert (known["step.quantize.bits"], known["steps.0.bits"]) == ("4", "4"), "while the trial runs"
    run_id = recorder.record(study, 0, PARAMS, CONFIG, outcome)
    run = trial_run(recorder, study)
    assert started == run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["step.quantize.bits"] == "4"
    assert run.data.params["steps.0.bits"] == "4"
    assert len(run.data.params["note"]) == 6000
    assert run.data.tags[tags.TRUNCATED_PARAMS] == "note"
    assert run.data.metrics["feasible"] == 1
    assert run.data.metrics["latency/decode_p50_ms"] == 0.7
    assert run.data.metrics["excess/memory/peak_rss_mib"] == pytest.approx(70 / 90 - 1)
    assert run.data.metrics["time/build_s"] == 1.5
    assert run.data.tags[tags.RECIPE_DIGEST] == "d1ge57"
    assert run.data.tags[tags.EMULATED] == "true"
    assert run.data.tags[tags.VERSION_PREFIX + "mlflow"] == mlflow.__version__
    assert "sbc_4gib" in run.data.tags["mlflow.note.content"]
    assert artifact(recorder, run_id, "measurements/a.json") == "[1]"
    assert artifact(recorder, run_id, "logs/build.log") == "built"
    assert "x" * 7000 in artifact(recorder, run_id, "config.yaml").replace("\n", "").replace(" ", "")
    assert json.loads(artifact(recorder, run_id, "result.json"))["recipe"]["digest"] == "d1ge57"
    parent = client(recorder).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags[tags.STUDY] == study
    assert parent.info.status == "RUNNING"


def test_recording_again_changes_nothing(recorder: MlflowRecorder, study: str, tmp_path: Path) -> None:
    outcome = samples.result(samples.engine(tmp_path / "engine"))
    first = recorder.record(study, 0, PARAMS, CONFIG, outcome)
    before = trial_run(recorder, study)
    assert recorder.begin(study, 0, PARAMS, CONFIG) == first
    assert recorder.record(study, 0, PARAMS, CONFIG, samples.result(decode_ms=0.1)) == first
    after = trial_run(recorder, study)
    assert after.data.metrics == before.data.metrics
    assert after.info.end_time == before.info.end_time


WRITES = (
    "create_run",
    "log_batch",
    "log_artifact",
    "log_artifacts",
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "log_inputs",
    "update_run",
    "set_terminated",
    "log_text",
    "set_tag",
)


class Killed(BaseException):
    """Simulated SIGKILL, which nothing in edgeopt catches."""


def killed_client(after: int) -> type[MlflowClient]:
    """Return a client class that raises Killed after `after` writes."""
    remaining = [after]

    class KilledClient(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            if name in WRITES:
                remaining[0] -= 1
                if remaining[0] < 0:
                    raise Killed
            return super().__getattribute__(name)

    return KilledClient


def test_kill_between_writes_loses_nothing(
    recorder: MlflowRecorder, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = client(recorder)
    for number in range(40):
        seed = zlib.crc32(f"{study} {number}".encode())  # equal engines would share a logged model
        outcome = samples.result(samples.engine(tmp_path / f"engine{number}", seed=seed))
        with monkeypatch.context() as patch:
            patch.setattr(server, "MlflowClient", killed_client(number))
            try:
                recorder.record(study, number, PARAMS, CONFIG, outcome)
                survived = True
            except Killed:
                survived = False
        if not survived:
            recorder.record(study, number, PARAMS, CONFIG, outcome)
        run = trial_run(recorder, study, number)
        models = api.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        assert run.info.status == "FINISHED"
        assert [str(m.status) for m in models] == ["READY"]
        assert [o.model_id for o in run.outputs.model_outputs] == [models[0].model_id]
        assert len(run.data.params) == 4
        for name in ("feasible", "latency/decode_p50_ms"):
            assert len(api.get_metric_history(run.info.run_id, name)) == 1
        if survived:
            break
    assert survived
    assert number > 5
    assert recorder.open_runs(study) == {}


def test_metric_logged_twice_is_stored_once(
    recorder: MlflowRecorder, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed after logging metrics and before ending the run."""
    outcome = samples.result(samples.engine(tmp_path / "engine"))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            recorder.record(study, 0, PARAMS, CONFIG, outcome)
    assert trial_run(recorder, study).info.status == "RUNNING"
    recorder.record(study, 0, PARAMS, CONFIG, outcome)
    run = trial_run(recorder, study)
    assert [len(client(recorder).get_metric_history(run.info.run_id, name)) for name in run.data.metrics] == [1] * len(
        run.data.metrics
    )


def test_failed_trial_records_its_cause(recorder: MlflowRecorder, study: str) -> None:
    failure = Failure(stage="build", kind="BuildError", message="out of memory")
    run_id = recorder.record(study, 0, PARAMS, CONFIG, samples.result(failure=failure))
    run = trial_run(recorder, study)
    assert run.info.status == "FAILED"
    assert run.data.metrics["feasible"] == 0
    assert run.data.tags[tags.FAILURE] == "build: BuildError: out of memory"
    assert "out of memory" in artifact(recorder, run_id, "failure.txt")


def test_infeasible_trial_has_no_engine(recorder: MlflowRecorder, study: str, tmp_path: Path) -> None:
    outcome = samples.result(samples.engine(tmp_path / "engine"), decode_ms=5.0)
    recorder.record(study, 0, PARAMS, CONFIG, outcome)
    run = trial_run(recorder, study)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["feasible"] == 0
    assert run.data.metrics["excess/latency/decode_p50_ms"] > 3
    assert not run.outputs.model_outputs


def test_infinite_metrics_are_named_not_logged(recorder: MlflowRecorder, study: str) -> None:
    odd = samples.result(decode_ms=5.0, ratio=math.inf)
    run_id = recorder.record(study, 0, PARAMS, CONFIG, odd)
    run = trial_run(recorder, study)
    assert "quality/perplexity_ratio" not in run.data.metrics
    assert "quality/perplexity_ratio" in run.data.tags[tags.NOT_LOGGED]
    stored = json.loads(artifact(recorder, run_id, "result.json"))
    assert next(Measurement(**m).value for m in stored["measurements"]) == "inf"


def test_killed_trial_repeats_in_a_new_run(recorder: MlflowRecorder, study: str) -> None:
    lost = recorder.begin(study, 0, PARAMS, CONFIG)
    assert recorder.begin(study, 0, PARAMS, CONFIG) == lost
    assert recorder.open_runs(study) == {(0, 1): lost}
    recorder.kill(study, 0, "another attempt", attempt=2)
    assert recorder.open_runs(study) == {(0, 1): lost}
    recorder.kill(study, 0, "the sweep was ended")
    recorder.kill(study, 0, "again")
    assert client(recorder).get_run(lost).info.status == "KILLED"
    assert client(recorder).get_run(lost).data.tags[tags.FAILURE] == "the sweep was ended"
    assert recorder.runs(study) == {0: lost}
    assert recorder.record(study, 0, PARAMS, CONFIG, samples.result(), attempt=1) == lost, "it has ended"
    assert client(recorder).get_run(lost).info.status == "KILLED"
    again = recorder.begin(study, 0, PARAMS, CONFIG, attempt=2)
    assert recorder.open_runs(study) == {(0, 2): again}
    assert recorder.record(study, 0, PARAMS, CONFIG, samples.result(decode_ms=5.0), attempt=2) == again != lost
    assert recorder.runs(study) == {0: again}
    assert recorder.open_runs(study) == {}


def test_resumed_study_reuses_its_run(recorder: MlflowRecorder, study: str) -> None:
    first = recorder.open_study(study, {"a": 1}, {"edgeopt.target": "sbc"})
    run_id = recorder.record(study, 3, PARAMS, CONFIG, samples.result(decode_ms=0.7))
    snapshot = samples.snapshot([samples.trial(3, samples.result(decode_ms=0.7), run_id, 1)], study=study)
    assert recorder.close_study(snapshot, status="KILLED") == first
    assert client(recorder).get_run(first).info.status == "KILLED"
    assert recorder.open_study(study, {"a": 2}, {}) == first
    assert client(recorder).get_run(first).info.status == "RUNNING"
    recorder.close_study(snapshot, status="FINISHED")
    recorder.close_study(snapshot, status="FINISHED")
    parent = client(recorder).get_run(first)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials_feasible"] == 1
    assert parent.data.metrics["best/latency/decode_p50_ms"] == 0.7
    assert len(client(recorder).get_metric_history(first, "trials")) == 1
    assert [m.value for m in client(recorder).get_metric_history(run_id, "pareto_rank")] == [1]
    assert "a: 2" in artifact(recorder, first, "config.yaml")
    names = {f.path for f in client(recorder).list_artifacts(first, "front")}
    assert names == {f"front/{name}" for name in ("front.html", "front.png", "front.pdf", "front.csv", "trials.json")}
    assert recorder.latest_study() == study


def test_run_name_shows_searched_parameters(recorder: MlflowRecorder, study: str) -> None:
    params = {"step.quantize.block_size": 64, "recipe": "int4"}
    searched = recorder.record(study, 0, params, CONFIG, samples.result())
    single = recorder.record(study, 1, {}, CONFIG, samples.result())
    assert client(recorder).get_run(searched).info.run_name == "0 · int4 block_size=64"
    assert client(recorder).get_run(single).info.run_name == f"1 · {samples.result().recipe['text']}"


def test_new_rank_replaces_old_rank(recorder: MlflowRecorder, study: str) -> None:
    run_id = recorder.record(study, 0, PARAMS, CONFIG, samples.result())
    for rank in (1, 2):
        trials = [samples.trial(0, samples.result(), run_id, rank)]
        recorder.close_study(samples.snapshot(trials, study=study), status="FINISHED")
    assert client(recorder).get_run(run_id).data.metrics["pareto_rank"] == 2


def test_links_lead_to_the_study(recorder: MlflowRecorder, study: str) -> None:
    links = recorder.study_links(study)
    run_id = recorder.open_study(study, {}, {})
    served = recorder.uri.startswith("http")
    assert links.command == ("" if served else f"edgeopt ui --tracking-uri {recorder.uri}")
    assert links.path.startswith("/#/experiments/")
    assert links.path.endswith(f"/runs/{run_id}?workflowType=machine_learning")
    assert links.url == (recorder.uri if served else "http://127.0.0.1:5000") + links.path
    assert f"/runs/{run_id}/artifacts/front/front.html?" in links.front_url


def test_artifacts_are_stored_beside_the_database(tmp_path: Path) -> None:
    recorder = MlflowRecorder(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    recorder.connect()
    experiment = client(recorder).get_experiment_by_name(recorder.experiment)
    assert Path(experiment.artifact_location).is_relative_to(tmp_path)


def test_refused_connection_is_reported_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"http://user:\*\*\*@127\.0\.0\.1:9.*does not answer.*MLFLOW_TRACKING_URI"):
        MlflowRecorder(tracking_uri="http://user:secret@127.0.0.1:9").connect()
    assert time.monotonic() - started < 10


def test_silent_server_is_reported_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PROBE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer"):
            MlflowRecorder(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}").connect()
        assert time.monotonic() - started < 5


def test_invalid_database_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database " * 100)
    started = time.monotonic()
    with pytest.raises(TrackingError, match="not a database"):
        MlflowRecorder(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").connect()
    assert time.monotonic() - started < 10


def test_unopened_study_is_reported(recorder: MlflowRecorder) -> None:
    with pytest.raises(TrackingError, match="study 'nowhere' has no run"):
        recorder.begin("nowhere", 0, {}, {})


def test_study_name_with_quotes_is_rejected(recorder: MlflowRecorder) -> None:
    with pytest.raises(ConfigError, match="must not be empty or contain quotes"):
        recorder.open_study("it's", {}, {})


def test_package_does_not_import_mlflow() -> None:
    import subprocess
    import sys

    code = "import sys, edgeopt.tracking, edgeopt.release; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
