"""Use the float checkpoint of a model in the MLflow registry."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edgeopt.errors import ConfigError, InputError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

TIMEOUT_S = 8
"""Timeout of the request that checks if a registry server answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """Registered model in Hugging Face layout. `uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""

    uri: str

    def __post_init__(self) -> None:
        if not self.uri.startswith("models:/"):
            raise ConfigError(
                f"`uri` must have the form models:/NAME@ALIAS or models:/NAME/VERSION, got {self.uri!r}",
                location="uri",
            )

    def locate(self) -> Path:
        """Return the folder with the model's files. Remote models are downloaded into the user's cache.

        Raises:
            InputError: the version does not exist, or it contains no model in Hugging Face layout.
            TrackingError: the registry does not answer.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        _require_reachable(mlflow.get_registry_uri())
        try:
            folder = self._fetch()
        except MlflowException as error:
            raise InputError(
                f"cannot load {self.uri} from the registry ({error.message})",
                location="model.uri",
                hint="Check the name, the version or alias, and MLFLOW_TRACKING_URI",
            ) from error
        models = [p.parent for p in sorted(folder.rglob("config.json")) if list(p.parent.glob("*.safetensors"))]
        if not models:
            raise InputError(
                f"{self.uri} must contain a config.json with safetensors",
                location="model.uri",
                hint="Register the model's Hugging Face folder, not an engine",
            )
        return models[0]

    def _fetch(self) -> Path:
        """Return the folder of the version. A version in a remote store is downloaded into the user's cache once."""
        from mlflow import MlflowClient
        from mlflow.artifacts import download_artifacts

        client = MlflowClient()
        name, version = _name_and_version(self.uri, client)
        source = client.get_model_version_download_uri(name, version)
        if urlsplit(source).scheme in ("", "file"):
            return Path(download_artifacts(artifact_uri=source))
        copy = _cache_folder() / sha256(f"{source} {name} {version}".encode()).hexdigest()
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=copy.parent) as temporary:
                download = Path(temporary) / "model"
                download.mkdir()
                download_artifacts(artifact_uri=f"models:/{name}/{version}", dst_path=str(download))
                try:
                    download.rename(copy)
                except OSError:
                    if not copy.is_dir():  # another process may have created it first
                        raise
        return copy


def _name_and_version(uri: str, client: MlflowClient) -> tuple[str, str]:
    path = uri.removeprefix("models:/")
    if "@" in path:
        name, _, alias = path.rpartition("@")
        return name, str(client.get_model_version_by_alias(name, alias).version)
    name, _, version = path.rpartition("/")
    return name, version


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeopt" / "models"


def _require_reachable(uri: str) -> None:
    """Raise TrackingError if a registry server does not answer. MLflow's own client would retry for minutes."""
    import requests

    if not uri.startswith(("http://", "https://")):
        return
    try:
        requests.head(uri, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise TrackingError(
            f"the registry does not answer ({type(error).__name__})",
            location=urlsplit(uri).netloc.rpartition("@")[2],
            hint="Start the server, or set MLFLOW_TRACKING_URI to a running server",
        ) from error
