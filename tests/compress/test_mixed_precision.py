"""Mixed precision: predictions that hold, an allocation that is exact, and a budget that is kept."""

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
from edgeopt.compress.quantization.sensitivity import curvature, predicted_divergence, predicted_divergence_of_lookup
from edgeopt.compress.quantization.sensitivity_sweep import TABLES, weigh
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


def small(**values) -> MixedPrecision:
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
def test_no_choice_within_the_budget_loses_less(table, slack):
    costs = {str(n): {k: cost for k, (cost, _) in enumerate(row)} for n, row in enumerate(table)}
    losses = {str(n): {k: loss for k, (_, loss) in enumerate(row)} for n, row in enumerate(table)}
    budget = sum(min(row.values()) for row in costs.values()) + slack
    found = allocate([costs], losses, [budget])
    assert sum(costs[item][choice] for item, choice in found.items()) <= budget
    everything = itertools.product(*(list(row) for row in costs.values()))
    least = min(
        sum(losses[item][choice] for item, choice in zip(costs, choices, strict=True))
        for choices in everything
        if sum(costs[item][choice] for item, choice in zip(costs, choices, strict=True)) <= budget
    )
    assert sum(losses[item][choice] for item, choice in found.items()) == pytest.approx(least, abs=1e-6)


def test_a_budget_below_the_cheapest_choices_is_refused():
    with pytest.raises(StepError, match="budget is 2, but the cheapest choices need 3"):
        allocate([{"a": {0: 3, 1: 5}}], {"a": {0: 1.0, 1: 0.0}}, [2])


