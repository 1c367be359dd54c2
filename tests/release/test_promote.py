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

from .conftest import FinishedStudy


def model_folder(study: FinishedStudy, row: TrialSnapshot) -> Path:
    run = study.client.get_run(row.run_id)
    model = study.client.get_logged_model(run.outputs.model_outputs[0].model_id)
    return Path(model.artifact_location)


def test_front_is_registered_and_best_is_champion(study: FinishedStudy) -> None:
    promotion = promote(**study.arguments())
    versions = study.versions()
    assert [release.number for release in promotion.releases] == [0, 1, 2]
    assert all(release.created for release in promotion.releases)
    assert [v.tags[tags.TRIAL] for v in versions] == ["s/0", "s/1", "s/2"]
    assert all(v.tags[tags.TARGET] == "sbc_4gib" and v.tags[tags.EMULATED] == "true" for v in versions)
    assert all(v.tags[tags.RECIPE] == "bits=4" for v in versions)
    assert len({v.tags[tags.ENGINE_DIGEST] for v in versions}) == 3
    # 0.4 × quality + 0.3 × latency + 0.3 × memory, each scaled over the front: 0.6, 0.445…, 0.4
    assert promotion.aliases == {"champion": promotion.releases[2].version}
    assert promotion.moved == {"champion": None}
    assert fast_reader.champion(study.policy.model, study.uri) == Champion(
        name=study.policy.model, version="3", trial=2
    )
    json.dumps(promotion.to_json())


def test_model_card_contains_limits_recipe_and_lineage(study: FinishedStudy) -> None:
    promote(**study.arguments())
    card = study.versions()[0].description
    assert "**prune_width → quantize**: trial 0 of study s, for sbc_4gib." in card
    assert "| latency/decode_p50_ms | at most 0.8 x baseline = 1.04 ms | 0.9 ms | 13% |" in card
    assert "limits are emulated" in card
    assert study.trials[0].run_id in card
    assert study.versions()[0].tags[tags.ENGINE_DIGEST] in card
    assert "d1ge57" in card
    assert "`bits` = `4`" in card
    assert len(card) < 5000


def test_second_promotion_changes_nothing(study: FinishedStudy) -> None:
    first = promote(**study.arguments())
    before = [v.last_updated_timestamp for v in study.versions()]
    second = promote(**study.arguments())
    assert [r.version for r in second.releases] == [r.version for r in first.releases]
    assert not any(release.created for release in second.releases)
    assert second.moved == {}
    assert [v.last_updated_timestamp for v in study.versions()] == before


def test_changed_ranking_moves_and_adds_aliases(study: FinishedStudy) -> None:
    promote(**study.arguments())
    best = (Criterion(metric="quality/perplexity_ratio", direction="minimize", weight=1.0),)
    worst = (Criterion(metric="memory/peak_rss_mib", direction="maximize", weight=1.0),)
    moved = promote(**study.arguments(policy=replace(study.policy, aliases={"champion": best, "largest": worst})))
    assert moved.moved == {"champion": "3", "largest": None}
    assert registry.aliases(study.client, study.policy.model) == {"champion": "1", "largest": "1"}


def test_infeasible_study_registers_nothing(study: FinishedStudy) -> None:
    with pytest.raises(InfeasibleError, match="nothing is promoted") as caught:
        promote(**study.arguments(trials=study.trials[3:]))
    assert caught.value.exit_code == 3
    with pytest.raises(MlflowException):
        study.client.get_registered_model(study.policy.model)
    assert fast_reader.champion(study.policy.model, study.uri) is None


def test_infeasible_trial_is_never_registered(study: FinishedStudy) -> None:
    promote(**study.arguments(trials=[*study.trials[:3], replace(study.trials[3], pareto_rank=1)]))
    assert len(study.versions()) == 3


