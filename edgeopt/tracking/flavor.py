"""Provide the MLflow model flavor of engines, which loads an engine as a text generator.

    mlflow.pyfunc.load_model("models:/edgeopt@champion").predict(["def f("])

returns one completion per prompt in any process that has edgeopt installed. Every file is checked against the manifest
before it is loaded.
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
# MLflow rejects a plain list of prompts if the column has a name
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "integer", MAX_NEW_TOKENS), ParamSpec("adapter", "string", "")]),
)
_DATA = "engine"
_CONDA, _PYTHON, _REQUIREMENTS = "conda.yaml", "python_env.yaml", "requirements.txt"


def save_model(engine_dir: str | Path, path: str | Path, mlflow_model: Model | None = None) -> None:
    """Write the engine in `engine_dir` as an MLflow model into the new folder `path`.

    Raises InputError if a file of the engine differs from its manifest.
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
    """Log an engine to the active MLflow run, like `log_model` of every flavor."""
    logged: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        registered_model_name=registered_model_name,
        engine_dir=engine_dir,
    )
    return logged


def upload(client: MlflowClient, model: LoggedModel, engine_dir: Path, *, run_id: str) -> None:
    """Upload an engine into the logged model `model` and mark it READY, overwriting files of an earlier attempt."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        description = Model(
            artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
        )
        save_model(engine_dir, folder, description)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")


def load_model(model_uri: str, dst_path: str | None = None) -> Generator:
    """Return the generator of a logged or registered engine. Raises InputError if a file was changed."""
    return _load_pyfunc(str(engine_folder(Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=dst_path)))))


def engine_folder(model_folder: Path) -> Path:
    """Return the folder of the engine in a downloaded model. Raises InputError if the model has another flavor."""
    flavors = Model.load(str(model_folder)).flavors
    if FLAVOR_NAME not in flavors:
        raise InputError(
            f"the model must have the flavor {FLAVOR_NAME}, got {', '.join(flavors) or 'no flavor'}",
            location=str(model_folder),
            hint="Name a model that edgeopt promote registered",
        )
    return model_folder / str(flavors[FLAVOR_NAME]["data"])


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Generator:
    """Load an engine; MLflow calls this function from `mlflow.pyfunc.load_model`."""
    return Generator(Path(path), threads=int((model_config or {}).get("threads", 0)))


def pip_requirements(engine: Engine) -> list[str]:
    """Return pinned requirements: edgeopt, MLflow and the libraries of the engine's runtime, as of its build."""
    runtime = config_objects.resolve(engine.runtime_config["_target_"], "made_by.runtime")
    names = ["mlflow", *map(library_versions.distribution, runtime.LIBRARIES)]
    versions = {name: engine.library_versions.get(name) or metadata.version(name) for name in names}
    # package indexes do not hold local versions such as 2.13.0+cpu
    return [f"edgeopt=={edgeopt.__version__}", *(f"{name}=={v.split('+')[0]}" for name, v in versions.items())]


class Generator:
    """An engine that is verified, opened and completes text greedily."""

    def __init__(self, directory: Path, *, threads: int = 0) -> None:
        self.engine = Engine.read(directory)
        self.engine.verify()
        self._tokenizer = tokenizer.load(directory)
        self._prefix = tokenizer.prefix_ids(directory)
        runtime = config_objects.instantiate(self.engine.runtime_config, location="made_by.runtime")
        self._session = runtime.open(self.engine, threads=threads or len(os.sched_getaffinity(0)))

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return one completion per prompt, without the prompt.

        Args:
            model_input: one prompt, a list of prompts, or a pandas DataFrame with the single column `prompt`.
            params: `max_new_tokens`, and `adapter`, the name of an adapter of the engine; "" selects none.
        """
        options = {"max_new_tokens": MAX_NEW_TOKENS, "adapter": "", **(params or {})}
        max_new_tokens, adapter = int(options["max_new_tokens"]), options["adapter"] or None
        return [self.complete(prompt, max_new_tokens, adapter) for prompt in parse_prompts(model_input)]

    def complete(self, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS, adapter: str | None = None) -> str:
        """Return the greedy continuation of `prompt`, at most to the end of the model's context.

        Raises InputError if the prompt is empty or fills the whole context.
        """
        ids = self._prefix + self._tokenizer.encode(prompt, add_special_tokens=False).ids
        longest = self.engine.spec.context_length - 1
        if not 1 <= len(ids) <= longest:
            raise InputError(
                f"the prompt must have 1 to {longest} tokens, got {len(ids)}",
                location=prompt[:40],
                hint="Shorten the prompt" if ids else "Give a prompt",
            )
        generated = self._session.generate(ids, min(max_new_tokens, longest + 1 - len(ids)), adapter=adapter)
        return str(self._tokenizer.decode(list(generated)))


def parse_prompts(model_input: Any) -> list[str]:
    """Return the prompts in an input of an MLflow model: a string, a list, or a data frame with one column.

    Raises InputError if a data frame has other columns than `prompt`.
    """
    if isinstance(model_input, str):
        return [model_input]
    columns = getattr(model_input, "columns", None)
    if columns is not None:
        if list(columns) not in (["prompt"], [0]):
            raise InputError(
                f"the data frame must have the single column `prompt`, got {', '.join(map(str, columns))}",
                location="model_input",
                hint="Rename or select the column",
            )
        return [str(value) for value in model_input.iloc[:, 0]]
    return [str(value) for value in model_input]
