from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.artifact import MANIFEST, Engine
from edgeopt.core.study_snapshot import Champion, TrialSnapshot
from edgeopt.errors import ConfigError, GateError, InfeasibleError, InputError, TrackingError
from edgeopt.release.gates.metrics import RequiredMetrics
from edgeopt.release.promote import promote
from edgeopt.release.ranking import Criterion
from edgeopt.release.registry import client as registry
from edgeopt.release.registry import fast_reader

from .conftest import Desk


def model_folder(desk: Desk, row: TrialSnapshot) -> Path:
    run = desk.client.get_run(row.run_id)
    model = desk.client.get_logged_model(run.outputs.model_outputs[0].model_id)
    return Path(model.artifact_location)


def test_the_front_is_registered_and_the_best_is_champion(desk: Desk) -> None:
    done = promote(**desk.arguments())
    versions = desk.versions()
    assert [release.number for release in done.releases] == [0, 1, 2]
    assert all(release.created for release in done.releases)
    assert [v.tags[tags.TRIAL] for v in versions] == ["s/0", "s/1", "s/2"]
    assert all(v.tags[tags.TARGET] == "sbc_4gib" and v.tags[tags.EMULATED] == "true" for v in versions)
    assert all(v.tags[tags.RECIPE] == "bits=4" for v in versions)
    assert len({v.tags[tags.ENGINE_DIGEST] for v in versions}) == 3
    # 0.4 × quality + 0.3 × latency + 0.3 × memory, each scaled over the front: 0.6, 0.445…, 0.4
    assert done.aliases == {"champion": done.releases[2].version}
    assert done.moved == {"champion": None}
    assert fast_reader.champion(desk.policy.model, desk.uri) == Champion(name=desk.policy.model, version="3", trial=2)
    json.dumps(done.to_json())


def test_the_card_holds_limits_recipe_and_lineage(desk: Desk) -> None:
    promote(**desk.arguments())
    card = desk.versions()[0].description
    assert "**prune_width → quantize**: trial 0 of study s, for sbc_4gib." in card
    assert "| latency/decode_p50_ms | at most 0.8 x baseline = 1.04 ms | 0.9 ms | 13% |" in card
    assert "limits are emulated" in card
    assert desk.rows[0].run_id in card
    assert desk.versions()[0].tags[tags.ENGINE_DIGEST] in card
    assert "d1ge57" in card
    assert "`bits` = `4`" in card
    assert len(card) < 5000


def test_promoting_again_changes_nothing(desk: Desk) -> None:
    first = promote(**desk.arguments())
    before = [v.last_updated_timestamp for v in desk.versions()]
    again = promote(**desk.arguments())
    assert [r.version for r in again.releases] == [r.version for r in first.releases]
    assert not any(release.created for release in again.releases)
    assert again.moved == {}
    assert [v.last_updated_timestamp for v in desk.versions()] == before


def test_another_ranking_moves_the_alias_and_adds_others(desk: Desk) -> None:
    promote(**desk.arguments())
    best = (Criterion(metric="quality/perplexity_ratio", direction="minimize", weight=1.0),)
    worst = (Criterion(metric="memory/peak_rss_mib", direction="maximize", weight=1.0),)
    moved = promote(**desk.arguments(policy=replace(desk.policy, aliases={"champion": best, "largest": worst})))
    assert moved.moved == {"champion": "3", "largest": None}
    assert registry.aliases(desk.client, desk.policy.model) == {"champion": "1", "largest": "1"}


def test_nothing_feasible_registers_nothing(desk: Desk) -> None:
    with pytest.raises(InfeasibleError, match="nothing is promoted") as caught:
        promote(**desk.arguments(rows=desk.rows[3:]))
    assert caught.value.exit_code == 3
    with pytest.raises(MlflowException):
        desk.client.get_registered_model(desk.policy.model)
    assert fast_reader.champion(desk.policy.model, desk.uri) is None


