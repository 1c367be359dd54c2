from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from support import samples

import edgeopt
from edgeopt.errors import ConfigError, InputError
from edgeopt.tracking import flavor
from edgeopt.tracking.recorder import MlflowRecorder

ROOT = Path(edgeopt.__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an MLflow model of a toy engine and return its folder."""
    folder = tmp_path_factory.mktemp("flavor")
    samples.engine(folder / "engine")
    flavor.save_model(folder / "engine", folder / "model")
    return folder / "model"


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_prompt_formats_give_equal_texts(model: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(model))
    texts = loaded.predict(["def f (", "return"])
    assert len(texts) == 2
    assert all(isinstance(text, str) and text for text in texts)
    assert loaded.predict(pd.DataFrame({"prompt": ["def f (", "return"]})) == texts
    assert loaded.predict("return") == texts[1:]
    assert flavor.load_model(str(model)).predict(["return"]) == texts[1:]


def test_max_new_tokens_is_a_parameter(model: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(model))
    short, default = (loaded.predict(["return"], params=p)[0] for p in ({"max_new_tokens": 2}, None))
    assert default.startswith(short)
    assert len(default) > len(short)


def test_adapter_is_an_optional_parameter(model: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(model))
    assert loaded.predict(["return"], params={"adapter": ""}) == loaded.predict(["return"])
    with pytest.raises(ConfigError, match=r"adapter.*got 'tests'"):
        loaded.predict(["return"], params={"adapter": "tests"})


def test_frame_with_other_columns_is_rejected(model: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(model))
    with pytest.raises(InputError, match=r"single column `prompt`, got text"):
        loaded.predict(pd.DataFrame({"text": ["def"]}))


def test_generation_ends_at_context_length(model: Path) -> None:
    generator = flavor.load_model(str(model))
    assert generator.complete(" ".join(["x"] * 63), 10)
    with pytest.raises(InputError, match="1 to 63 tokens, got 64"):
        generator.complete(" ".join(["x"] * 64))
    with pytest.raises(InputError, match="got 0"):
        generator.complete("")


def test_model_has_signature_example_and_requirements(model: Path) -> None:
    info = mlflow.models.get_model_info(str(model))
    described = yaml.safe_load((model / "MLmodel").read_text())
    assert info.signature.params.params[0].name == "max_new_tokens"
    assert described["flavors"]["python_function"]["loader_module"] == "edgeopt.tracking.flavor"
    assert described["flavors"]["edgeopt"]["format"] == "stub/1"
    assert len(described["flavors"]["edgeopt"]["engine_digest"]) == 64
    assert mlflow.models.Model.load(str(model)).load_input_example(str(model)) is not None
    names = {line.split("==")[0] for line in (model / "requirements.txt").read_text().splitlines()}
    assert names == {"edgeopt", "mlflow", "numpy"}


@pytest.mark.parametrize("name", ["table.npy", "tokenizer.json", "edgeopt.json"])
def test_changed_file_is_rejected_before_loading(tmp_path: Path, name: str) -> None:
    samples.engine(tmp_path / "engine")
    flavor.save_model(tmp_path / "engine", tmp_path / "model")
    flip_last_byte(tmp_path / "model" / "engine" / name)
    with pytest.raises(InputError, match=name):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_changed_engine_is_not_saved(tmp_path: Path) -> None:
    flip_last_byte(samples.engine(tmp_path / "engine").directory / "table.npy")
    with pytest.raises(InputError, match="was modified"):
        flavor.save_model(tmp_path / "engine", tmp_path / "model")


def test_model_of_another_flavor_is_rejected(tmp_path: Path) -> None:
    mlflow.models.Model().save(str(tmp_path / "MLmodel"))
    with pytest.raises(InputError, match="must have the flavor edgeopt"):
        flavor.engine_folder(tmp_path)


def test_logged_engine_generates_in_another_process(recorder: MlflowRecorder, study: str, tmp_path: Path) -> None:
    engine = samples.engine(tmp_path / "engine", seed=4071)  # another run could have logged an equal engine first
    run_id = recorder.record(study, 0, {}, {}, samples.result(engine))
    code = f"import mlflow; print(mlflow.pyfunc.load_model('runs:/{run_id}/engine').predict(['def f (']))"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": recorder.uri}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("['")
