"""Test mixed precision: predicted divergences, exact allocation and budgets."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stages import compression_context

from edgeopt.cache import StageCache
from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.checkpoints.quantized_matrix import BLOCK_SIZES
from edgeopt.compress.allocation import allocate
from edgeopt.compress.quantization.mixed_precision import MixedPrecision
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.compress.quantization.sensitivity import fisher_diagonals, predict_divergence, predict_embedding_divergence
from edgeopt.compress.quantization.sensitivity_sweep import TABLES, predict_losses
from edgeopt.core import units
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.corpus import Text
from edgeopt.core.kernel_times import KernelTimes
from edgeopt.core.model_spec import LM_HEAD, QuantizationScheme
from edgeopt.errors import ConfigError, StepError

TEXT = Text(name="text", documents=tuple(f"def f{n}(x):\n    return x + {n}\n" * 6 for n in range(8)))


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


def small_step(**values) -> MixedPrecision:
    return MixedPrecision(
        **{
            "windows": 4,
            "window_tokens": 32,
            "candidates": 3,
            "block_sizes": (16, 32),
            "bits_per_weight": 5.0,
            **values,
        }
    )


tables = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


@given(table=tables, slack=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_allocation_is_optimal_within_the_budget(table, slack):
    costs = {str(n): {k: cost for k, (cost, _) in enumerate(row)} for n, row in enumerate(table)}
    losses = {str(n): {k: loss for k, (_, loss) in enumerate(row)} for n, row in enumerate(table)}
    budget = sum(min(row.values()) for row in costs.values()) + slack
    allocation = allocate([costs], losses, [budget])
    assert sum(costs[item][choice] for item, choice in allocation.items()) <= budget
    combinations = itertools.product(*(list(row) for row in costs.values()))
    lowest = min(
        sum(losses[item][choice] for item, choice in zip(costs, choices, strict=True))
        for choices in combinations
        if sum(costs[item][choice] for item, choice in zip(costs, choices, strict=True)) <= budget
    )
    assert sum(losses[item][choice] for item, choice in allocation.items()) == pytest.approx(lowest, abs=1e-6)


def test_allocation_rejects_an_unreachable_budget():
    with pytest.raises(StepError, match="at least the cost of the cheapest choices, 3, got 2"):
        allocate([{"a": {0: 3, 1: 5}}], {"a": {0: 1.0, 1: 0.0}}, [2])


@pytest.mark.parametrize("unit", ["layers.0.qkv", "layers.1.o", "layers.0.gate_up", "layers.1.down", LM_HEAD])
def test_predicted_divergence_approximates_measured_divergence(unit, checkpoint):
    network = modeling.load(checkpoint)
    if unit == LM_HEAD:
        modeling.untie(network)
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(1, 300, (48,), generator=generator).tolist() for _ in range(24)]
    with torch.no_grad():
        before = [network(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]
    fisher = fisher_diagonals(network, windows, seed=0, progress=lambda _: None)
    names = modeling.unit_modules(network)[unit]
    window_inputs = []
    module = network.get_submodule(names[0])
    handle = module.register_forward_pre_hook(lambda _, args: window_inputs.append(args[0][0]))
    with torch.no_grad():
        for window in windows:
            network(torch.tensor([window]))
    handle.remove()
    inputs = torch.cat(window_inputs).double()
    changes = []
    for name in names:
        weight = network.get_submodule(name).weight
        changes.append(torch.randn(weight.shape, generator=generator) * 0.02 * weight.std())
        weight.data += changes[-1]
    with torch.no_grad():
        after = [network(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]
    measured = sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True)) / (24 * 48)
    predicted = predict_divergence(torch.cat(changes), fisher[unit], inputs.T @ inputs / len(inputs))
    assert predicted == pytest.approx(measured, rel=0.5)


def test_predicted_divergence_matches_formula():
    generator = torch.Generator().manual_seed(0)
    change, inputs = torch.randn(3, 5, generator=generator), torch.randn(7, 5, generator=generator)
    fisher = torch.rand(3, generator=generator)
    terms = [sum(g * (row @ x) ** 2 for g, row in zip(fisher, change, strict=True)) for x in inputs]
    hessian = (inputs.T @ inputs / 7).double()
    assert predict_divergence(change, fisher.double(), hessian) == pytest.approx(float(sum(terms)) / 14, rel=1e-5)


def test_embedding_divergence_weights_rows_by_frequency():
    generator = torch.Generator().manual_seed(0)
    change, fisher = torch.randn(4, 3, generator=generator), torch.rand(3, generator=generator)
    tokens = [0, 2, 2, 3]
    terms = [sum(g * d**2 for g, d in zip(fisher, change[token], strict=True)) for token in tokens]
    frequency = torch.tensor([0.25, 0.0, 0.5, 0.25]).double()
    predicted = predict_embedding_divergence(change, fisher.double(), frequency)
    assert predicted == pytest.approx(float(sum(terms)) / 8, rel=1e-5)


def test_interrupted_sensitivity_sweep_resumes_after_last_layer(checkpoint, tmp_path):
    """The first attempt is interrupted after layer 1; the second one starts with layer 2."""
    windows = [[n % 290 + 1 for n in range(start, start + 32)] for start in (0, 7)]
    choices = {
        item: [
            QuantizationScheme(bits=4, block_size=16, symmetric=True),
            QuantizationScheme(bits=8, block_size=16, symmetric=True),
        ]
        for item in (*(n for n in checkpoint.spec.matrices if n.startswith("layers")), TABLES)
    }
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if line.startswith("measuring sensitivity: layer 2") and len(lines) < 10:
            raise KeyboardInterrupt

    context = replace(compression_context(checkpoint, TEXT), cache=StageCache(tmp_path), progress=progress)

    def attempt():
        return predict_losses(modeling.load(checkpoint), checkpoint, choices, Rtn(), windows, context, seed=0)

    with pytest.raises(KeyboardInterrupt):
        attempt()
    lines += ["interrupted"] * 10
    losses = attempt()
    assert not [line for line in lines[lines.index("interrupted") :] if "layer 1" in line]
    assert losses.keys() == choices.keys()
    int4, int8 = choices[TABLES]
    assert all(row[int8] < row[int4] for row in losses.values())


@pytest.mark.parametrize("bits", [3.0, 4.5, 6.0])
def test_bits_per_weight_budget_is_nearly_used(bits, checkpoint, tmp_path):
    spec = small_step(bits_per_weight=bits).apply(checkpoint, tmp_path, compression_context(checkpoint, TEXT))
    assert bits - 0.4 < spec.bits_per_weight <= bits
    assert spec.tied_embeddings, "tied tables stay tied"


def test_planned_bits_per_weight_matches_the_budget(checkpoint):
    planned = small_step(bits_per_weight=5.0).plan(checkpoint.spec)
    assert 4.6 < planned.bits_per_weight <= 5.0


def test_size_budget_limits_the_stored_bytes(checkpoint):
    assert small_step(bits_per_weight=None, size="50 kB").plan(checkpoint.spec).bits_per_weight < 8
    planned = small_step(bits_per_weight=None, size="50 kB").plan(checkpoint.spec)
    stored = [name for name in planned.matrices if name != "embedding"]
    assert 45e3 < sum(map(planned.size_bytes, stored)) <= 50e3


def test_report_lists_the_bits_of_every_unit(checkpoint, tmp_path):
    small_step().apply(checkpoint, tmp_path, compression_context(checkpoint, TEXT))
    report = json.loads((tmp_path / "artifacts" / "mixed_precision.json").read_text())
    assert set(report["bits"]) == {
        *(f"layers.{n}.{u}" for n in (0, 1) for u in ("qkv", "o", "gate_up", "down")),
        "tables",
    }
    assert report["divergence_nats"] > 0


def test_mixed_precision_beats_one_scheme_of_equal_size(checkpoint, tmp_path):
    """The random model is most sensitive in its tables, so they get more bits."""
    network = modeling.load(checkpoint)
    context = compression_context(checkpoint, TEXT)
    windows = [[n % 290 + 1 for n in range(start, start + 40, 3)] for start in range(0, 200, 9)]
    with torch.no_grad():
        before = [network(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]

    def divergence(quantized: Checkpoint) -> float:
        with torch.no_grad():
            after = [modeling.load(quantized)(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]
        return sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True))

    scheme = QuantizationScheme(bits=4, block_size=32, symmetric=True)
    (tmp_path / "mixed").mkdir(), (tmp_path / "uniform").mkdir()
    step = small_step(bits_per_weight=4.5, rounding=Rtn(), weights=("int8", "int4", "int2"))
    mixed = Checkpoint.seal(
        tmp_path / "mixed", format="checkpoint-1", spec=step.apply(checkpoint, tmp_path / "mixed", context), made_by={}
    )
    uniform_step = small_step(bits_per_weight=4.5, rounding=Rtn(), weights=("int4",), block_sizes=(32,))
    uniform = Checkpoint.seal(
        tmp_path / "uniform",
        format="checkpoint-1",
        spec=uniform_step.apply(checkpoint, tmp_path / "uniform", context),
        made_by={},
    )
    assert set(uniform.spec.schemes.values()) == {scheme}
    assert mixed.spec.bits_per_weight <= uniform.spec.bits_per_weight
    assert divergence(mixed) <= divergence(uniform)


# blocks of 16 take twice as long as blocks of 32, and all take longer with larger working sets
KERNELS = KernelTimes(
    threads=2,
    matrix={
        f"int{bits}/{block}": tuple(
            tuple(0.1 * bits * 16 / block * n * slowdown for n in (1, 3, 9, 27))
            for slowdown in (1.0, 1.1, 1.3, 1.6, 2.0, 3.0)
        )
        for bits, blocks in BLOCK_SIZES.items()
        for block in blocks
    },
    layer=(5.0, 1.0, 0.0),
    token=(2.0, 1.0),
)


def timed_step(decode: str, **values) -> MixedPrecision:
    return small_step(bits_per_weight=None, decode=decode, kernels=KERNELS, **values)


@pytest.mark.parametrize("decode", ["20 us", "0.026 ms"])
def test_time_budget_is_nearly_used(decode, checkpoint):
    planned = timed_step(decode).plan(checkpoint.spec)
    budget = units.parse(decode, "us")
    assert 0.8 * budget < KERNELS.decode_us(planned) <= budget


def test_more_time_buys_more_bits(checkpoint):
    bits = [timed_step(f"{us} us").plan(checkpoint.spec).bits_per_weight for us in (18, 20, 24, 40)]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1] == small_step(bits_per_weight=100.0).plan(checkpoint.spec).bits_per_weight


def test_allocation_within_time_is_optimal(checkpoint):
    """Compare with every allocation of a one-layer model."""
    spec = replace(checkpoint.spec, layers=checkpoint.spec.layers[:1])
    step = timed_step("12 us", weights=("int8", "int4"), block_sizes=(16, 32))
    losses = {
        item: {scheme: sum(map(ord, item)) % 7 * 4.0**-scheme.bits * scheme.block_size for scheme in schemes}
        for item, schemes in step._choices(spec).items()
    }
    allocation = step._allocate(spec, losses)

    def loss(allocation):
        return sum(losses[item][scheme] for item, scheme in allocation.items())

    def decode_us(allocation):
        schemes = {item: scheme for item, scheme in allocation.items() if item != TABLES}
        return KERNELS.decode_us(
            replace(spec, schemes=schemes | dict.fromkeys((LM_HEAD, "embedding"), allocation[TABLES]))
        )

    allocations = [dict(zip(losses, schemes, strict=True)) for schemes in itertools.product(*losses.values())]
    allowed = [allocation for allocation in allocations if decode_us(allocation) <= 12]
    assert 0 < len(allowed) < len(allocations)
    assert decode_us(allocation) <= 12
    assert loss(allocation) == pytest.approx(min(map(loss, allowed)))


def test_plan_rejects_an_unreachable_time_budget(checkpoint):
    with pytest.raises(ConfigError, match=r"must be at least 0\.01\d* ms, the time of the fastest choices") as error:
        timed_step("5 us").plan(checkpoint.spec)
    assert error.value.location == "decode"


def test_two_bits_are_offered_in_supported_blocks(checkpoint):
    step = small_step(weights=("int2",), block_sizes=(16, 32))
    assert {scheme.block_size for schemes in step._choices(checkpoint.spec).values() for scheme in schemes} == {32}


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"decode": "5 ms"}, "bits_per_weight"),
        ({"bits_per_weight": None, "decode": "5 ms"}, "decode"),
        ({"bits_per_weight": None, "decode": "5", "kernels": KERNELS}, ""),
        ({"bits_per_weight": None}, "bits_per_weight"),
        ({"size": "1 MB"}, "bits_per_weight"),
        ({"bits_per_weight": None, "size": "90"}, ""),
        ({"weights": ()}, "weights"),
        ({"block_sizes": (48,)}, "block_sizes"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_values_outside_their_range_are_rejected(values, location):
    with pytest.raises(ConfigError) as error:
        small_step(**values)
    assert error.value.location == location


def test_plan_rejects_an_unreachable_bit_budget(checkpoint):
    with pytest.raises(ConfigError, match=r"at least 2\.500 bits per weight, got 1\.000") as error:
        small_step(bits_per_weight=1.0).plan(checkpoint.spec)
    assert error.value.location == "bits_per_weight"