@pytest.mark.parametrize("unit", ["layers.0.qkv", "layers.1.o", "layers.0.gate_up", "layers.1.down", LM_HEAD])
def test_the_predicted_divergence_is_near_the_true_one_for_small_random_changes(unit, checkpoint):
    network = modeling.load(checkpoint)
    if unit == LM_HEAD:
        modeling.untie(network)
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(1, 300, (48,), generator=generator).tolist() for _ in range(24)]
    with torch.no_grad():
        before = [network(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]
    means = curvature(network, windows, seed=0, progress=lambda _: None)
    names = modeling.units(network)[unit]
    seen = []
    handle = network.get_submodule(names[0]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for window in windows:
            network(torch.tensor([window]))
    handle.remove()
    inputs = torch.cat(seen).double()
    changes = []
    for name in names:
        weight = network.get_submodule(name).weight
        changes.append(torch.randn(weight.shape, generator=generator) * 0.02 * weight.std())
        weight.data += changes[-1]
    with torch.no_grad():
        after = [network(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]
    true = sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True)) / (24 * 48)
    predicted = predicted_divergence(torch.cat(changes), means[unit], inputs.T @ inputs / len(inputs))
    assert predicted == pytest.approx(true, rel=0.5)


def test_the_predicted_divergence_is_half_the_mean_square_of_gradients_times_changed_outputs():
    generator = torch.Generator().manual_seed(0)
    change, inputs = torch.randn(3, 5, generator=generator), torch.randn(7, 5, generator=generator)
    gradient = torch.rand(3, generator=generator)
    each = [sum(g * (row @ x) ** 2 for g, row in zip(gradient, change, strict=True)) for x in inputs]
    hessian = (inputs.T @ inputs / 7).double()
    assert predicted_divergence(change, gradient.double(), hessian) == pytest.approx(float(sum(each)) / 14, rel=1e-5)


def test_the_predicted_divergence_of_a_lookup_counts_each_row_as_often_as_its_token():
    generator = torch.Generator().manual_seed(0)
    change, gradient = torch.randn(4, 3, generator=generator), torch.rand(3, generator=generator)
    tokens = [0, 2, 2, 3]
    each = [sum(g * d**2 for g, d in zip(gradient, change[token], strict=True)) for token in tokens]
    frequency = torch.tensor([0.25, 0.0, 0.5, 0.25]).double()
    found = predicted_divergence_of_lookup(change, gradient.double(), frequency)
    assert found == pytest.approx(float(sum(each)) / 8, rel=1e-5)


def test_choices_that_were_weighed_before_a_kill_are_not_weighed_again(checkpoint, tmp_path):
    """The state of the first attempt, which dies after the first layer, serves the second."""
    windows = [[n % 290 + 1 for n in range(start, start + 32)] for start in (0, 7)]
    choices = {
        item: [
            QuantizationScheme(bits=4, block_size=16, symmetric=True),
            QuantizationScheme(bits=8, block_size=16, symmetric=True),
        ]
        for item in (*(n for n in checkpoint.spec.matrices if n.startswith("layers")), TABLES)
    }
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("weighing the choices of layer 2") and len(said) < 10:
            raise KeyboardInterrupt

    context = replace(compression_context(checkpoint, TEXT), cache=StageCache(tmp_path), progress=tell)

    def attempt():
        return weigh(modeling.load(checkpoint), checkpoint, choices, Rtn(), windows, context, seed=0)

    with pytest.raises(KeyboardInterrupt):
        attempt()
    said += ["killed"] * 10
    losses = attempt()
    assert not [line for line in said[said.index("killed") :] if "layer 1" in line]
    assert losses.keys() == choices.keys()
    eight, four = choices[TABLES][1], choices[TABLES][0]
    assert all(row[eight] < row[four] for row in losses.values())


@pytest.mark.parametrize("bits", [3.0, 4.5, 6.0])
def test_the_budget_is_kept_and_nearly_used(bits, checkpoint, tmp_path):
    spec = small(bits_per_weight=bits).apply(checkpoint, tmp_path, compression_context(checkpoint, TEXT))
    assert bits - 0.4 < spec.bits_per_weight <= bits
    assert spec.tied_embeddings, "tied tables stay one"


def test_the_plan_takes_as_many_bytes_as_the_true_allocation_may(checkpoint):
    planned = small(bits_per_weight=5.0).plan(checkpoint.spec)
    assert 4.6 < planned.bits_per_weight <= 5.0


def test_a_size_is_a_budget_too(checkpoint):
    assert small(bits_per_weight=None, size="50 kB").plan(checkpoint.spec).bits_per_weight < 8
    planned = small(bits_per_weight=None, size="50 kB").plan(checkpoint.spec)
    stored = [name for name in planned.matrices if name != "embedding"]
    assert 45e3 < sum(map(planned.size_bytes, stored)) <= 50e3


def test_the_report_tells_the_bits_of_every_unit(checkpoint, tmp_path):
    small().apply(checkpoint, tmp_path, compression_context(checkpoint, TEXT))
    report = json.loads((tmp_path / "artifacts" / "mixed_precision.json").read_text())
    assert set(report["bits"]) == {
        *(f"layers.{n}.{u}" for n in (0, 1) for u in ("qkv", "o", "gate_up", "down")),
        "tables",
    }
    assert report["divergence_nats"] > 0


def test_it_loses_less_than_one_grid_for_all_at_the_same_bytes(checkpoint, tmp_path):
    """The tables of this random model matter most, so they get the bits."""
    network = modeling.load(checkpoint)
    context = compression_context(checkpoint, TEXT)
    windows = [[n % 290 + 1 for n in range(start, start + 40, 3)] for start in range(0, 200, 9)]
    with torch.no_grad():
        before = [network(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]

    def lost(made: Checkpoint) -> float:
        with torch.no_grad():
            after = [modeling.load(made)(torch.tensor([w])).logits[0].log_softmax(-1) for w in windows]
        return sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True))

    grid = QuantizationScheme(bits=4, block_size=32, symmetric=True)
    (tmp_path / "mixed").mkdir(), (tmp_path / "uniform").mkdir()
    step = small(bits_per_weight=4.5, rounding=Rtn(), weights=("int8", "int4", "int2"))
    mixed = Checkpoint.seal(
        tmp_path / "mixed", format="checkpoint-1", spec=step.apply(checkpoint, tmp_path / "mixed", context), made_by={}
    )
    only = small(bits_per_weight=4.5, rounding=Rtn(), weights=("int4",), block_sizes=(32,))
    uniform = Checkpoint.seal(
        tmp_path / "uniform",
        format="checkpoint-1",
        spec=only.apply(checkpoint, tmp_path / "uniform", context),
        made_by={},
    )
    assert set(uniform.spec.schemes.values()) == {grid}
    assert mixed.spec.bits_per_weight <= uniform.spec.bits_per_weight
    assert lost(mixed) <= lost(uniform)


