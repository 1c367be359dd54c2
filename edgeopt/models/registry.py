"""The float checkpoint of a model in the MLflow registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgeopt.errors import ConfigError, InputError, TrackingError

ANSWER_S = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """`uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION` of a model in Hugging Face layout."""

    uri: str

    def __post_init__(self) -> None:
        if not self.uri.startswith("models:/"):
            raise ConfigError(
                f"{self.uri!r} is not a registry URI",
                place="uri",
                mend="Give models:/NAME@ALIAS or models:/NAME/VERSION",
            )

    def locate(self) -> Path:
        import mlflow
        from mlflow.exceptions import MlflowException

        _require_answer(mlflow.get_registry_uri())
        try:
            folder = Path(mlflow.artifacts.download_artifacts(self.uri))
        except MlflowException as error:
            raise InputError(
                f"{self.uri} cannot be fetched ({error.message})",
                place="model.uri",
                mend="Check name, version or alias, and MLFLOW_TRACKING_URI",
            ) from error
        holders = [p.parent for p in sorted(folder.rglob("config.json")) if list(p.parent.glob("*.safetensors"))]
        if not holders:
            raise InputError(
                f"{self.uri} holds no config.json with safetensors",
                place="model.uri",
                mend="Register the model's Hugging Face folder, not an engine",
            )
        return holders[0]


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
            place=urlsplit(uri).netloc.rpartition("@")[2],
            mend="Start the server, or set MLFLOW_TRACKING_URI to one that answers",
        ) from error
