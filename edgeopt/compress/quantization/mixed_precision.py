"""Mixed precision: each matrix gets the bits and blocks that serve the model best under a budget of bytes or time."""

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
from edgeopt.compress.quantization.quantize import INTEGERS
from edgeopt.compress.quantization.rounding import Rounding, require_zeros_kept
from edgeopt.compress.quantization.sensitivity_sweep import TABLES, Losses, weigh
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
COMPARED = 4
"""Of so many calibration windows one is predicted before and after, whose log-probabilities are kept meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """Quantize to a budget, which is one number: bits per weight, the bytes of all matrices, or the time of a token.

    What each choice of bits and blocks for each unit does to the model's predictions is predicted once for a
    model (edgeopt.compress.quantization.sensitivity_sweep), and the best choice of all is found exactly
    (edgeopt.compress.allocation). A few allocations near it may be rounded and compared by true divergence, because
    errors do not simply add.

    Attributes:
        bits_per_weight: mean over all matrices, scales and zero-points counted.
        size: bytes of all matrices, such as `90 MiB`, in place of `bits_per_weight`.
        decode: predicted time of one token (edgeopt.core.kernel_times), such as `5 ms`, in place of both.
        kernels: the target's, which `decode` needs.
        weights, block_sizes: what may be chosen from.
        rounding: how weights find their place on the chosen grids.
        windows, window_tokens: calibration text for sensitivity and rounding.
        candidates: allocations that are rounded and compared; each takes as long as rounding the model.
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
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'no budget'} is set",
                location="bits_per_weight",
                hint=f"Set one of {', '.join(budgets)}, and the others to null",
            )
        if self.size is not None:
            units.parse(self.size, "B")
        if self.decode is not None:
            units.parse(self.decode, "us")
            if self.kernels is None:
                raise ConfigError(
                    "the times of the target's kernels are not known",
                    location="decode",
                    hint="Profile the device by `edgeopt profile --out FILE` and choose that target",
                )
        if not self.weights:
            raise ConfigError("no types are offered", location="weights", hint=f"List some of {', '.join(INTEGERS)}")
        unknown = [b for b in self.block_sizes if b not in BLOCK_SIZES[8]]
        if unknown or not self.block_sizes:
            raise ConfigError(
                f"{unknown or 'nothing'} is no list of block sizes",
                location="block_sizes",
                hint=f"Choose some of {', '.join(map(str, BLOCK_SIZES[8]))}",
            )
        for name in ("windows", "window_tokens", "candidates"):
            require_positive(getattr(self, name), name)

    @property
    def remaining_error(self) -> float:
        return self.rounding.REMAINING_ERROR

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """An allocation in which every weight loses alike, of the bytes that the true one will have."""
        require_float(spec, "mixed_precision")
        require_zeros_kept(spec, self.rounding)
        losses = {
            item: {grid: _typical_loss(spec, item, grid) for grid in schemes}
            for item, schemes in self._choices(spec).items()
        }
        return _with_grids(spec, self._allocate(spec, losses))

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        spec = checkpoint.spec
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        network = modeling.load(checkpoint)
        losses = weigh(network, checkpoint, self._choices(spec), self.rounding, windows, context, seed=self.seed)
        best = self._best_of(network, spec, losses, windows, context)
        after = _with_grids(spec, best.allocation)
        modeling.save(network, directory, checkpoint, after, best.rounded)
        report = {
            "bits_per_weight": after.bits_per_weight,
            "predicted_decode_ms": None if self.kernels is None else self.kernels.decode_us(after) / 1e3,
            "predicted_divergence_nats": _loss(losses, best.allocation),
            "divergence_nats": best.kl_divergence,
            "bits": {item: [grid.bits, grid.block_size] for item, grid in best.allocation.items()},
        }
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "mixed_precision.json").write_text(json.dumps(report, indent=1) + "\n")
        return after

    def _choices(self, spec: ModelSpec) -> dict[str, list[QuantizationScheme]]:
        """The grids that each item may take; tied tables are one item."""
        items = [name for name in spec.matrices if not (spec.tied_embeddings and name in (LM_HEAD, EMBEDDING))]
        found = {}
        for item in [*items, TABLES] if spec.tied_embeddings else items:
            columns = _sides(spec, item)[1]
            known = {INTEGERS[matrix_kind]: BLOCK_SIZES[INTEGERS[matrix_kind]] for matrix_kind in self.weights}
            found[item] = [
                QuantizationScheme(bits=bits, block_size=block, symmetric=self.symmetric)
                for bits, blocks in known.items()
                for block in self.block_sizes
                if block in blocks and columns % block == 0
            ]
            if not found[item]:
                fitting = sorted({block for blocks in known.values() for block in blocks if columns % block == 0})
                raise ConfigError(
                    f"no block of {self.block_sizes} divides the matrix side {columns}",
                    location="block_sizes",
                    hint=f"Add one of {', '.join(map(str, fitting)) or 'no block'}",
                )
        return found

    def _allocate(self, spec: ModelSpec, losses: Losses) -> Allocation:
        if self.decode is not None:
            return self._within_time(spec, losses)
        costs = {item: {grid: _bytes(spec, item, grid) for grid in schemes} for item, schemes in losses.items()}
        weights = sum(math.prod(_sides(spec, item)) for item in costs)
        budget = units.parse(self.size, "B") if self.size is not None else (self.bits_per_weight or 0.0) * weights / 8
        try:
            return allocate([costs], losses, [int(budget)])
        except StepError as error:
            least = 8 * sum(min(options.values()) for options in costs.values()) / weights
            raise ConfigError(
                f"the budget is below the {least:.3f} bits per weight of the cheapest choices",
                location="size" if self.size is not None else "bits_per_weight",
                hint="Give more, or offer fewer bits or larger blocks",
            ) from error

    def _within_time(self, spec: ModelSpec, losses: Losses) -> Allocation:
        """The allocation that loses least of those that the budget of time allows.

        Kernels take longer in engines that read more bytes. So engines of up to some sizes are allocated apart, each
        by the times of an engine that reads just as much, and the best of all is taken.
        """
        assert self.decode is not None
        assert self.kernels is not None
        non_matrix_us = self.kernels.non_matrix_us(spec)
        room = int(1e3 * (units.parse(self.decode, "us") - non_matrix_us))
        read = {item: {grid: bytes_per_token(spec, _name(item), grid) for grid in row} for item, row in losses.items()}
        found: list[Allocation] = []
        fastest_us = math.inf
        for size in _sizes(read):
            costs = {
                item: {grid: _nanoseconds(self.kernels, spec, item, grid, size) for grid in row}
                for item, row in losses.items()
            }
            fastest_us = min(fastest_us, non_matrix_us + sum(min(row.values()) for row in costs.values()) / 1e3)
            with suppress(StepError):  # no engine of up to this size is fast enough
                found.append(allocate([costs, read], losses, [room, size]))
        if not found:
            raise ConfigError(
                f"the budget is below the {fastest_us / 1e3:.3g} ms that the fastest choices take",
                location="decode",
                hint="Give more time, offer larger blocks, or remove layers first",
            )
        return min(found, key=lambda allocation: _loss(losses, allocation))

    def _best_of(
        self,
        network: PreTrainedModel,
        spec: ModelSpec,
        losses: Losses,
        windows: Sequence[Sequence[int]],
        context: CompressionContext,
    ) -> _Tried:
        """Of allocations near the predicted best, the one that diverges least once it is rounded.

        Neighbours come from losses that are doubled or halved at random, so that each is the exact optimum of
        a prediction that is a little wrong.
        """
        chance = random.Random(self.seed)  # noqa: S311 - a search, no secret
        few = windows[::COMPARED]
        reference = log_probabilities(network, few)
        best: _Tried | None = None
        seen: list[Allocation] = []
        for number in range(self.candidates):
            trial = losses if best is None else _perturbed(best.losses, chance)
            allocation = self._allocate(spec, trial)
            if allocation in seen:
                continue
            seen.append(allocation)
            context.progress(f"trying allocation {number + 1} of {self.candidates}")
            other = copy.deepcopy(network)
            rounded = quantize_network(
                other, _with_grids(spec, allocation).schemes, self.rounding, windows, context.progress
            )
            lost = kl_divergence(other, few, reference)
            if best is None or lost < best.kl_divergence:
                best = _Tried(losses=trial, allocation=allocation, rounded=rounded, kl_divergence=lost)
        assert best is not None
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """An allocation, the losses whose optimum it is, its matrices, and their true divergence in nats a token."""

    losses: Losses
    allocation: Allocation
    rounded: Mapping[str, QuantizedMatrix]
    kl_divergence: float


