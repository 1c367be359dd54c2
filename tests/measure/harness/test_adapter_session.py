"""Test the choice of the adapter for measured requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import toy_bench

from edgeopt.core.artifact import Engine
from edgeopt.core.model_spec import Adapter
from edgeopt.core.protocols import Session
from edgeopt.errors import MeasureError
from edgeopt.measure.harness.adapter_session import AdapterSession
from edgeopt.measure.harness.bench import measure
from edgeopt.measure.harness.fake_runtime import FakeRuntime


class AdapterIndexSession:
    """Session that generates the index of its adapter: 0 for none, 1 for `one`, 2 for `two`."""

    backends = ("echo",)

    def generate(self, tokens, max_new_tokens, *, stop_at_end=True, adapter=None):
        yield (None, "one", "two").index(adapter)

    def logits(self, tokens, *, adapter=None):
        return [(None, "one", "two").index(adapter)]

    def close(self):
        pass


def test_requests_default_to_the_measured_adapter():
    session: Session = AdapterSession(session=AdapterIndexSession(), adapter="one")
    assert [*session.generate([1], 1), *session.generate([1], 1, adapter="two")] == [1, 2]
    assert [*session.logits([1]), *session.logits([1], adapter="two")] == [1, 2]


def measure_with_adapter(folder: Path, engine: Engine) -> None:
    bench = toy_bench.make_bench("parity", adapter="tests")
    measure(
        engine, FakeRuntime(), bench, toy_bench.TARGET, toy_bench.make_text(), folder / "measured", {}, lambda _: None
    )


def test_engine_without_adapters_is_measured(tmp_path: Path):
    measure_with_adapter(tmp_path, toy_bench.build(tmp_path, FakeRuntime()))


def test_unknown_adapter_is_an_error(tmp_path: Path):
    built = toy_bench.build(tmp_path, FakeRuntime())
    spec = replace(built.spec, adapters={"other": Adapter(rank=2, targets=("o_proj",))})
    engine = Engine.seal(built.directory, format=built.format, spec=spec, made_by={})
    with pytest.raises(MeasureError, match=r"adapter.*got 'tests'"):
        measure_with_adapter(tmp_path, engine)
