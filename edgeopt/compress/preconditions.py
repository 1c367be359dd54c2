"""Conditions that several steps put on what came before them."""

from __future__ import annotations

from edgeopt.core.model_spec import LLAMA_BITS, ModelSpec
from edgeopt.errors import ConfigError


def require_float(spec: ModelSpec, step: str, fallback: str = "") -> None:
    """ConfigError where the weights are rounded already: a later change would undo the rounding.

    `otherwise` is one more way to mend it.
    """
    if spec.schemes or spec.weight_dtype in LLAMA_BITS:
        raise ConfigError(
            f"{step} cannot follow quantize: it would change weights that are already rounded",
            location="order",
            hint=f"Put {step} before quantize{fallback and f', or {fallback}'}",
        )
    require_no_kv_cache(spec, step)
    require_no_adapters(spec, step)


def require_no_kv_cache(spec: ModelSpec, step: str) -> None:
    """ConfigError where keys and values were calibrated already: changed weights would change their ranges."""
    if spec.kv_cache is not None:
        raise ConfigError(
            f"{step} cannot follow kv_cache: it would change keys and values after their ranges were taken",
            location="order",
            hint=f"Put {step} before kv_cache",
        )


def require_no_adapters(spec: ModelSpec, step: str) -> None:
    """ConfigError where adapters stand beside the weights: they fit the weights that they were trained on."""
    if spec.adapters:
        raise ConfigError(
            f"{step} cannot follow lora with merge=false: it would change the weights that the adapter was trained on",
            location="order",
            hint=f"Put {step} before lora, or merge the adapter",
        )


def require_dense(spec: ModelSpec, step: str, *, hint: str = "") -> None:
    """ConfigError where weights were made zero on purpose, and `step` would not leave them so."""
    if spec.sparsity != "dense":
        raise ConfigError(
            f"{step} cannot follow sparsify: it would undo the {spec.sparsity} zeros",
            location="order",
            hint=hint or f"Put {step} before sparsify",
        )


def require_ratio(value: float, location: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(
            f"{value!r} is outside its range", location=location, hint="Give a share between 0 and 1, both excluded"
        )


def require_positive(value: int, location: str) -> None:
    if value < 1:
        raise ConfigError(f"{value!r} is outside its range", location=location, hint="Give 1 or more")