def flip_byte(folder: Path) -> None:
    path = folder / "engine" / "table.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reseal(folder: Path) -> None:
    flip_byte(folder)
    manifest = json.loads((folder / "engine" / MANIFEST).read_text())
    engine = Engine.read(folder / "engine")
    Engine.seal(folder / "engine", format=engine.format, spec=engine.spec, made_by=manifest["made_by"])


def change_manifest(folder: Path) -> None:
    path = folder / "engine" / MANIFEST
    path.write_text(path.read_text().replace('"versions": {}', '"versions": {"x": "1"}'))


DEFECTS = {
    "a flipped byte": (flip_byte, r"trial 0, engine: .*table\.npy: the file was modified"),
    "a missing file": (lambda f: (f / "engine" / "tokenizer.json").unlink(), r"'tokenizer\.json' is missing"),
    "another engine": (reseal, r"digest is .*, but the measured engine's was"),
    "another manifest": (change_manifest, "the manifest differs from the manifest of the measured engine"),
    "no manifest": (lambda f: (f / "engine" / MANIFEST).unlink(), "no manifest"),
    "no flavor": (
        lambda f: (f / "MLmodel").write_text("flavors: {onnx: {}}\n"),
        "must have the edgeopt flavor, got: onnx",
    ),
    "no artifacts": (shutil.rmtree, "trial 0, engine: "),
}


def test_promotion_does_not_need_cached_engine(
    study: FinishedStudy, damageable_trial: TrialSnapshot, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "engine")
    promotion = promote(**study.arguments(trials=[damageable_trial], study=study.policy.model))
    assert [release.created for release in promotion.releases] == [True]
    assert registry.resolve(f"models:/{study.policy.model}@champion", study.uri).is_dir()


@pytest.mark.parametrize("defect", DEFECTS)
def test_damaged_engine_is_refused(study: FinishedStudy, damageable_trial: TrialSnapshot, defect: str) -> None:
    damage, message = DEFECTS[defect]
    damage(model_folder(study, damageable_trial))
    with pytest.raises(GateError, match=message) as caught:
        promote(**study.arguments(trials=[damageable_trial], study=study.policy.model))
    assert caught.value.exit_code == 4
    assert study.versions() == []


def test_all_refusals_are_listed_and_nothing_is_registered(study: FinishedStudy) -> None:
    first, second, third = study.trials[:3]
    measured = {k: v for k, v in second.metrics.items() if k != "latency/decode_p50_ms"}
    trials = [
        replace(first, excess={**first.excess, "memory/peak_rss_mib": 0.2}),
        replace(second, metrics=measured),
        replace(third, run_id=None),
    ]
    with pytest.raises(GateError) as caught:
        promote(**study.arguments(trials=trials))
    message = str(caught.value)
    assert "trial 0, limits: memory/peak_rss_mib is 20.0% beyond its limit (at most 90 MiB)" in message
    assert "trial 1, limits: latency/decode_p50_ms was not measured" in message
    assert "trial 1, metrics: latency/decode_p50_ms was not measured" in message
    assert "trial 1, ranking metrics: latency/decode_p50_ms was not measured" in message
    assert "trial 2, engine: the trial has no MLflow run" in message
    assert study.versions() == []


def test_policy_gate_refuses(study: FinishedStudy) -> None:
    stricter = replace(study.policy, gates=(RequiredMetrics(metrics=("energy/measured/cpu",)),))
    with pytest.raises(GateError, match=r"3 refused.*energy/measured/cpu"):
        promote(**study.arguments(policy=stricter))


def test_incompletely_logged_engine_is_refused(study: FinishedStudy) -> None:
    experiment = study.client.get_experiment_by_name("edgeopt").experiment_id
    run = study.client.create_run(experiment)
    study.client.create_logged_model(experiment, name=tags.ENGINE_MODEL_NAME, source_run_id=run.info.run_id)
    row = replace(study.trials[0], run_id=run.info.run_id)
    with pytest.raises(GateError, match="the trial's run contains no engine"):
        promote(**study.arguments(trials=[row]))


