"""Test the Python API the way a notebook uses it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sweeping import prepare

import edgeopt
from edgeopt import api
from edgeopt.errors import ConfigError, InfeasibleError, InputError


@pytest.fixture(scope="module")
def swept(tiny_model: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgeopt.Study]:
    """Yield the study of a tiny sweep, run in its own working folder. The sweep must print nothing."""
    folder = tmp_path_factory.mktemp("api")
    prepare(folder, tiny_model, cache=shared_cache)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            study = edgeopt.sweep(sweep="tiny_sweep", overrides=["search.study=api"], config_dir=folder)
        assert (out.getvalue(), err.getvalue()) == ("", "")
        yield study


def test_every_public_name_resolves() -> None:
    for name in edgeopt.__all__:
        assert getattr(edgeopt, name) is not None
    assert set(api.__all__) <= set(edgeopt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        edgeopt.swep  # noqa: B018


def test_import_is_lazy() -> None:
    code = "import edgeopt, sys; print(len([m for m in sys.modules if m.startswith('edgeopt')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_sweep_returns_a_study(swept: edgeopt.Study) -> None:
    assert swept.name == "api"
    assert len(swept.trials) == 5
    assert swept.front
    assert {trial.outcome for trial in swept.front} == {"front"}
    champion = swept.champion
    assert champion is not None
    assert (champion.name, champion.trial) == ("tiny", swept.best().number)
    assert swept.best(by="size/engine_mib").metrics["size/engine_mib"] == min(
        trial.metrics["size/engine_mib"] for trial in swept.front
    )
    with pytest.raises(InputError, match="`by` must be one of quality/perplexity, size/engine_mib; got 'speed'"):
        swept.best(by="speed")


def test_study_is_shown_as_table_and_chart(swept: edgeopt.Study) -> None:
    table = swept.trials.to_pandas()
    assert list(table.index) == [0, 1, 2, 3, 4]
    assert {"outcome", "params.recipe", "metrics.size/engine_mib"} <= set(table.columns)
    html = swept._repr_html_()
    assert "Recommended: trial" in html
    assert "<table>" in html
    names = {trace.name for trace in swept.plot_front(x="size/engine_mib").data if trace.name}
    assert {"on the front", "original model"} <= names
    with pytest.raises(InputError, match="`x` must be one of"):
        swept.plot_front(x="speed")


def test_study_explains_a_trial(swept: edgeopt.Study) -> None:
    lines = swept.explain(swept.best()).splitlines()
    assert [line.split(":")[0] for line in lines] == ["recipe", "gained", "lost", "limits", "outcome"]
    assert "smaller" in lines[1]
    assert "within 1024 MiB" in lines[3]
    assert "on the front" in lines[4]
    with pytest.raises(InputError, match="study 'api' has no trial 99"):
        swept.explain(99)


def test_study_loads_promotes_and_rolls_back(swept: edgeopt.Study) -> None:
    loaded = edgeopt.load_study("api")
    assert [trial.number for trial in loaded.front] == [trial.number for trial in swept.front]
    with pytest.raises(InputError, match="there is no study"):
        edgeopt.load_study("nothing")
    plan = edgeopt.promote(loaded, policy="tiny", dry_run=True, config_dir=Path.cwd())
    assert plan.dry_run
    dominated = next(trial.number for trial in swept.trials if not trial.on_front)
    with pytest.raises(InputError, match=f"only trials on the front can be promoted, got trial {dominated}"):
        edgeopt.promote(loaded, policy="tiny", trial=dominated, config_dir=Path.cwd())
    checks = edgeopt.verify("tiny@champion")
    assert checks.require().digest == checks.digest
    with pytest.raises(edgeopt.GateError, match="no earlier version is left"):
        edgeopt.rollback("tiny@champion", reason="test")


def test_engine_generates(swept: edgeopt.Study) -> None:
    with edgeopt.load_engine("models:/tiny@champion", threads=1) as engine:
        assert engine.digest[:12] in repr(engine)
        assert isinstance(engine.generate("def read(", max_new_tokens=4), str)
        with pytest.raises(ConfigError, match="`max_new_tokens` must be at least 1, got 0"):
            engine.generate("def read(", max_new_tokens=0)
    engine.close()


def test_recipe_is_predicted(tiny_model: Path) -> None:
    prediction = edgeopt.predict(model=tiny_model, recipe="int4", overrides=["target.context_length=96"])
    assert prediction["size/engine_mib"] < 0.2
    assert prediction.fits
    assert "size/engine_mib" in prediction._repr_html_()
    limited = edgeopt.predict(
        model=str(tiny_model), recipe="int4", limits={"size/engine_mib": "1 kB"}, overrides=["target.context_length=96"]
    )
    assert not limited.fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "int5"}, "int5"),
        ({"limits": {"size.engin_mib": "1 MiB"}}, "unknown metric"),
        ({"limits": {"size.engine_mib": "1 elephant"}}, "elephant"),
        ({"overrides": "recipe=int4"}, "`overrides` must be a list"),
        ({"model": "./nowhere"}, "nowhere"),
    ],
)
def test_bad_argument_raises_one_clear_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        edgeopt.predict(**arguments)  # type: ignore[arg-type]


def test_sweep_rejects_overrides_as_one_string() -> None:
    with pytest.raises(ConfigError, match="`overrides` must be a list of strings"):
        edgeopt.sweep(overrides="search.trials=3")


def test_single_run_returns_its_result(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path
) -> None:
    prepare(tmp_path, tiny_model, cache=shared_cache)
    monkeypatch.chdir(tmp_path)
    quick = [
        "target.context_length=96",
        "measure.prompt_lengths=[16]",
        "measure.window_tokens=64",
        "measure.max_windows=4",
        *(f"measure.probes.{name}=null" for name in ("energy", "latency", "parity", "memory", "continuations")),
    ]
    single = edgeopt.run(model=tiny_model, recipe="int8", limits={"size.engine_mib": "1 kB"}, overrides=quick)
    assert single.run_id
    assert isinstance(single.error, InfeasibleError)
    assert "size/engine_mib" in str(single.error)
