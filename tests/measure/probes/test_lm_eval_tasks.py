"""Task files are read as data: what is absent, lies elsewhere or would run code is refused."""

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
    """A copy of the toy tasks."""
    return shutil.copytree(toy_bench.TASKS, tmp_path.resolve() / "tasks")


def write(folder: Path, **values: str) -> None:
    """A task `mine`: the one of say.yaml with other values."""
    given = {"task": "mine", "include": "shared.yml", "output_type": "generate_until", **values}
    (folder / "mine.yaml").write_text("\n".join(f"{key}: {value}" for key, value in given.items()))


def read(folder, *names, trusted=()):
    return lm_eval_tasks.read(folder, names, trusted)


def test_a_task_stands_over_what_it_includes(folder):
    task = read(folder, "choose_next")["choose_next"]
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"]["data_files"] == {"test": str(folder / "next.jsonl")}
    assert task["metric_list"] == [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def test_without_a_list_the_metric_is_the_accuracy_of_its_kind(folder):
    assert read(folder, "say_next")["say_next"]["metric_list"][0]["metric"] == "exact_match"


def test_the_first_accuracy_is_taken_and_nothing_of_other_libraries(folder):
    write(folder, metric_list="[{metric: bleu}, {metric: exact_match, hf_evaluate: true, ignore_case: true}]")
    (metric,) = read(folder, "mine")["mine"]["metric_list"]
    assert metric == {"metric": "exact_match", "ignore_case": True, "aggregation": "mean", "higher_is_better": True}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"metric_list": "[{metric: bleu}]"}, "none of its metrics is an accuracy: .*bleu"),
        ({"metric_list": "acc"}, "none of its metrics is an accuracy: acc"),
        ({"metric_list": "[acc]"}, "none of its metrics is an accuracy"),
        ({"output_type": "loglikelihood_rolling"}, "none of its metrics is an accuracy"),
        ({"dataset_path": "super_glue"}, "'super_glue' is no data of the folder"),
        ({"dataset_kwargs": "x.jsonl"}, "'json' is no data of the folder"),
        ({"dataset_kwargs": "{}"}, "'json' is no data of the folder"),
        ({"dataset_kwargs": "{data_files: absent.jsonl}"}, "'absent.jsonl' is no file of the folder"),
        ({"dataset_kwargs": "{data_files: {test: [/etc/passwd]}}"}, "'/etc/passwd' is no file of the folder"),
        ({"dataset_kwargs": '{data_files: "https://host/x.json"}'}, "'https://host/x.json' is no file"),
        ({"use_prompt": "promptsource:*"}, "use_prompt.*other places"),
        ({"include": "../outside.yml"}, "outside.yml.*no other file of the folder"),
        ({"include": "mine.yaml"}, "mine.yaml.*no other file of the folder"),
        (
            {"doc_to_text": "!function code.upper"},
            r"trusted: .*'mine' would run upper of .*code\.py.*\[mine\]",
        ),
        ({"doc_to_text": "!function os.getcwd"}, "os.py is no file of the folder"),
        ({"doc_to_text": "!!python/object/apply:os.getcwd []"}, "mine.yaml: it cannot be read"),
        ({"task": "say_next"}, "task 'say_next' stands in .*mine.yaml too"),
    ],
)
def test_what_is_not_local_data_is_refused(folder, values, told):
    (folder.parent / "outside.yml").write_text("dataset_path: json")
    (folder / "code.py").write_text(CODE)
    write(folder, **values)
    with pytest.raises(ConfigError, match=told):
        read(folder, "mine")


def test_a_task_that_is_absent_is_told_with_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"no task 'choose_nxt'.*Did you mean choose_next\?.*say_next"):
        read(folder, "choose_nxt")


def test_a_folder_that_is_absent_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"path: .*no folder"):
        read(tmp_path / "absent", "a")


def test_code_is_run_where_the_task_is_trusted_and_not_before_it_is_loaded(folder):
    (folder / "code.py").write_text(CODE)
    write(folder, doc_to_text="!function code.upper")
    task = read(folder, "mine", trusted=["mine"])["mine"]
    assert not (folder / "code.ran").exists()
    assert lm_eval_tasks.loaded(task)["doc_to_text"]({"text": "w1"}) == "W1"
    assert (folder / "code.ran").exists()


def test_code_of_a_task_that_is_not_asked_for_disturbs_nobody(folder):
    write(folder, doc_to_text="!function absent.upper")
    assert set(read(folder, "say_next")) == {"say_next"}


def test_the_content_is_that_of_every_file_and_not_of_its_place(folder, tmp_path):
    before = lm_eval_tasks.content(folder)
    assert lm_eval_tasks.content(shutil.copytree(folder, tmp_path / "copy")) == before
    with (folder / "next.jsonl").open("a") as file:
        file.write("\n")
    assert lm_eval_tasks.content(folder) != before