def test_run_of_another_store_raises_tracking_error(study: FinishedStudy) -> None:
    with pytest.raises(TrackingError, match="the registry failed"):
        promote(**study.arguments(trials=[replace(study.trials[0], run_id="0" * 32)]))


def test_custom_model_card_and_template_errors(study: FinishedStudy, tmp_path: Path) -> None:
    card = tmp_path / "registry" / "model_card.md.j2"
    card.parent.mkdir()
    card.write_text("Trial {{ trial }} | {{ 'a|b' | cell }}")
    promote(**study.arguments(config_dir=tmp_path))
    assert study.versions()[1].description == "Trial 1 | a/b\n"
    card.write_text("{{ trail }}")
    with pytest.raises(ConfigError, match=r"model_card\.md\.j2.*'trail' is undefined"):
        promote(**study.arguments(config_dir=tmp_path))
    card.write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="unsafe"):
        promote(**study.arguments(config_dir=tmp_path))


def test_process_tracking_uri_is_restored(
    study: FinishedStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for uri in (None, f"sqlite:///{tmp_path}/other.db"):
        if uri is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        before = mlflow.get_tracking_uri()
        assert fast_reader.champion("nothing", study.uri) is None
        assert mlflow.get_tracking_uri() == before
        assert os.environ.get("MLFLOW_TRACKING_URI") == uri


def test_registered_engine_resolves_and_generates(study: FinishedStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(**study.arguments())
    champion = registry.resolve(f"models:/{study.policy.model}@champion", study.uri)
    assert champion == registry.resolve(f"models:/{study.policy.model}/3", study.uri)
    assert Engine.read(champion).digest == study.versions()[2].tags[tags.ENGINE_DIGEST]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.uri)
    texts = mlflow.pyfunc.load_model(f"models:/{study.policy.model}@champion").predict(["def f ("])
    assert len(texts) == 1
    assert texts[0]


def test_resolve_downloads_to_destination(study: FinishedStudy, tmp_path: Path) -> None:
    promote(**study.arguments())
    folder = registry.resolve(f"models:/{study.policy.model}/1", study.uri, tmp_path / "download")
    assert folder.is_relative_to(tmp_path / "download")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nothing@champion", "no model 'nothing' is registered.*Registered models: "),
        ("models:/{model}@challenger", "no alias 'challenger'.*Existing aliases: champion"),
        ("models:/{model}/99", "no version 99.*Existing versions: 1, 2, 3"),
        ("models:/{model}", "a reference must be"),
        ("models:/{model}/latest", "a reference must be"),
        ("/tmp/engine", "a reference must be"),
    ],
)
def test_missing_reference_error_lists_existing_names(study: FinishedStudy, uri: str, message: str) -> None:
    model = study.policy.model.replace("/", "_").replace(":", "_").replace("@", "_")
    renamed = replace(study.policy, model="".join(c if c.isalnum() else "_" for c in model))
    promote(**study.arguments(policy=renamed))
    with pytest.raises(InputError, match=message):
        registry.resolve(uri.format(model=renamed.model), study.uri)


def test_changed_registered_engine_is_refused(study: FinishedStudy, damageable_trial: TrialSnapshot) -> None:
    promote(**study.arguments(trials=[damageable_trial], study=study.policy.model))
    reseal(model_folder(study, damageable_trial))
    with pytest.raises(InputError, match="must be the one that was registered"):
        registry.resolve(f"models:/{study.policy.model}@champion", study.uri)


def test_model_of_another_flavor_is_refused(study: FinishedStudy, tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {onnx: {}}\n")
    study.client.create_registered_model(study.policy.model)
    study.client.create_model_version(study.policy.model, tmp_path.as_uri())
    with pytest.raises(InputError, match="must have the edgeopt flavor"):
        registry.resolve(f"models:/{study.policy.model}/1", study.uri)
