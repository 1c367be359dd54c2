"""Test that task files are read as data and that missing, external or executable content is rejected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import toy_bench

from edgeopt.errors import ConfigError
from edgeopt.measure.probes import lm_eval_tasks

CODE = """
from pathlib import Path

Path(__file__).with_suffix(".ran").touch()


def upper(doc):
    return doc["text"].upper()
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a copy of the toy tasks."""
    return shutil.copytree(toy_bench.TASKS, tmp_path.resolve() / "tasks")


def write(folder: Path, **values: str) -> None:
    """Write the task `mine`, which includes shared.yml and sets `values`."""
    task = {"task": "mine", "include": "shared.yml", "output_type": "generate_until", **values}
    (folder / "mine.yaml").write_text("\n".join(f"{key}: {value}" for key, value in task.items()))


def read(folder, *names, trusted=()):
    return lm_eval_tasks.read_tasks(folder, names, trusted)


def test_task_overrides_its_includes(folder):
    task = read(folder, "choose_next")["choose_next"]
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"]["data_files"] == {"test": str(folder / "next.jsonl")}
    assert task["metric_list"] == [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def test_default_metric_depends_on_output_type(folder):
    assert read(folder, "say_next")["say_next"]["metric_list"][0]["metric"] == "exact_match"


def test_first_accuracy_metric_is_selected(folder):
    write(folder, metric_list="[{metric: bleu}, {metric: exact_match, hf_evaluate: true, ignore_case: true}]")
    (metric,) = read(folder, "mine")["mine"]["metric_list"]
    assert metric == {"metric": "exact_match", "ignore_case": True, "aggregation": "mean", "higher_is_better": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric_list": "[{metric: bleu}]"}, "`metric_list` must contain an accuracy metric, got .*bleu"),
        ({"metric_list": "acc"}, "`metric_list` must contain an accuracy metric, got acc"),
        ({"metric_list": "[acc]"}, "`metric_list` must contain an accuracy"),
        ({"output_type": "loglikelihood_rolling"}, "`metric_list` must contain an accuracy"),
        ({"dataset_path": "super_glue"}, "must be a local format with data_files, got 'super_glue'"),
        ({"dataset_kwargs": "x.jsonl"}, "must be a local format with data_files, got 'json'"),
        ({"dataset_kwargs": "{}"}, "must be a local format with data_files, got 'json'"),
        ({"dataset_kwargs": "{data_files: absent.jsonl}"}, "must name files of the folder, got 'absent.jsonl'"),
        ({"dataset_kwargs": "{data_files: {test: [/etc/passwd]}}"}, "must name files of the folder, got '/etc/passwd'"),
        (
            {"dataset_kwargs": '{data_files: "https://host/x.json"}'},
            "must name files of the folder, got 'https://host/x.json'",
        ),
        ({"use_prompt": "promptsource:*"}, "use_prompt.*outside the folder"),
        ({"include": "../outside.yml"}, "must name another file of the folder, got .*outside.yml"),
        ({"include": "mine.yaml"}, "must name another file of the folder, got .*mine.yaml"),
        (
            {"doc_to_text": "!function code.upper"},
            r"trusted: .*'mine' must be in `trusted` to run upper of .*code\.py.*\[mine\]",
        ),
        ({"doc_to_text": "!function os.getcwd"}, "must be in a file of the folder, got .*os.py"),
        ({"doc_to_text": "!!python/object/apply:os.getcwd []"}, "mine.yaml: the file must be valid YAML"),
        ({"task": "say_next"}, "must be unique, got 'say_next' in .*mine.yaml too"),
    ],
)
def test_task_outside_the_rules_is_rejected(folder, values, message):
    (folder.parent / "outside.yml").write_text("dataset_path: json")
    (folder / "code.py").write_text(CODE)
    write(folder, **values)
    with pytest.raises(ConfigError, match=message):
        read(folder, "mine")


def test_unknown_task_suggests_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"no task 'choose_nxt'.*Did you mean choose_next\?.*say_next"):
        read(folder, "choose_nxt")


def test_missing_folder_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"path: `path` must be a folder"):
        read(tmp_path / "absent", "a")


def test_trusted_code_runs_when_loaded(folder):
    (folder / "code.py").write_text(CODE)
    write(folder, doc_to_text="!function code.upper")
    task = read(folder, "mine", trusted=["mine"])["mine"]
    assert not (folder / "code.ran").exists()
    assert lm_eval_tasks.load_functions(task)["doc_to_text"]({"text": "w1"}) == "W1"
    assert (folder / "code.ran").exists()


def test_code_of_unselected_task_is_ignored(folder):
    write(folder, doc_to_text="!function absent.upper")
    assert set(read(folder, "say_next")) == {"say_next"}


def test_link_to_outside_file_is_ignored(folder):
    (folder.parent / "outside.yml").write_text("task: outside")
    (folder / "link.yaml").symlink_to(folder.parent / "outside.yml")
    assert set(read(folder, "say_next")) == {"say_next"}


def test_folder_digest_depends_on_contents_only(folder, tmp_path):
    before = lm_eval_tasks.compute_folder_digest(folder)
    assert lm_eval_tasks.compute_folder_digest(shutil.copytree(folder, tmp_path / "copy")) == before
    with (folder / "next.jsonl").open("a") as file:
        file.write("\n")
    assert lm_eval_tasks.compute_folder_digest(folder) != before