def _with_grids(spec: ModelSpec, allocation: Allocation) -> ModelSpec:
    schemes = {item: grid for item, grid in allocation.items() if item != TABLES}
    if TABLES in allocation:
        schemes |= dict.fromkeys((LM_HEAD, EMBEDDING), allocation[TABLES])
    return replace(spec, schemes=schemes)


def _name(item: str) -> str:
    """The unit whose sizes an item has."""
    return LM_HEAD if item == TABLES else item


def _sides(spec: ModelSpec, item: str) -> tuple[int, int]:
    return spec.matrices[_name(item)]


def _loss(losses: Losses, allocation: Allocation) -> float:
    return sum(losses[item][grid] for item, grid in allocation.items())


def _bytes(spec: ModelSpec, item: str, grid: QuantizationScheme) -> int:
    return grid.size_bytes(*_sides(spec, item))


def _nanoseconds(kernels: KernelTimes, spec: ModelSpec, item: str, grid: QuantizationScheme, working_set: int) -> int:
    """Rounded up, so that whole numbers keep the budget."""
    return math.ceil(1e3 * kernels.unit_us(spec, _name(item), grid, working_set))


def _sizes(read: Mapping[str, Mapping[QuantizationScheme, int]]) -> list[int]:
    """Bytes that an engine may read a token, from the fewest to the most that can be chosen, a quarter apart."""
    size, most = sum(min(row.values()) for row in read.values()), sum(max(row.values()) for row in read.values())
    sizes = []
    while size < min(most, WORKING_SET_BYTES[-1]):  # beyond the largest that is timed all take alike
        sizes.append(size)
        size = size * 5 // 4 + 1
    return [*sizes, most]


def _typical_loss(spec: ModelSpec, item: str, grid: QuantizationScheme) -> float:
    """The squared error of uniform rounding, which falls by four with each bit and grows with the block's range."""
    return math.prod(_sides(spec, item)) * math.log(2 * grid.block_size) * 4.0**-grid.bits


def _perturbed(losses: Losses, chance: random.Random) -> Losses:
    factors = {item: chance.choice((0.5, 1.0, 2.0)) for item in losses}
    return {item: {grid: loss * factors[item] for grid, loss in row.items()} for item, row in losses.items()}
