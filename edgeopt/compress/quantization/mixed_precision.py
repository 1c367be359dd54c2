"""Assign bits and block size to each matrix under a budget of bytes or time (mixed precision)."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.quantized_matrix import BLOCK_SIZES
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.allocation import allocate
from edgeopt.compress.losses import kl_divergence, log_probabilities
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.gptq import Gptq
from edgeopt.compress.quantization.layerwise import quantize_network
from edgeopt.compress.quantization.quantize import INTEGER_BITS
from edgeopt.compress.quantization.rounding import Rounding, require_sparsity_preserved
from edgeopt.compress.quantization.sensitivity_sweep import TABLES, Losses, predict_losses
from edgeopt.core import units
from edgeopt.core.kernel_times import WORKING_SET_BYTES, KernelTimes, bytes_per_token
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError, StepError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

Allocation = dict[str, QuantizationScheme]
"""The scheme of each item. An item is a unit or TABLES (see sensitivity_sweep)."""
EVALUATION_STRIDE = 4
"""Candidates are compared on every fourth calibration window, because all log-probabilities stay in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """Quantize under one budget: bits per weight, bytes of all matrices, or time per token.

    The divergence of every offered scheme is predicted for every unit (sensitivity_sweep, cached per model). An exact
    solver then selects the allocation with the lowest total (edgeopt.compress.allocation). Errors of several units do
    not simply add up, so a few allocations near the optimum may be quantized and compared by measured divergence.

    Attributes:
        bits_per_weight: mean over all matrices, including scales and zero-points.
        size: bytes of all matrices, such as `90 MiB`; replaces `bits_per_weight`.
        decode: predicted time per token (edgeopt.core.kernel_times), such as `5 ms`; replaces both.
        kernels: kernel times of the target; required for `decode`.
        weights, block_sizes: offered data types and block sizes.
        symmetric: use a constant zero-point instead of one per block.
        rounding: method that selects codes, scales and zero-points.
        windows, window_tokens: amount of calibration text for sensitivity and rounding.
        candidates: number of allocations that are quantized and compared; each takes as long as one quantization.
        seed: for the Fisher information and the choice of candidates.
    """

    bits_per_weight: float | None = 4.25
    size: str | None = None
    decode: str | None = None
    kernels: KernelTimes | None = None
    weights: tuple[Literal["int8", "int4", "int2"], ...] = ("int8", "int4", "int2")
    block_sizes: tuple[int, ...] = (32, 64, 128)
    symmetric: bool = True
    rounding: Rounding = field(default_factory=Gptq)
    windows: int = 32
    window_tokens: int = 256
    candidates: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        budgets = {"bits_per_weight": self.bits_per_weight, "size": self.size, "decode": self.decode}
        active = [name for name, value in budgets.items() if value is not None]
        if len(active) != 1:
            raise ConfigError(
                f"exactly one of {', '.join(budgets)} must be set, got {' and '.join(active) or 'none'}",
                location="bits_per_weight",
                hint="Set the others to null",
            )
        if self.size is not None:
            units.parse(self.size, "B")
        if self.decode is not None:
            units.parse(self.decode, "us")
            if self.kernels is None:
                raise ConfigError(
                    "`decode` requires the kernel times of the target, and the target has none",
                    location="decode",
                    hint="Run `edgeopt profile --out FILE` on the device and select that target",
                )
        if not self.weights:
            raise ConfigError(
                "`weights` must name at least one data type, got none",
                location="weights",
                hint=f"List some of {', '.join(INTEGER_BITS)}",
            )
        unknown = [size for size in self.block_sizes if size not in BLOCK_SIZES[8]]
        if unknown or not self.block_sizes:
            raise ConfigError(
                f"`block_sizes` must be some of {', '.join(map(str, BLOCK_SIZES[8]))}; "
                f"got {', '.join(map(str, unknown)) or 'none'}",
                location="block_sizes",
                hint="Use [32, 64, 128]",
            )
        for name in ("windows", "window_tokens", "candidates"):
            require_positive(getattr(self, name), name)

    @property
    def remaining_error(self) -> float:
        """Return the typical increase of perplexity, as a share of the increase by rounding to nearest."""
        return self.rounding.REMAINING_ERROR

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with an allocation for typical losses; the final one has about the same bytes.

        Raises:
            ConfigError: the weights are already quantized, `rounding` would change the zeros of a sparse model, or no
                allocation fits the budget.
        """
        require_float(spec, "mixed_precision")
        require_sparsity_preserved(spec, self.rounding)
        losses = {
            item: {scheme: _typical_loss(spec, item, scheme) for scheme in schemes}
            for item, schemes in self._choices(spec).items()
        }
        return _with_allocation(spec, self._allocate(spec, losses))

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the quantized checkpoint, and the allocation to artifacts/mixed_precision.json."""
        spec = checkpoint.spec
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        network = modeling.load(checkpoint)
        choices = self._choices(spec)
        losses = predict_losses(network, checkpoint, choices, self.rounding, windows, context, seed=self.seed)
        best = self._best_candidate(network, spec, losses, windows, context)
        after = _with_allocation(spec, best.allocation)
        modeling.save(network, directory, checkpoint, after, best.quantized)
        report = {
            "bits_per_weight": after.bits_per_weight,
            "predicted_decode_ms": None if self.kernels is None else self.kernels.decode_us(after) / 1e3,
            "predicted_divergence_nats": _total_loss(losses, best.allocation),
            "divergence_nats": best.divergence,
            "bits": {item: [scheme.bits, scheme.block_size] for item, scheme in best.allocation.items()},
        }
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "mixed_precision.json").write_text(json.dumps(report, indent=1) + "\n")
        return after

    def _choices(self, spec: ModelSpec) -> dict[str, list[QuantizationScheme]]:
        """Return the offered schemes of each item; tied tables are one item."""
        items = [name for name in spec.matrices if not (spec.tied_embeddings and name in (LM_HEAD, EMBEDDING))]
        kernel_blocks = {INTEGER_BITS[dtype]: BLOCK_SIZES[INTEGER_BITS[dtype]] for dtype in self.weights}
        choices = {}
        for item in [*items, TABLES] if spec.tied_embeddings else items:
            columns = _shape(spec, item)[1]
            choices[item] = [
                QuantizationScheme(bits=bits, block_size=block, symmetric=self.symmetric)
                for bits, blocks in kernel_blocks.items()
                for block in self.block_sizes
                if block in blocks and columns % block == 0
            ]
            if not choices[item]:
                fitting = {block for blocks in kernel_blocks.values() for block in blocks if columns % block == 0}
                hint = f"Add one of {', '.join(map(str, sorted(fitting)))}"
                raise ConfigError(
                    f"one of `block_sizes` must divide the matrix side {columns}, got {self.block_sizes}",
                    location="block_sizes",
                    hint=hint if fitting else "Offer other data types, or remove this step",
                )
        return choices

    def _allocate(self, spec: ModelSpec, losses: Losses) -> Allocation:
        """Return the allocation with the lowest total loss within the budget; raise ConfigError if none fits."""
        if self.decode is not None:
            return self._allocate_within_time(spec, losses)
        costs = {item: {scheme: _bytes(spec, item, scheme) for scheme in schemes} for item, schemes in losses.items()}
        weights = sum(math.prod(_shape(spec, item)) for item in costs)
        budget = units.parse(self.size, "B") if self.size is not None else (self.bits_per_weight or 0.0) * weights / 8
        try:
            return allocate([costs], losses, [int(budget)])
        except StepError as error:
            lowest = 8 * sum(min(options.values()) for options in costs.values()) / weights
            raise ConfigError(
                f"the budget must allow at least {lowest:.3f} bits per weight, got {8 * budget / weights:.3f}",
                location="size" if self.size is not None else "bits_per_weight",
                hint="Raise the budget, or offer fewer bits or larger blocks",
            ) from error

    def _allocate_within_time(self, spec: ModelSpec, losses: Losses) -> Allocation:
        """Return the allocation with the lowest total loss within the time budget.

        Kernels take longer in an engine that reads more bytes per token. So an allocation is computed for each of
        several byte limits, with the kernel times of an engine that reads that many bytes, and the best one wins.
        """
        assert self.decode is not None
        assert self.kernels is not None
        non_matrix_us = self.kernels.non_matrix_us(spec)
        budget_ns = int(1e3 * (units.parse(self.decode, "us") - non_matrix_us))
        read = {
            item: {scheme: bytes_per_token(spec, _unit(item), scheme) for scheme in schemes}
            for item, schemes in losses.items()
        }
        allocations: list[Allocation] = []
        fastest_us = math.inf
        for working_set in _working_sets(read):
            costs = {
                item: {scheme: _nanoseconds(self.kernels, spec, item, scheme, working_set) for scheme in schemes}
                for item, schemes in losses.items()
            }
            fastest_us = min(fastest_us, non_matrix_us + sum(min(options.values()) for options in costs.values()) / 1e3)
            with suppress(StepError):  # no engine within this byte limit is fast enough
                allocations.append(allocate([costs, read], losses, [budget_ns, working_set]))
        if not allocations:
            raise ConfigError(
                f"`decode` must be at least {fastest_us / 1e3:.3g} ms, the time of the fastest choices, "
                f"got {self.decode}",
                location="decode",
                hint="Raise the budget, offer larger blocks, or remove layers first",
            )
        return min(allocations, key=lambda allocation: _total_loss(losses, allocation))

    def _best_candidate(
        self,
        network: PreTrainedModel,
        spec: ModelSpec,
        losses: Losses,
        windows: Sequence[Sequence[int]],
        context: CompressionContext,
    ) -> _Candidate:
        """Return the allocation near the predicted optimum whose quantized network diverges least.

        Each further candidate is the exact optimum for losses that are randomly halved or doubled per item, which
        models the error of the predictions.
        """
        generator = random.Random(self.seed)  # noqa: S311 - not for security
        evaluation = windows[::EVALUATION_STRIDE]
        reference = log_probabilities(network, evaluation)
        best: _Candidate | None = None
        evaluated: list[Allocation] = []
        for index in range(self.candidates):
            candidate_losses = losses if best is None else _perturbed(best.losses, generator)
            allocation = self._allocate(spec, candidate_losses)
            if allocation in evaluated:
                continue
            evaluated.append(allocation)
            context.progress(f"evaluating allocation {index + 1} of {self.candidates}")
            candidate_network = copy.deepcopy(network)
            schemes = _with_allocation(spec, allocation).schemes
            quantized = quantize_network(candidate_network, schemes, self.rounding, windows, context.progress)
            divergence = kl_divergence(candidate_network, evaluation, reference)
            if best is None or divergence < best.divergence:
                best = _Candidate(
                    losses=candidate_losses, allocation=allocation, quantized=quantized, divergence=divergence
                )
        assert best is not None
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A quantized allocation.

    Attributes:
        losses: the losses for which the allocation is optimal.
        quantized: quantized matrices by module name.
        divergence: measured KL divergence in nats per token.
    """

    losses: Losses
    allocation: Allocation
    quantized: Mapping[str, QuantizedMatrix]
    divergence: float


def _with_allocation(spec: ModelSpec, allocation: Allocation) -> ModelSpec:
    schemes = {item: scheme for item, scheme in allocation.items() if item != TABLES}
    if TABLES in allocation:
        schemes |= dict.fromkeys((LM_HEAD, EMBEDDING), allocation[TABLES])
    return replace(spec, schemes=schemes)


def _unit(item: str) -> str:
    """Return the unit whose shape the item has."""
    return LM_HEAD if item == TABLES else item


def _shape(spec: ModelSpec, item: str) -> tuple[int, int]:
    return spec.matrices[_unit(item)]


def _total_loss(losses: Losses, allocation: Allocation) -> float:
    return sum(losses[item][scheme] for item, scheme in allocation.items())


def _bytes(spec: ModelSpec, item: str, scheme: QuantizationScheme) -> int:
    return scheme.size_bytes(*_shape(spec, item))


def _nanoseconds(kernels: KernelTimes, spec: ModelSpec, item: str, scheme: QuantizationScheme, working_set: int) -> int:
    """Return the kernel time of an item, rounded up so that the integer costs never exceed the budget."""
    return math.ceil(1e3 * kernels.unit_us(spec, _unit(item), scheme, working_set))


def _working_sets(read: Mapping[str, Mapping[QuantizationScheme, int]]) -> list[int]:
    """Return limits of the bytes read per token, from the lowest to the highest possible, in steps of 25 %."""
    limit = sum(min(options.values()) for options in read.values())
    highest = sum(max(options.values()) for options in read.values())
    limits = []
    while limit < min(highest, WORKING_SET_BYTES[-1]):  # times are constant above the largest measured one
        limits.append(limit)
        limit = limit * 5 // 4 + 1
    return [*limits, highest]


def _typical_loss(spec: ModelSpec, item: str, scheme: QuantizationScheme) -> float:
    """Return a loss proportional to the squared error of uniform rounding.

    It falls by a factor of 4 with each bit and grows with the expected range of a block of normal weights.
    """
    return math.prod(_shape(spec, item)) * math.log(2 * scheme.block_size) * 4.0**-scheme.bits


def _perturbed(losses: Losses, generator: random.Random) -> Losses:
    """Return `losses` with each item's multiplied by 0.5, 1 or 2 at random."""
    factors = {item: generator.choice((0.5, 1.0, 2.0)) for item in losses}
    return {item: {scheme: loss * factors[item] for scheme, loss in row.items()} for item, row in losses.items()}
