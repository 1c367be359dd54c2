"""Contract suite of `ModelSource`, for every implementation that needs no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeopt.checkpoints import importing
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.config_objects import instantiate, to_config
from edgeopt.core.protocols import ModelSource
from edgeopt.errors import ConfigError, InputError
from edgeopt.models.hub import HubModel
from edgeopt.models.local import LocalFolder
from edgeopt.models.reference import ReferenceModel
from edgeopt.models.registry import RegisteredModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def hub_cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a hub cache that contains the tiny model."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--tiny--llama"
    shutil.copytree(tiny_model, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return cache


@pytest.fixture(scope="session")
def registry(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of an MLflow store with `tiny` (version 1, alias `champion`) and `empty` (without weights)."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    shutil.copytree(tiny_model, folder / "logged" / "model")
    (folder / "nothing").mkdir()
    (folder / "nothing" / "MLmodel").write_text("flavors: {}\n")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    for name, source in (("tiny", folder / "logged"), ("empty", folder / "nothing")):
        client.create_registered_model(name)
        client.create_model_version(name, source=source.as_uri())
    client.set_registered_model_alias("tiny", "champion", "1")
    return uri


@pytest.fixture
def mlflow_store(registry: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(registry)


@pytest.fixture
def served_model(
    mlflow_server: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RegisteredModel:
    """Return the tiny model after uploading it to a server and registering it there."""
    import mlflow

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mlflow.set_tracking_uri(mlflow_server)
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment(str(tmp_path)))
    client.log_artifacts(run.info.run_id, str(tiny_model), "model")
    if not client.search_registered_models("name = 'served'"):
        client.create_registered_model("served")
    version = client.create_model_version("served", source=f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
    return RegisteredModel(uri=f"models:/served/{version.version}")


@pytest.fixture(
    params=["local", "reference", "hub", "hub commit", "registry alias", "registry version", "registry server"]
)
def source(request: pytest.FixtureRequest, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    kind = request.param
    if kind == "registry server":
        served: ModelSource = request.getfixturevalue("served_model")
        return served
    if kind.startswith("registry"):
        request.getfixturevalue("mlflow_store")
        return RegisteredModel(uri="models:/tiny@champion" if kind.endswith("alias") else "models:/tiny/1")
    if kind.startswith("hub"):
        go_offline(monkeypatch, request.getfixturevalue("hub_cache"))
        return HubModel(repo="tiny/llama", revision=COMMIT if kind.endswith("commit") else "main")
    return LocalFolder(path=str(tiny_model)) if kind == "local" else ReferenceModel()


def go_offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


class TestEveryModelSource:
    def test_source_returns_hugging_face_folder(self, source: ModelSource) -> None:
        folder = source.locate()
        assert folder.is_absolute()
        assert (folder / "config.json").is_file()
        assert (folder / "tokenizer.json").is_file()
        assert list(folder.glob("*.safetensors"))

    def test_model_is_imported(self, source: ModelSource, tmp_path: Path) -> None:
        (tmp_path / "into").mkdir()
        checkpoint = importing.import_checkpoint(source.locate(), tmp_path / "into")
        checkpoint.verify()
        assert Checkpoint.read(tmp_path / "into").digest == checkpoint.digest

    def test_second_call_returns_same_model(self, source: ModelSource, tmp_path: Path) -> None:
        digests = set()
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            digests.add(importing.import_checkpoint(source.locate(), tmp_path / name).digest)
        assert len(digests) == 1

    def test_fingerprint_is_stable(self, source: ModelSource) -> None:
        assert importing.fingerprint(source.locate()) == importing.fingerprint(source.locate())

    def test_config_round_trip_preserves_source(self, source: ModelSource) -> None:
        assert instantiate(json.loads(json.dumps(to_config(source)))) == source


def test_all_sources_give_one_digest(
    tiny_model: Path, hub_cache: Path, mlflow_store: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go_offline(monkeypatch, hub_cache)
    sources: list[ModelSource] = [
        LocalFolder(path=str(tiny_model)),
        HubModel(repo="tiny/llama", revision="main"),
        RegisteredModel(uri="models:/tiny/1"),
    ]
    digests = set()
    for number, source in enumerate(sources):
        (tmp_path / str(number)).mkdir()
        digests.add(importing.import_checkpoint(source.locate(), tmp_path / str(number)).digest)
    assert len(digests) == 1


def test_bundled_model_covers_its_tokenizer() -> None:
    from edgeopt.checkpoints import tokenizer

    folder = ReferenceModel().locate()
    assert tokenizer.load(folder).get_vocab_size() <= importing.spec_of(folder).vocabulary_size


@pytest.mark.parametrize("path", ["absent", "file", ""])
def test_missing_local_folder_is_rejected(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"model\.path="):
        LocalFolder(path=str(tmp_path / path) if path else "/nowhere/at/all").locate()


def test_home_folder_is_expanded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert LocalFolder(path=f"~/{tiny_model.name}").locate() == tiny_model.resolve()


@pytest.mark.parametrize(("repo", "revision"), [("tiny/absent", "main"), ("tiny/llama", "v9"), ("tiny/ll ama", "main")])
def test_unavailable_hub_model_is_rejected(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, repo: str, revision: str
) -> None:
    go_offline(monkeypatch, hub_cache)
    with pytest.raises(InputError, match=rf"model\.repo: cannot download {repo} at revision {revision}") as caught:
        HubModel(repo=repo, revision=revision).locate()
    assert "model=local" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["models:/absent/1", "models:/tiny/9", "models:/tiny@nobody", "models:/empty/1", "models:/"]
)
def test_unavailable_registered_model_is_rejected(mlflow_store: None, uri: str) -> None:
    with pytest.raises(InputError, match=r"model\.uri: ") as caught:
        RegisteredModel(uri=uri).locate()
    assert uri in str(caught.value)


@pytest.mark.parametrize(
    ("make", "values", "location"),
    [
        (HubModel, {"repo": "llama", "revision": "main"}, "repo"),
        (HubModel, {"repo": "a/b/c", "revision": "main"}, "repo"),
        (RegisteredModel, {"uri": "tiny/1"}, "uri"),
        (RegisteredModel, {"uri": "runs:/abc/model"}, "uri"),
    ],
)
def test_malformed_name_raises_config_error(make: Callable[..., Any], values: dict[str, str], location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**values)
    assert caught.value.location == location
