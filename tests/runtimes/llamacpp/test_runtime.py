"""Test the models that the llama.cpp runtime rejects before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.model_spec import KvCacheScheme
from edgeopt.errors import ConfigError
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
from runtimes.llamacpp.gguf_engines import ALL_INT4


@pytest.fixture
def llama_cpp_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that llama.cpp is installed; `check` does not import it."""
    monkeypatch.setattr("edgeopt.runtimes.llamacpp.runtime.find_spec", lambda name: name)


@pytest.mark.usefixtures("llama_cpp_installed")
class TestCheck:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"weights": "int4", **ALL_INT4, "block_size": 64}, "blocks of 64"),
            ({"weights": "int8"}, "symmetric=true"),
            ({"weights": "int2"}, "2 bits"),
        ],
    )
    def test_unsupported_scheme_is_rejected(self, values: dict[str, Any], message: str, llama: Checkpoint) -> None:
        with pytest.raises(ConfigError, match=message):
            LlamaCpp().check(Quantize(**values).plan(llama.spec))

    def test_calibrated_kv_cache_is_rejected(self, llama: Checkpoint) -> None:
        with pytest.raises(ConfigError, match="keys_values=int8"):
            LlamaCpp().check(replace(llama.spec, kv_cache=KvCacheScheme(bits=8, per_channel=True)))

    def test_unsupported_layer_or_head_size_is_rejected(self, llama: Checkpoint) -> None:
        first, *rest = llama.spec.layers
        qwen = replace(llama.spec, architecture="Qwen2ForCausalLM")
        with pytest.raises(ConfigError, match=r"same sizes: .* first layer for Qwen2ForCausalLM"):
            LlamaCpp().check(qwen.with_layers((replace(first, heads=2, kv_heads=1), *rest)))
        with pytest.raises(ConfigError, match=r"head size must be a multiple of 32 .*, got 16"):
            LlamaCpp(keys_values="int8").check(llama.spec)

    def test_unknown_family_is_rejected(self, llama: Checkpoint) -> None:
        with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
            LlamaCpp().check(replace(llama.spec, architecture="GPT2LMHeadModel"))

    def test_supported_scheme_is_accepted(self, llama: Checkpoint) -> None:
        LlamaCpp().check(Quantize(weights="int4", **ALL_INT4).plan(llama.spec))


def test_missing_llama_cpp_names_install_command(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.runtimes.llamacpp.runtime.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"edgeopt\[llamacpp\]"):
        LlamaCpp().check(llama.spec)
