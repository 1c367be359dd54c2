from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.errors import ConfigError
from edgeopt.release import policy
from edgeopt.release.gates.metrics import RequiredMetrics
from edgeopt.release.ranking import Criterion, first, scores


def test_default_policy_loads() -> None:
    loaded = policy.load()
    assert loaded.name == "default"
    assert loaded.model == "edgeopt"
    assert isinstance(loaded.gates[0], RequiredMetrics)
    assert sum(criterion.weight for criterion in loaded.aliases["champion"]) == pytest.approx(1)


def test_all_policy_errors_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        """
model: a/b
rankings: []
gates:
  - {_target_: os.system}
  - {_target_: edgeopt.release.gates.metrics.RequiredMetrics, metrics: []}
  - {_target_: edgeopt.core.target.Target, name: x}
  - just a word
aliases:
  champion:
    - {metric: size/engine_mib, direction: up, weight: 0}
    - {metric: size/engine_mib}
  latest: [{metric: size/engine_mib, direction: minimize, weight: 1}]
  empty: []
approvals: many
signature: {public_key: nowhere.pub}
webhooks: [ftp://x, 7]
tags: [a]
retention: {versions: 0}
"""
    )
    with pytest.raises(ConfigError) as caught:
        policy.load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: 17 errors")
    for problem in (
        "rankings: unknown key",
        "model: must be a name without slash, colon or quote, got 'a/b'",
        "gates[0]: `_target_` must name a class of edgeopt or of an installed plugin, got 'os.system'",
        "gates[1].metrics: `metrics` must contain at least one metric",
        "gates[2]: edgeopt.core.target.Target is not a gate",
        "gates[3]: `_target_` must be the dotted name of a class",
        "aliases.champion[0].direction: must be one of minimize, maximize, got 'up'",
        "aliases.champion[0].weight: must be a positive number, got 0",
        "aliases.champion[1]: must have exactly the keys metric, direction and weight",
        "aliases.latest: an alias must consist of",
        "aliases.empty: must be a list of at least one criterion",
        "approvals: must be a non-negative integer, got 'many'",
        "nowhere.pub does not exist",
        "webhooks: a URL must begin with https:// or http://, got 'ftp://x'",
        "webhooks: a URL must begin with https:// or http://, got 7",
        "tags: must be a mapping, got ['a']",
        "retention: must have exactly the key versions",
    ):
        assert problem in message, problem


@pytest.mark.parametrize("text", ["", "- a\n", "model: [", "model: x\n", "model: x\naliases: {other: []}\n"])
def test_invalid_policy_error_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        policy.load(str(path))


def test_user_folder_takes_precedence(tmp_path: Path) -> None:
    shipped = policy.find_file("default.yaml")
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "default.yaml").write_text(shipped.read_text().replace("model: edgeopt", "model: mine"))
    assert policy.load("default", tmp_path).model == "mine"
    assert policy.find_file("model_card.md.j2", tmp_path).parent == shipped.parent


def test_missing_policy_error_lists_existing_policies() -> None:
    with pytest.raises(ConfigError, match=r"strict\.yaml was not found.*Choose one of: default\.yaml"):
        policy.load("strict")
    with pytest.raises(ConfigError, match="cannot be read"):
        policy.load("/nowhere/strict.yaml")


def test_target_placeholder_in_alias_is_replaced() -> None:
    criteria = [{"metric": "a", "direction": "minimize", "weight": 1}]
    data = {"model": "m", "aliases": {"champion": criteria, "champion-{target}": criteria}}
    loaded = policy.parse(data, name="p", location="p.yaml")
    assert set(loaded.for_target("sbc_4gib").aliases) == {"champion", "champion-sbc_4gib"}


def trials(*metrics: tuple[float, float]) -> list[TrialSnapshot]:
    return [
        TrialSnapshot(number=n, state="finished", feasible=True, pareto_rank=1, metrics={"a": a, "b": b})
        for n, (a, b) in enumerate(metrics)
    ]


A, B = (Criterion(metric=m, direction="minimize", weight=w) for m, w in (("a", 1.0), ("b", 3.0)))


def test_scores_weight_the_range_of_each_metric() -> None:
    assert scores(trials((0, 10), (10, 0), (5, 5)), [A, B]) == {0: 3.0, 1: 1.0, 2: 2.0}
    assert first(trials((0, 10), (10, 0), (5, 5)), [A, B]) == 1


def test_maximize_reverses_the_order() -> None:
    best = Criterion(metric="a", direction="maximize", weight=1.0)
    assert first(trials((1, 0), (3, 0), (2, 0)), [best]) == 1


def test_ties_go_to_the_lower_number() -> None:
    assert scores(trials((1, 1), (1, 1)), [A, B]) == {0: 0.0, 1: 0.0}
    assert first(trials((1, 1), (1, 1)), [A, B]) == 0


METRICS = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=6)


@given(METRICS, st.floats(0.01, 100), st.floats(0, 50))
def test_scores_do_not_depend_on_units(metrics: list[tuple[float, float]], factor: float, offset: float) -> None:
    rescaled = scores(trials(*((a * factor + offset, b) for a, b in metrics)), [A, B])
    original = scores(trials(*metrics), [A, B])
    assert all(0 <= score <= 4 + 1e-9 for score in original.values())
    spread = max(a for a, _ in metrics) - min(a for a, _ in metrics)
    if spread > 1e-6:
        assert rescaled == pytest.approx(original, abs=1e-4)