# blocks of 16 are slow and blocks of 32 fast; more so among more bytes
KERNELS = KernelTimes(
    threads=2,
    matrix={
        f"int{bits}/{block}": tuple(
            tuple(0.1 * bits * 16 / block * n * slower for n in (1, 3, 9, 27))
            for slower in (1.0, 1.1, 1.3, 1.6, 2.0, 3.0)
        )
        for bits, blocks in BLOCK_SIZES.items()
        for block in blocks
    },
    layer=(5.0, 1.0, 0.0),
    token=(2.0, 1.0),
)


def timed(decode: str, **values) -> MixedPrecision:
    return small(bits_per_weight=None, decode=decode, kernels=KERNELS, **values)


@pytest.mark.parametrize("decode", ["20 us", "0.026 ms"])
def test_a_budget_of_time_is_kept_by_the_arithmetic_that_predicts_it(decode, checkpoint):
    planned = timed(decode).plan(checkpoint.spec)
    budget = units.parse(decode, "us")
    assert 0.8 * budget < KERNELS.decode_us(planned) <= budget


def test_more_time_never_loses_more(checkpoint):
    bits = [timed(f"{us} us").plan(checkpoint.spec).bits_per_weight for us in (18, 20, 24, 40)]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1] == small(bits_per_weight=100.0).plan(checkpoint.spec).bits_per_weight


def test_no_allocation_within_the_time_loses_less(checkpoint):
    """Every allocation of a one-layer model is tried."""
    spec = replace(checkpoint.spec, layers=checkpoint.spec.layers[:1])
    step = timed("12 us", weights=("int8", "int4"), block_sizes=(16, 32))
    losses = {
        item: {grid: sum(map(ord, item)) % 7 * 4.0**-grid.bits * grid.block_size for grid in schemes}
        for item, schemes in step._choices(spec).items()
    }
    found = step._allocate(spec, losses)

    def loss(allocation):
        return sum(losses[item][grid] for item, grid in allocation.items())

    def decode_us(allocation):
        schemes = {item: grid for item, grid in allocation.items() if item != TABLES}
        return KERNELS.decode_us(
            replace(spec, schemes=schemes | dict.fromkeys((LM_HEAD, "embedding"), allocation[TABLES]))
        )

    every = [dict(zip(losses, schemes, strict=True)) for schemes in itertools.product(*losses.values())]
    allowed = [allocation for allocation in every if decode_us(allocation) <= 12]
    assert 0 < len(allowed) < len(every)
    assert decode_us(found) <= 12
    assert loss(found) == pytest.approx(min(map(loss, allowed)))


def test_a_budget_of_time_that_cannot_be_kept_is_refused_when_planned(checkpoint):
    with pytest.raises(ConfigError, match=r"below the 0\.01\d* ms that the fastest choices take") as caught:
        timed("5 us").plan(checkpoint.spec)
    assert caught.value.location == "decode"


def test_two_bits_are_offered_in_blocks_that_have_a_fast_kernel(checkpoint):
    step = small(weights=("int2",), block_sizes=(16, 32))
    assert {grid.block_size for schemes in step._choices(checkpoint.spec).values() for grid in schemes} == {32}


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
def test_values_outside_their_range_are_refused(values, location):
    with pytest.raises(ConfigError) as caught:
        small(**values)
    assert caught.value.location == location


def test_a_budget_that_cannot_be_kept_is_refused_when_planned(checkpoint):
    with pytest.raises(ConfigError, match=r"below the 2\.500 bits per weight") as caught:
        small(bits_per_weight=1.0).plan(checkpoint.spec)
    assert caught.value.location == "bits_per_weight"
