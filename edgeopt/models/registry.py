"""The float checkpoint of a model in the MLflow registry."""

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

ANSWER_S = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """`uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION` of a model in Hugging Face layout."""

    uri: str

    def __post_init__(self) -> None:
        if not self.uri.startswith("models:/"):
            raise ConfigError(
                f"{self.uri!r} is not a registry URI",
                location="uri",
                hint="Give models:/NAME@ALIAS or models:/NAME/VERSION",
            )

    def locate(self) -> Path:
        import mlflow
        from mlflow.exceptions import MlflowException

        _require_answer(mlflow.get_registry_uri())
        try:
            folder = self._fetched()
        except MlflowException as error:
            raise InputError(
                f"{self.uri} cannot be fetched ({error.message})",
                location="model.uri",
                hint="Check name, version or alias, and MLFLOW_TRACKING_URI",
            ) from error
        holders = [p.parent for p in sorted(folder.rglob("config.json")) if list(p.parent.glob("*.safetensors"))]
        if not holders:
            raise InputError(
                f"{self.uri} holds no config.json with safetensors",
                location="model.uri",
                hint="Register the model's Hugging Face folder, not an engine",
            )
        return holders[0]

    def _fetched(self) -> Path:
        """The version's folder: where it lies, or a copy of a remote one, downloaded once a user."""
        from mlflow import MlflowClient
        from mlflow.artifacts import download_artifacts

        client = MlflowClient()
        name, version = _name_and_version(self.uri, client)
        source = client.get_model_version_download_uri(name, version)
        if urlsplit(source).scheme in ("", "file"):
            return Path(download_artifacts(artifact_uri=source))
        copy = _cache() / sha256(f"{source} {name} {version}".encode()).hexdigest()
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=copy.parent) as draft:
                made = Path(draft) / "model"
                made.mkdir()
                download_artifacts(artifact_uri=f"models:/{name}/{version}", dst_path=str(made))
                try:
                    made.rename(copy)
                except OSError:
                    if not copy.is_dir():  # else another process was faster
                        raise
        return copy


def _name_and_version(uri: str, client: MlflowClient) -> tuple[str, str]:
    path = uri.removeprefix("models:/")
    if "@" in path:
        name, _, alias = path.rpartition("@")
        return name, str(client.get_model_version_by_alias(name, alias).version)
    name, _, version = path.rpartition("/")
    return name, version


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeopt" / "models"


def _require_answer(uri: str) -> None:
    """TrackingError within seconds where no server is; MLflow's own client tries for minutes."""
    import requests

    if not uri.startswith(("http://", "https://")):
        return
    try:
        requests.head(uri, timeout=ANSWER_S)
    except requests.RequestException as error:
        raise TrackingError(
            f"the registry does not answer ({type(error).__name__})",
            location=urlsplit(uri).netloc.rpartition("@")[2],
            hint="Start the server, or set MLFLOW_TRACKING_URI to one that answers",
        ) from error
