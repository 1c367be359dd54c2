"""Types of weights that are no grid's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.core.model_spec import LLAMA_BITS
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec


def require(spec: ModelSpec) -> None:
    """ConfigError where weights are to be in a type of llama.cpp's, which no other runtime reads."""
    if spec.weight_dtype in LLAMA_BITS:
        raise ConfigError(
            f"{spec.weight_dtype} is a type of llama.cpp's",
            location="runtime",
            hint="Use runtime=llamacpp, or the step int4 in place of llama_quantize",
        )
