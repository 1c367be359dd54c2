"""Check the preconditions that several compression steps share."""

from __future__ import annotations

from edgeopt.core.model_spec import LLAMA_CPP_BITS, ModelSpec
from edgeopt.errors import ConfigError


def require_float(spec: ModelSpec, step: str, alternative: str = "") -> None:
    """Raise ConfigError if the weights are already quantized, because `step` would overwrite the quantized values.

    The KV cache must not be calibrated and no separate adapter may exist either. `alternative` is an additional
    action for the hint.
    """
    if spec.schemes or spec.weight_dtype in LLAMA_CPP_BITS:
        raise ConfigError(
            f"{step} cannot follow quantize: it would change weights that are already quantized",
            location="order",
            hint=f"Put {step} before quantize{alternative and f', or {alternative}'}",
        )
    require_no_kv_cache(spec, step)
    require_no_adapters(spec, step)


def require_no_kv_cache(spec: ModelSpec, step: str, *, hint: str = "") -> None:
    """Raise ConfigError if the KV cache is already calibrated, because changed weights invalidate its ranges."""
    if spec.kv_cache is not None:
        raise ConfigError(
            f"{step} cannot follow kv_cache: it would change keys and values whose ranges are already calibrated",
            location="order",
            hint=hint or f"Put {step} before kv_cache",
        )


def require_no_adapters(spec: ModelSpec, step: str) -> None:
    """Raise ConfigError if the model has separate adapters, because they fit only the weights they were trained on."""
    if spec.adapters:
        raise ConfigError(
            f"{step} cannot follow lora with merge=false: it would change the weights that the adapter was trained on",
            location="order",
            hint=f"Put {step} before lora, or merge the adapter",
        )


def require_dense(spec: ModelSpec, step: str, *, hint: str = "") -> None:
    """Raise ConfigError if the model is sparse, because `step` would overwrite its zeros."""
    if spec.sparsity != "dense":
        raise ConfigError(
            f"{step} cannot follow sparsify: it would undo the {spec.sparsity} zeros",
            location="order",
            hint=hint or f"Put {step} before sparsify",
        )


def require_ratio(value: float, field: str) -> None:
    """Raise ConfigError unless 0 < value < 1."""
    if not 0.0 < value < 1.0:
        raise ConfigError(
            f"`{field}` must be between 0 and 1, got {value!r}",
            location=field,
            hint="Choose a share such as 0.25; 0 and 1 are excluded",
        )


def require_positive(value: int, field: str) -> None:
    """Raise ConfigError unless value ≥ 1."""
    if value < 1:
        raise ConfigError(f"`{field}` must be at least 1, got {value!r}", location=field, hint="Choose 1 or more")
