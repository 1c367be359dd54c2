"""Check that a runtime can read the types in which a model's weights are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.core.model_spec import LLAMA_CPP_BITS
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec


def reject_llamacpp_types(spec: ModelSpec) -> None:
    """Raise ConfigError if the weights use a llama.cpp type such as Q4_K_M, which only llama.cpp reads."""
    if spec.weight_dtype in LLAMA_CPP_BITS:
        raise ConfigError(
            f"{spec.weight_dtype} is a llama.cpp weight type, which no other runtime reads",
            location="runtime",
            hint="Use runtime=llamacpp, or the step int4 instead of llama_quantize",
        )