def test_a_trial_that_breaks_a_limit_is_never_registered(desk: Desk) -> None:
    promote(**desk.arguments(rows=[*desk.rows[:3], replace(desk.rows[3], pareto_rank=1)]))
    assert len(desk.versions()) == 3


def flip(folder: Path) -> None:
    path = folder / "engine" / "table.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reseal(folder: Path) -> None:
    flip(folder)
    manifest = json.loads((folder / "engine" / MANIFEST).read_text())
    sealed = Engine.read(folder / "engine")
    Engine.seal(folder / "engine", format=sealed.format, spec=sealed.spec, made_by=manifest["made_by"])


def remade(folder: Path) -> None:
    path = folder / "engine" / MANIFEST
    path.write_text(path.read_text().replace('"versions": {}', '"versions": {"x": "1"}'))


DEFECTS = {
    "a flipped byte": (flip, r"trial 0, engine: .*table\.npy: the file was modified"),
    "a missing file": (lambda f: (f / "engine" / "tokenizer.json").unlink(), r"'tokenizer\.json' is missing"),
    "another engine": (reseal, r"digest is .*, measured was"),
    "another manifest": (remade, "the manifest is not the one that was measured"),
    "no manifest": (lambda f: (f / "engine" / MANIFEST).unlink(), "no manifest"),
    "no flavor": (lambda f: (f / "MLmodel").write_text("flavors: {onnx: {}}\n"), "no edgeopt flavor, only: onnx"),
    "no artifacts": (shutil.rmtree, "trial 0, engine: "),
}


def test_promotion_needs_no_engine_of_the_cache(desk: Desk, spare: TrialSnapshot, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "engine")
    done = promote(**desk.arguments(rows=[spare], study=desk.policy.model))
    assert [release.created for release in done.releases] == [True]
    assert registry.resolve(f"models:/{desk.policy.model}@champion", desk.uri).is_dir()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_damaged_engine_is_refused(desk: Desk, spare: TrialSnapshot, defect: str) -> None:
    spoil, message = DEFECTS[defect]
    spoil(model_folder(desk, spare))
    with pytest.raises(GateError, match=message) as caught:
        promote(**desk.arguments(rows=[spare], study=desk.policy.model))
    assert caught.value.exit_code == 4
    assert desk.versions() == []


def test_every_refusal_is_listed_and_one_stops_all(desk: Desk) -> None:
    first, second, third = desk.rows[:3]
    measured = {k: v for k, v in second.metrics.items() if k != "latency/decode_p50_ms"}
    rows = [
        replace(first, excess={**first.excess, "memory/peak_rss_mib": 0.2}),
        replace(second, metrics=measured),
        replace(third, run_id=None),
    ]
    with pytest.raises(GateError) as caught:
        promote(**desk.arguments(rows=rows))
    told = str(caught.value)
    assert "trial 0, limits: memory/peak_rss_mib is 20.0% beyond its limit (at most 90 MiB)" in told
    assert "trial 1, limits: latency/decode_p50_ms was not measured" in told
    assert "trial 1, metrics: latency/decode_p50_ms was not measured" in told
    assert "trial 2, engine: the trial has no MLflow run" in told
    assert desk.versions() == []


def test_a_gate_of_the_policy_is_asked(desk: Desk) -> None:
    stricter = replace(desk.policy, gates=(RequiredMetrics(metrics=("energy/measured/cpu",)),))
    with pytest.raises(GateError, match=r"3 refused.*energy/measured/cpu"):
        promote(**desk.arguments(policy=stricter))


def test_an_engine_that_was_not_logged_completely_is_refused(desk: Desk) -> None:
    experiment = desk.client.get_experiment_by_name("edgeopt").experiment_id
    run = desk.client.create_run(experiment)
    desk.client.create_logged_model(experiment, name=tags.ENGINE_MODEL_NAME, source_run_id=run.info.run_id)
    row = replace(desk.rows[0], run_id=run.info.run_id)
    with pytest.raises(GateError, match="its run keeps no engine"):
        promote(**desk.arguments(rows=[row]))


