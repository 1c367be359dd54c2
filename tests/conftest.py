"""Fixtures of many tests: a tiny model that needs no network, and real data where a checkout has it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test may reach a hub
os.environ.pop("MLFLOW_TRACKING_URI", None)  # whoever runs the tests may have one
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it for lines of its own; edgeopt's tables would be as narrow

import pytest
from hypothesis import settings
from support.mlflow_server import MlflowServer
from support.postgresql import Postgres, binaries, server

settings.register_profile("edgeopt", deadline=None)  # the cores are shared with measurements
settings.load_profile("edgeopt")

REPOSITORY = Path(__file__).resolve().parent.parent
PROSE = "def read(path):\n    return open(path).read()\n\nThe quick brown fox jumps over the lazy dog. "


WHOLE = {"folder", "swept", "shown", "desk"}
"""Fixtures of tests that run a whole sweep, a server or a promotion: the longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with such tests come first, so that two processes end at about the same time."""
    long = {item.path for item in items if WHOLE.intersection(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def tracked_nowhere() -> Iterator[None]:
    """No test begins with a tracking URI of another: MLflow leaves the one that is set in the environment, too."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in Hugging Face layout: 2 layers, hidden 64, MLP 128, 4 heads over 2 KV heads, vocabulary 300."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of_tokenizer))
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages that sweeps of the tiny model share: what one test made, the next finds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, shared_cache: Path, request: pytest.FixtureRequest) -> Path:
    """A user's folder of configs with a sweep of the tiny model, and the working folder of that sweep.

    Its cache is shared, but for slow tests, which wait for what takes time.
    """
    from support.sweeping import prepare

    prepare(tmp_path, tiny_model, cache=None if request.node.get_closest_marker("slow") else shared_cache)
    return tmp_path


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an MLflow server that keeps runs and artifacts in a folder of its own."""
    made = MlflowServer(tmp_path_factory.mktemp("server"))
    try:
        yield made.uri
    finally:
        made.kill()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    """A private PostgreSQL server; the tests that want one are skipped where it is not installed."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="its driver is not installed: pip install 'edgeopt[postgres]'")
    with server(fsync=False) as made:
        yield made


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real models and texts, which lie beside some checkouts and are never downloaded."""
    folder = REPOSITORY.parent / "shared" / "realdata"
    if not folder.is_dir():
        pytest.skip(f"no real models and texts at {folder}")
    return folder
