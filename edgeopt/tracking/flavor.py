"""The MLflow model flavor of engines: the engine's folder, loaded as a text generator.

    mlflow.pyfunc.load_model("models:/edgeopt@champion").predict(["def f("])

gives one completion for each prompt, in any process that has edgeopt installed. Every file is
compared with the manifest before it is loaded.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.models.utils import _save_example
from mlflow.pyfunc import add_to_model
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.environment import _mlflow_conda_env, _PythonEnv

import edgeopt
from edgeopt.checkpoints import tokenizer
from edgeopt.core import config_objects, library_versions
from edgeopt.core.artifact import Engine
from edgeopt.core.mlflow_tags import ENGINE_MODEL_NAME, FLAVOR
from edgeopt.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

FLAVOR_NAME = FLAVOR
MAX_NEW_TOKENS = 64
INPUT_EXAMPLE = ["def fibonacci(n):"]
# the column has no name, because MLflow refuses a plain list of prompts where it has one
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "integer", MAX_NEW_TOKENS), ParamSpec("adapter", "string", "")]),
)
_DATA = "engine"
_CONDA, _PYTHON, _REQUIREMENTS = "conda.yaml", "python_env.yaml", "requirements.txt"


def save_model(engine_dir: str | Path, path: str | Path, mlflow_model: Model | None = None) -> None:
    """Write the engine in `engine_dir` as an MLflow model into the new folder `path`.

    Raises InputError where the engine is not what its manifest says.
    """
    engine = Engine.read(Path(engine_dir))
    engine.verify()
    folder = Path(path)
    folder.mkdir(parents=True)
    shutil.copytree(engine.directory, folder / _DATA)
    model = mlflow_model or Model()
    model.signature = SIGNATURE
    _save_example(model, INPUT_EXAMPLE, str(folder))
    add_to_model(
        model, loader_module=__name__, data=_DATA, conda_env=_CONDA, python_env=_PYTHON, model_config={"threads": 0}
    )
    model.add_flavor(
        FLAVOR_NAME, data=_DATA, engine_digest=engine.digest, format=engine.format, edgeopt_version=edgeopt.__version__
    )
    model.model_size_bytes = engine.size_bytes
    model.save(str(folder / MLMODEL_FILE_NAME))
    requirements = pip_requirements(engine)
    (folder / _REQUIREMENTS).write_text("\n".join(requirements) + "\n")
    conda: Any = _mlflow_conda_env(additional_pip_deps=requirements, install_mlflow=False)
    (folder / _CONDA).write_text(yaml.safe_dump(conda))
    _PythonEnv.current().to_yaml(str(folder / _PYTHON))


def log_model(
    engine_dir: str | Path, name: str = ENGINE_MODEL_NAME, *, registered_model_name: str | None = None
) -> ModelInfo:
    """Log an engine with the active MLflow run, as the `log_model` of any flavor does."""
    logged: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        registered_model_name=registered_model_name,
        engine_dir=engine_dir,
    )
    return logged


def upload(client: MlflowClient, model: LoggedModel, engine_dir: Path, *, run_id: str) -> None:
    """Fill the logged model `model` with an engine and mark it READY; what an earlier attempt left is overwritten."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        description = Model(
            artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
        )
        save_model(engine_dir, folder, description)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")


def load_model(model_uri: str, dst_path: str | None = None) -> Generator:
    """The generator of a logged or registered engine. Raises InputError where a file was changed."""
    return _load_pyfunc(str(engine_folder(Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=dst_path)))))


def engine_folder(model_folder: Path) -> Path:
    """The engine inside a downloaded MLflow model. Raises InputError where the model has another flavor."""
    flavors = Model.load(str(model_folder)).flavors
    if FLAVOR_NAME not in flavors:
        raise InputError(
            f"the model is no edgeopt engine (its flavors: {', '.join(flavors)})",
            location=str(model_folder),
            hint="Name a model that edgeopt promote registered",
        )
    return model_folder / str(flavors[FLAVOR_NAME]["data"])


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Generator:
    """Called by `mlflow.pyfunc.load_model` with the engine's folder."""
    return Generator(Path(path), threads=int((model_config or {}).get("threads", 0)))


def pip_requirements(engine: Engine) -> list[str]:
    """edgeopt, MLflow and the libraries that the engine's runtime names, in the versions that built it."""
    runtime = config_objects.resolve(engine.made_by["runtime"]["_target_"], "made_by.runtime")
    built_with: Mapping[str, str] = engine.made_by.get("versions", {})
    names = ["mlflow", *map(library_versions.distribution, runtime.LIBRARIES)]
    versions = {name: built_with.get(name) or metadata.version(name) for name in names}
    # a local version such as 2.13.0+cpu is on no package index
    return [f"edgeopt=={edgeopt.__version__}", *(f"{name}=={v.split('+')[0]}" for name, v in versions.items())]


class Generator:
    """A verified and opened engine that completes text greedily."""

    def __init__(self, directory: Path, *, threads: int = 0) -> None:
        self.engine = Engine.read(directory)
        self.engine.verify()
        self._tokenizer = tokenizer.load(directory)
        self._prefix = tokenizer.prefix_ids(directory)
        runtime = config_objects.instantiate(self.engine.made_by["runtime"], location="made_by.runtime")
        self._session = runtime.open(self.engine, threads=threads or len(os.sched_getaffinity(0)))

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """One completion, without its prompt, for each prompt.

        Args:
            model_input: prompts: one, a list, or a pandas DataFrame whose one column holds them (`prompt`).
            params: `max_new_tokens`, and `adapter`, the name of one that the engine has; "" for none.
        """
        chosen = {"max_new_tokens": MAX_NEW_TOKENS, "adapter": "", **(params or {})}
        limit, adapter = int(chosen["max_new_tokens"]), chosen["adapter"] or None
        return [self.complete(prompt, limit, adapter) for prompt in prompts(model_input)]

    def complete(self, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS, adapter: str | None = None) -> str:
        """The greedy continuation of `prompt`, cut where the model's context ends."""
        ids = self._prefix + self._tokenizer.encode(prompt, add_special_tokens=False).ids
        room = self.engine.spec.context_length - len(ids)
        if not ids or room < 1:
            raise InputError(
                f"a prompt of {len(ids)} tokens cannot be continued",
                location=prompt[:40],
                hint=f"Give 1 to {self.engine.spec.context_length - 1} tokens",
            )
        new = self._session.generate(ids, min(max_new_tokens, room), adapter=adapter)
        return str(self._tokenizer.decode(list(new)))


def prompts(model_input: Any) -> list[str]:
    """The prompts in what MLflow hands a model: one text, a list, or a table of one column."""
    if isinstance(model_input, str):
        return [model_input]
    columns = getattr(model_input, "columns", None)
    if columns is not None:
        if list(columns) not in (["prompt"], [0]):
            raise InputError(
                f"the columns are {', '.join(map(str, columns))}",
                location="model_input",
                hint="Give one column, named prompt",
            )
        return [str(value) for value in model_input.iloc[:, 0]]
    return [str(value) for value in model_input]