def test_a_run_of_another_store_is_an_error_of_tracking(desk: Desk) -> None:
    with pytest.raises(TrackingError, match="registry refused"):
        promote(**desk.arguments(rows=[replace(desk.rows[0], run_id="0" * 32)]))


def test_a_model_card_of_ones_own_and_a_faulty_one(desk: Desk, tmp_path: Path) -> None:
    card = tmp_path / "registry" / "model_card.md.j2"
    card.parent.mkdir()
    card.write_text("Trial {{ trial }} | {{ 'a|b' | cell }}")
    promote(**desk.arguments(config_dir=tmp_path))
    assert desk.versions()[1].description == "Trial 1 | a/b\n"
    card.write_text("{{ trail }}")
    with pytest.raises(ConfigError, match=r"model_card\.md\.j2.*'trail' is undefined"):
        promote(**desk.arguments(config_dir=tmp_path))
    card.write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="unsafe"):
        promote(**desk.arguments(config_dir=tmp_path))


def test_mlflows_own_uri_stays_as_it_was(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for own in (None, f"sqlite:///{tmp_path}/other.db"):
        if own is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        before = mlflow.get_tracking_uri()
        assert fast_reader.champion("nothing", desk.uri) is None
        assert mlflow.get_tracking_uri() == before
        assert os.environ.get("MLFLOW_TRACKING_URI") == own


def test_a_registered_engine_resolves_and_generates(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(**desk.arguments())
    champion = registry.resolve(f"models:/{desk.policy.model}@champion", desk.uri)
    assert champion == registry.resolve(f"models:/{desk.policy.model}/3", desk.uri)
    assert Engine.read(champion).digest == desk.versions()[2].tags[tags.ENGINE_DIGEST]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", desk.uri)
    texts = mlflow.pyfunc.load_model(f"models:/{desk.policy.model}@champion").predict(["def f ("])
    assert len(texts) == 1
    assert texts[0]


def test_a_download_goes_where_it_is_told(desk: Desk, tmp_path: Path) -> None:
    promote(**desk.arguments())
    found = registry.resolve(f"models:/{desk.policy.model}/1", desk.uri, tmp_path / "here")
    assert found.is_relative_to(tmp_path / "here")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nothing@champion", "no model 'nothing' is registered.*Registered are: "),
        ("models:/{model}@challenger", "no alias 'challenger'.*Its aliases: champion"),
        ("models:/{model}/99", "no version 99.*Its versions: 1, 2, 3"),
        ("models:/{model}", "no registry URI"),
        ("models:/{model}/latest", "no registry URI"),
        ("/tmp/engine", "no registry URI"),
    ],
)
def test_what_does_not_exist_is_one_clear_error(desk: Desk, uri: str, message: str) -> None:
    model = desk.policy.model.replace("/", "_").replace(":", "_").replace("@", "_")
    own = replace(desk.policy, model="".join(c if c.isalnum() else "_" for c in model))
    promote(**desk.arguments(policy=own))
    with pytest.raises(InputError, match=message):
        registry.resolve(uri.format(model=own.model), desk.uri)


def test_a_registered_engine_that_was_changed_is_not_opened(desk: Desk, spare: TrialSnapshot) -> None:
    promote(**desk.arguments(rows=[spare], study=desk.policy.model))
    reseal(model_folder(desk, spare))
    with pytest.raises(InputError, match="not the one that was registered"):
        registry.resolve(f"models:/{desk.policy.model}@champion", desk.uri)


def test_a_registered_model_of_another_kind_is_refused(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {onnx: {}}\n")
    desk.client.create_registered_model(desk.policy.model)
    desk.client.create_model_version(desk.policy.model, tmp_path.as_uri())
    with pytest.raises(InputError, match="no edgeopt flavor"):
        registry.resolve(f"models:/{desk.policy.model}/1", desk.uri)
