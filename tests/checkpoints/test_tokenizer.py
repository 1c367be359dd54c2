from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.checkpoints import tokenizer as tokens
from edgeopt.core.corpus import Text
from edgeopt.errors import InputError

LONG = "The quick brown fox jumps over the lazy dog. " * 20


def text(*documents: str) -> Text:
    return Text(name="t", documents=documents)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@settings(max_examples=50)
@given(document=st.text(min_size=1))
def test_tokenizer_round_trip_preserves_text(tiny_model: Path, document: str) -> None:
    tokenizer = tokens.load(tiny_model)
    assert tokenizer.decode(tokenizer.encode(document, add_special_tokens=False).ids) == document


@settings(max_examples=30)
@given(length=st.integers(17, 300), count=st.integers(1, 3))
def test_windows_partition_the_documents(tiny_model: Path, length: int, count: int) -> None:
    documents = [LONG[n:] for n in range(count)]
    windows = tokens.windows(text(*documents), tiny_model, length=length)
    prefix = tokens.prefix_ids(tiny_model)
    assert all(len(prefix) < len(window) <= length and len(window) >= 16 for window in windows)
    assert all(window[: len(prefix)] == prefix for window in windows)
    expected = []
    for document in documents:
        ids = tokens.load(tiny_model).encode(document, add_special_tokens=False).ids
        stride = length - len(prefix)
        pieces = [ids[i * stride : (i + 1) * stride] for i in range(-(-len(ids) // stride))]
        expected += [prefix + piece for piece in pieces if len(prefix + piece) >= 16]
    assert windows == expected


def test_prefix_is_bos_token_if_configured(model: Path) -> None:
    assert tokens.prefix_ids(model) == [0]
    for config in ({}, {"add_bos_token": False, "bos_token": "<s>"}, {"add_bos_token": True, "bos_token": "<none>"}):
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        assert tokens.prefix_ids(model) == []
    (model / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": {"content": "</s>"}}))
    assert tokens.prefix_ids(model) == [1]
    (model / "tokenizer_config.json").unlink()
    assert tokens.prefix_ids(model) == []


def test_limit_bounds_window_count(tiny_model: Path) -> None:
    all_windows = tokens.windows(text(LONG, LONG), tiny_model, length=32)
    assert tokens.windows(text(LONG, LONG), tiny_model, length=32, limit=3) == all_windows[:3]


def test_short_text_is_rejected(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="at least 16 token ids, got 3"):
        tokens.windows(text("dog"), tiny_model, length=64)


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", None), ("tokenizer.json", "{"), ("tokenizer_config.json", "{")]
)
def test_invalid_tokenizer_raises_input_error(model: Path, name: str, content: str | None) -> None:
    (model / name).unlink() if content is None else (model / name).write_text(content)
    with pytest.raises(InputError, match="tokenizer"):
        tokens.prefix_ids(model)
