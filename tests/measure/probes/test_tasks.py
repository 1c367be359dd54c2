"""Test task accuracy by lm-eval on bigram engines, whose answers follow from their table."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import toy_bench

from edgeopt.core.config_objects import instantiate, to_config
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.probes import tasks
from edgeopt.measure.probes.tasks import Tasks
from edgeopt.measure.stats.confidence_intervals import bootstrap_group_means

needs_lm_eval = pytest.mark.skipif(not toy_bench.LM_EVAL, reason="lm-eval (the extra `tasks`) is not installed")
NAMES = ("choose_next", "say_next")
DOCUMENTS = [json.loads(line) for line in (toy_bench.TASKS / "next.jsonl").read_text().splitlines()]


def measure_accuracy(folder, **values):
    probe = Tasks(**{"path": str(toy_bench.TASKS), "names": NAMES, **values})
    return toy_bench.build_and_measure(folder, FakeRuntime(), toy_bench.make_bench(probes={"tasks": probe}))[
        "tasks/accuracy"
    ]


def expected(folder, documents):
    """Return the accuracies of both tasks, computed from the table; predictions depend on the last word only."""
    table = np.load(folder / "engine" / "table.npy")
    chosen, said = [], []
    for document in documents:
        row = table[int(document["text"].split()[-1][1:])]
        choices = [int(choice[1:]) for choice in document["choices"]]
        chosen.append(int(np.argmax(row[choices])) == document["label"])
        said.append(int(row.argmax()) == choices[document["label"]])
    return np.mean(chosen), np.mean(said)


@needs_lm_eval
def test_accuracy_is_the_mean_over_tasks(tmp_path):
    measurement = measure_accuracy(tmp_path)
    choosing, saying = expected(tmp_path, DOCUMENTS)
    assert 0 < choosing < 1
    assert measurement.value == pytest.approx((choosing + saying) / 2)
    assert measurement.low < measurement.value < measurement.high
    assert measurement.count == 2 * len(DOCUMENTS)
    assert f"choose_next acc {choosing:.3g}, say_next exact_match {saying:.3g}" in measurement.method


@needs_lm_eval
def test_scores_of_each_document_are_recorded(tmp_path):
    measurement = measure_accuracy(tmp_path, names=("choose_next",), documents=5)
    (run,) = json.loads((tmp_path / "measured" / "samples.json").read_text())["runs"]
    recorded = run["report"]["samples"]["tasks"]["choose_next"]
    assert (recorded["metric"], len(recorded["scores"])) == ("acc", 5)
    assert np.mean(recorded["scores"]) == measurement.value == pytest.approx(expected(tmp_path, DOCUMENTS[:5])[0])


@needs_lm_eval
def test_templates_run_in_a_sandbox(tmp_path):
    folder = shutil.copytree(toy_bench.TASKS, tmp_path / "tasks")
    text = "{{ cycler.__init__.__globals__.os.getcwd() }}"
    (folder / "mine.yaml").write_text(f"task: mine\ninclude: say.yaml\ndoc_to_text: '{text}'\n")
    with pytest.raises(MeasureError, match="SecurityError"):
        measure_accuracy(tmp_path / "work", path=str(folder), names=("mine",))


@needs_lm_eval
def test_sampling_task_is_rejected(tmp_path):
    folder = shutil.copytree(toy_bench.TASKS, tmp_path / "tasks")
    sampling = "generation_kwargs: {until: [x], max_gen_toks: 4, do_sample: true}"
    (folder / "mine.yaml").write_text(f"task: mine\ninclude: say.yaml\n{sampling}\n")
    with pytest.raises(MeasureError, match="must decode greedily"):
        measure_accuracy(tmp_path / "work", path=str(folder), names=("mine",))


@needs_lm_eval
def test_changed_files_change_the_digest(tmp_path):
    folder = shutil.copytree(toy_bench.TASKS, tmp_path / "tasks")
    probe = Tasks(path=str(folder), names=NAMES)
    assert instantiate(to_config(probe)) == probe
    (folder / "more.txt").write_text("more")
    assert Tasks(path=str(folder), names=NAMES).digest != probe.digest
    with pytest.raises(ConfigError, match="but they changed"):
        instantiate(to_config(probe))


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"task accuracy needs the lm-eval package.*edgeopt\[tasks\]"):
        Tasks(path=str(toy_bench.TASKS), names=NAMES)


@pytest.mark.parametrize("values", [{"processes": 0}, {"documents": -1}, {"names": ()}, {"names": ("a", "a")}])
def test_invalid_value_is_rejected_with_its_location(values):
    with pytest.raises(ConfigError) as caught:
        Tasks(**{"path": str(toy_bench.TASKS), "names": NAMES, **values})
    assert caught.value.location == next(iter(values))


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30), min_size=1, max_size=4))
def test_groups_have_equal_weight(groups):
    value, low, high = bootstrap_group_means(groups)
    assert value == pytest.approx(np.mean([np.mean(group) for group in groups]))
    assert low <= value <= high
