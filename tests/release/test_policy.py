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


def test_the_shipped_policy_is_sound() -> None:
    loaded = policy.load()
    assert loaded.name == "default"
    assert loaded.model == "edgeopt"
    assert isinstance(loaded.gates[0], RequiredMetrics)
    assert sum(criterion.weight for criterion in loaded.aliases["champion"]) == pytest.approx(1)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
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
    told = str(caught.value)
    assert told.startswith(f"{path}: 17 faults")
    for fault in (
        "rankings: unknown key",
        "model: 'a/b'",
        "gates[0]: `_target_` must name a class of edgeopt or of an installed plugin, got 'os.system'",
        "gates[1].metrics: no metric is named",
        "gates[2]: edgeopt.core.target.Target is no gate",
        "gates[3]: `_target_` must be the dotted name of a class",
        "aliases.champion[0].direction: 'up'",
        "aliases.champion[0].weight: 0",
        "aliases.champion[1]: give exactly metric, direction and weight",
        "aliases.latest: not an alias",
        "aliases.empty: a list of at least one",
        "approvals: 'many' is no number of people",
        "nowhere.pub is no file",
        "webhooks: 'ftp://x' is no address",
        "webhooks: 7 is no address",
        "tags: ['a'] is not a mapping",
        "retention: give exactly versions",
    ):
        assert fault in told, fault


@pytest.mark.parametrize("text", ["", "- a\n", "model: [", "model: x\n", "model: x\naliases: {other: []}\n"])
def test_what_is_no_policy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        policy.load(str(path))


def test_a_users_folder_goes_first(tmp_path: Path) -> None:
    shipped = policy.find("default.yaml")
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "default.yaml").write_text(shipped.read_text().replace("model: edgeopt", "model: mine"))
    assert policy.load("default", tmp_path).model == "mine"
    assert policy.find("model_card.md.j2", tmp_path).parent == shipped.parent


def test_an_absent_policy_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no strict\.yaml.*Choose one of: default\.yaml"):
        policy.load("strict")
    with pytest.raises(ConfigError, match="cannot be read"):
        policy.load("/nowhere/strict.yaml")


def test_an_alias_may_be_named_after_the_target() -> None:
    criteria = [{"metric": "a", "direction": "minimize", "weight": 1}]
    data = {"model": "m", "aliases": {"champion": criteria, "champion-{target}": criteria}}
    loaded = policy.parse(data, name="p", location="p.yaml")
    assert set(loaded.on("sbc_4gib").aliases) == {"champion", "champion-sbc_4gib"}


def rows(*figures: tuple[float, float]) -> list[TrialSnapshot]:
    return [
        TrialSnapshot(number=n, state="finished", feasible=True, pareto_rank=1, metrics={"a": a, "b": b})
        for n, (a, b) in enumerate(figures)
    ]


A, B = (Criterion(metric=m, direction="minimize", weight=w) for m, w in (("a", 1.0), ("b", 3.0)))


def test_scores_weigh_the_spread_of_each_metric() -> None:
    assert scores(rows((0, 10), (10, 0), (5, 5)), [A, B]) == {0: 3.0, 1: 1.0, 2: 2.0}
    assert first(rows((0, 10), (10, 0), (5, 5)), [A, B]) == 1


def test_a_larger_is_better_criterion_turns_the_order() -> None:
    best = Criterion(metric="a", direction="maximize", weight=1.0)
    assert first(rows((1, 0), (3, 0), (2, 0)), [best]) == 1


def test_equal_members_go_by_number_and_a_flat_metric_counts_nothing() -> None:
    assert scores(rows((1, 1), (1, 1)), [A, B]) == {0: 0.0, 1: 0.0}
    assert first(rows((1, 1), (1, 1)), [A, B]) == 0


FIGURES = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=6)


@given(FIGURES, st.floats(0.01, 100), st.floats(0, 50))
def test_scores_do_not_depend_on_units(figures: list[tuple[float, float]], factor: float, offset: float) -> None:
    there = scores(rows(*((a * factor + offset, b) for a, b in figures)), [A, B])
    here = scores(rows(*figures), [A, B])
    assert all(0 <= score <= 4 + 1e-9 for score in here.values())
    spread = max(a for a, _ in figures) - min(a for a, _ in figures)
    if spread > 1e-6:
        assert there == pytest.approx(here, abs=1e-4)
