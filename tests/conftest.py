"""Provide shared fixtures: a tiny model, servers, and published models and texts if they are available."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import of huggingface_hub; tests must not access the hub
os.environ.pop("MLFLOW_TRACKING_URI", None)  # tests must not use the developer's server
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, which would narrow edgeopt's tables

import pytest
from hypothesis import settings
from support.mlflow_server import MlflowServer
from support.postgresql import Postgres, binaries, server

settings.register_profile("edgeopt", deadline=None)  # the cores are shared with measurements
settings.load_profile("edgeopt")

REPOSITORY = Path(__file__).resolve().parent.parent
PROSE = "def read(path):\n    return open(path).read()\n\nThe quick brown fox jumps over the lazy dog. "
LONG_FIXTURES = {"folder", "swept", "served", "study", "reference_study"}
"""Fixtures of the longest tests, which run a sweep, a server or a promotion."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest test files first, so that parallel processes end at about the same time."""
    long = {item.path for item in items if LONG_FIXTURES.intersection(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def reset_tracking_uri() -> Iterator[None]:
    """Remove the tracking URI after each test; MLflow also stores it in the environment."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama in Hugging Face layout.

    2 layers, hidden size 64, MLP 128, 4 heads, 2 KV heads, vocabulary 300.
    """
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
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a stage cache that sweeps of the tiny model share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, shared_cache: Path, request: pytest.FixtureRequest) -> Path:
    """Return a user's config folder with a sweep of the tiny model, which is also its working folder.

    The cache is shared. Only slow tests have their own cache, because they need stages that take time.
    """
    from support.sweeping import prepare

    prepare(tmp_path, tiny_model, cache=None if request.node.get_closest_marker("slow") else shared_cache)
    return tmp_path


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URI of an MLflow server with its own store and artifacts."""
    tracking_server = MlflowServer(tmp_path_factory.mktemp("server"))
    try:
        yield tracking_server.uri
    finally:
        tracking_server.kill()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    """Yield a private PostgreSQL server; skip the test if PostgreSQL or its driver is not installed."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'edgeopt[postgres]'")
    with server(fsync=False) as running:
        yield running


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Return the folder of published models and texts next to the checkout; skip the test without it."""
    folder = REPOSITORY.parent / "shared" / "realdata"
    if not folder.is_dir():
        pytest.skip(f"no published models and texts in {folder}")
    return folder
