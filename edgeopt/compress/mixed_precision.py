"""Mixed precision: each matrix gets the bits and blocks that serve the model best under a budget of bytes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt import network as networks
from edgeopt import units
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.allocation import allocate
from edgeopt.compress.divergence import divergence, predictions
from edgeopt.compress.gptq import Gptq
from edgeopt.compress.layerwise import round_network
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantize import BLOCK_SIZES, INTEGERS
from edgeopt.compress.rounding import Rounding, require_zeros_kept
from edgeopt.compress.rtn import Rtn
from edgeopt.compress.sensitivity import curvature, predicted_divergence
from edgeopt.errors import ConfigError, StepError
from edgeopt.part import describe
from edgeopt.spec import EMBEDDING, LM_HEAD, Grid, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgeopt.artifact import Checkpoint
    from edgeopt.ports import Workshop

Allocation = dict[str, Grid]
Losses = dict[str, dict[Grid, float]]
TABLES = "tables"
"""The item that stands for both tied tables, which share a grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """Quantize to a budget, which is one number: bits per weight, or the bytes of all matrices.

    What each choice of bits and blocks for each unit does to the model's predictions is predicted once for a
    model (edgeopt.compress.sensitivity), the best choice of all is found exactly (edgeopt.compress.allocation),
    and a few allocations near it are compared by true divergence, because errors do not simply add.

    Attributes:
        bits_per_weight: mean over all matrices, scales and zero-points counted.
        size: bytes of all matrices, such as `90 MiB`, in place of `bits_per_weight`.
        weights, block_sizes: what may be chosen from.
        rounding: how weights find their place on the chosen grids.
        windows, window_tokens: calibration text for sensitivity and rounding.
        candidates: allocations that are compared by true divergence.
    """

    bits_per_weight: float | None = 4.25
    size: str | None = None
    weights: tuple[Literal["int8", "int4", "int2"], ...] = ("int8", "int4", "int2")
    block_sizes: tuple[int, ...] = (32, 64, 128)
    symmetric: bool = True
    rounding: Rounding = field(default_factory=Gptq)
    windows: int = 32
    window_tokens: int = 256
    candidates: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.size is None):
            raise ConfigError(
                f"bits_per_weight is {self.bits_per_weight} and size is {self.size}",
                place="bits_per_weight",
                mend="Set one of the two, and the other to null",
            )
        if self.size is not None:
            units.parse(self.size, "B")
        if not self.weights:
            raise ConfigError("no types are offered", place="weights", mend=f"List some of {', '.join(INTEGERS)}")
        unknown = [b for b in self.block_sizes if b not in BLOCK_SIZES]
        if unknown or not self.block_sizes:
            raise ConfigError(
                f"{unknown or 'nothing'} is no list of block sizes",
                place="block_sizes",
                mend=f"Choose some of {', '.join(map(str, BLOCK_SIZES))}",
            )
        for name in ("windows", "window_tokens", "candidates"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """An allocation in which every weight loses alike, of the bytes that the true one will have."""
        require_float(spec, "mixed_precision")
        require_zeros_kept(spec, self.rounding)
        losses = {
            item: {grid: _typical_loss(spec, item, grid) for grid in grids}
            for item, grids in self._choices(spec).items()
        }
        return _with_grids(spec, self._allocate(spec, losses))

    def apply(self, checkpoint: Checkpoint, directory: Path, shop: Workshop) -> ModelSpec:
        spec = checkpoint.spec
        windows = calibration_windows(checkpoint, shop.calibration, count=self.windows, length=self.window_tokens)
        network = networks.load(checkpoint)
        losses = self._losses(network, checkpoint, windows, shop)
        shop.progress("comparing allocations")
        lost, allocation = min(
            self._compared(network, spec, losses, windows[: max(1, len(windows) // 8)], shop),
            key=lambda found: found[0],
        )
        after = _with_grids(spec, allocation)
        rounded = round_network(network, after.grids, self.rounding, windows, shop.progress)
        networks.save(network, directory, checkpoint, after, rounded)
        report = {
            "bits_per_weight": after.bits_per_weight,
            "predicted_divergence_nats": sum(losses[item][grid] for item, grid in allocation.items()),
            "divergence_rounded_to_nearest_nats": lost,
            "bits": {item: [grid.bits, grid.block_size] for item, grid in allocation.items()},
        }
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "mixed_precision.json").write_text(json.dumps(report, indent=1) + "\n")
        return after

    def _choices(self, spec: ModelSpec) -> dict[str, list[Grid]]:
        """The grids that each item may take; tied tables are one item."""
        items = [name for name in spec.matrices if not (spec.tied_embeddings and name in (LM_HEAD, EMBEDDING))]
        found = {}
        for item in [*items, TABLES] if spec.tied_embeddings else items:
            columns = spec.matrices[LM_HEAD if item == TABLES else item][1]
            fitting = [block for block in self.block_sizes if columns % block == 0]
            if not fitting:
                raise ConfigError(
                    f"no block of {self.block_sizes} divides the matrix side {columns}",
                    place="block_sizes",
                    mend=f"Add one of {', '.join(str(b) for b in BLOCK_SIZES if columns % b == 0) or 'no block'}",
                )
            found[item] = [
                Grid(bits=INTEGERS[kind], block_size=block, symmetric=self.symmetric)
                for kind in self.weights
                for block in fitting
            ]
        return found

    def _allocate(self, spec: ModelSpec, losses: Losses) -> Allocation:
        costs = {item: {grid: _bytes(spec, item, grid) for grid in grids} for item, grids in losses.items()}
        weights = sum(math.prod(spec.matrices[LM_HEAD if item == TABLES else item]) for item in costs)
        budget = units.parse(self.size, "B") if self.size is not None else (self.bits_per_weight or 0.0) * weights / 8
        try:
            return allocate(costs, losses, int(budget))
        except StepError as error:
            least = 8 * sum(min(options.values()) for options in costs.values()) / weights
            raise ConfigError(
                f"the budget is below the {least:.3f} bits per weight of the cheapest choices",
                place="size" if self.size is not None else "bits_per_weight",
                mend="Give more, or offer fewer bits or larger blocks",
            ) from error

    def _losses(
        self, network: PreTrainedModel, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], shop: Workshop
    ) -> Losses:
        """Predicted divergence of every choice, from the cache where this model was measured before."""
        measured = [checkpoint.digest, shop.calibration.digest, self.windows, self.window_tokens, self.seed]

        def measure(directory: Path) -> None:
            means = curvature(network, windows, seed=self.seed, progress=shop.progress)
            networks.write_tensors(means, directory / "curvature.safetensors")

        means = networks.read_weights(shop.cache.stage("curvature", measured, measure))
        choices = self._choices(checkpoint.spec)
        groups: dict[str, list[str]] = {}
        for item in choices:
            groups.setdefault(item.rpartition(".")[0] or item, []).append(item)
        found: Losses = {}
        for group, items in groups.items():

            def weigh(directory: Path, group: str = group, items: Sequence[str] = items) -> None:
                shop.progress(f"weighing the choices of {group}")
                table = {item: _predicted(network, item, choices[item], means) for item in items}
                (directory / "divergence.json").write_text(json.dumps(table) + "\n")

            offered = {item: [describe(grid) for grid in choices[item]] for item in items}
            folder = shop.cache.stage("sensitivity", [*measured, offered], weigh)
            for item, row in json.loads((folder / "divergence.json").read_text()).items():
                found[item] = dict(zip(choices[item], row, strict=True))
        return found

    def _compared(
        self,
        network: PreTrainedModel,
        spec: ModelSpec,
        losses: Losses,
        windows: Sequence[Sequence[int]],
        shop: Workshop,
    ) -> Iterator[tuple[float, Allocation]]:
        """Allocations near the predicted best with their true divergence; the network is left as it was.

        Neighbours come from losses that are doubled or halved at random, so that each is the exact optimum of
        a prediction that is a little wrong.
        """
        chance = random.Random(self.seed)  # noqa: S311 - a search, no secret
        modules = networks.units(network)
        weights = {name: network.get_submodule(name).weight for unit in modules.values() for name in unit}
        present: dict[str, Grid] = {}
        reference = predictions(network, windows)
        best, least = losses, math.inf
        for number in range(self.candidates):
            shop.progress(f"comparing allocation {number + 1} of {self.candidates}")
            trial = best if number == 0 else _perturbed(best, chance)
            allocation = self._allocate(spec, trial)
            for unit, grid in _with_grids(spec, allocation).grids.items():
                if present.get(unit) != grid:
                    _put(network, {name: weights[name] for name in modules[unit]}, grid)
                    present[unit] = grid
            lost = divergence(network, windows, reference)
            if lost < least:
                best, least = trial, lost
            yield lost, allocation
        for name, weight in weights.items():
            network.get_submodule(name).weight = weight


def _put(network: PreTrainedModel, weights: Mapping[str, nn.Parameter], grid: Grid) -> None:
    """Let modules compute with their weights rounded to nearest on `grid`."""
    from torch import nn

    for name, weight in weights.items():
        rounded = Rtn().round(weight.detach(), grid, None).weight
        network.get_submodule(name).weight = nn.Parameter(rounded, requires_grad=False)


def _with_grids(spec: ModelSpec, allocation: Allocation) -> ModelSpec:
    grids = {item: grid for item, grid in allocation.items() if item != TABLES}
    if TABLES in allocation:
        grids |= dict.fromkeys((LM_HEAD, EMBEDDING), allocation[TABLES])
    return replace(spec, grids=grids)


def _bytes(spec: ModelSpec, item: str, grid: Grid) -> int:
    return grid.size_bytes(*spec.matrices[LM_HEAD if item == TABLES else item])


def _typical_loss(spec: ModelSpec, item: str, grid: Grid) -> float:
    """The squared error of uniform rounding, which falls by four with each bit and grows with the block's range."""
    rows, columns = spec.matrices[LM_HEAD if item == TABLES else item]
    return rows * columns * math.log(2 * grid.block_size) * 4.0**-grid.bits


def _predicted(network: PreTrainedModel, item: str, grids: Sequence[Grid], means: Mapping[str, Tensor]) -> list[float]:
    """Predicted divergence of rounding an item to nearest on each of `grids`."""
    import torch

    totals = [0.0] * len(grids)
    modules = networks.units(network)
    for unit in (LM_HEAD, EMBEDDING) if item == TABLES else (item,):
        weight = torch.cat([network.get_submodule(name).weight.detach() for name in modules[unit]])
        for number, grid in enumerate(grids):
            totals[number] += predicted_divergence(Rtn().round(weight, grid, None).weight - weight, unit, means)
    return totals


def _perturbed(losses: Losses, chance: random.Random) -> Losses:
    factors = {item: chance.choice((0.5, 1.0, 2.0)) for item in losses}
    return {item: {grid: loss * factors[item] for grid, loss in row.items()} for item, row in losses.items()}
