"""Read task files of lm-evaluation-harness as plain data.

Tasks use local data only, and run code only if they are trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt.core.artifact import sha256_of
from edgeopt.core.config_objects import did_you_mean, digest
from edgeopt.errors import ConfigError

Task = dict[str, Any]

ACCURACIES = ("acc", "acc_norm", "exact_match")
"""Metrics of lm-eval that are 0 or 1 for each document and need no other library."""
_DEFAULT_METRICS = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}
_LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFunction:
    """`!function module.name` in a task file: a Python function in the same folder. Reading a task does not run it."""

    file: Path
    name: str

    def load(self) -> Any:
        """Run the file and return its function `name`."""
        import runpy

        return runpy.run_path(str(self.file))[self.name]


def read_tasks(folder: Path, names: Sequence[str], trusted: Sequence[str]) -> dict[str, Task]:
    """Return the named tasks in the YAML files of `folder`, with one metric each and absolute paths of data files.

    Links to files outside `folder` are ignored.

    Raises ConfigError if a task does not exist, uses data from outside the folder, has no accuracy metric, or uses a
    function without being in `trusted`.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"`path` must be a folder, got {str(folder)!r}", location="path", hint="Give the folder of the task files"
        )
    tasks: dict[str, tuple[Path, Task]] = {}
    for path in sorted(path for path in folder.rglob("*.yaml") if _is_file_in(folder, path)):
        task = _merge_includes(path, folder, ())
        name = task.get("task")
        if isinstance(name, str) and name in tasks:
            raise ConfigError(
                f"task names must be unique, got {name!r} in {tasks[name][0]} too",
                location=str(path),
                hint="Rename one of them",
            )
        if isinstance(name, str):
            tasks[name] = path, task
    for name in names:
        if name not in tasks:
            hint = f"{did_you_mean(name, tasks)} The folder contains: {', '.join(tasks) or 'no task'}".strip()
            raise ConfigError(f"the folder has no task {name!r}", location="names", hint=hint)
    return {name: _check(*tasks[name], folder, trusted) for name in names}


def compute_folder_digest(folder: Path) -> str:
    """Return the digest of the relative paths and contents of all files in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([[str(path.relative_to(folder)), sha256_of(path)] for path in files])


def load_functions(task: Any) -> Any:
    """Return `task` with every TaskFunction replaced by the function itself."""
    if isinstance(task, TaskFunction):
        return task.load()
    if isinstance(task, Mapping):
        return {key: load_functions(value) for key, value in task.items()}
    return [load_functions(value) for value in task] if isinstance(task, list) else task


def _merge_includes(path: Path, folder: Path, parents: tuple[Path, ...]) -> Task:
    """Return a task merged over the files that it includes; {} if the YAML is not a mapping."""
    if path in parents or not _is_file_in(folder, path):
        raise ConfigError(
            f"`include` must name another file of the folder, got {str(path)!r}",
            location=str(parents[-1]),
            hint="Include files of the task folder, without cycles",
        )
    task = _parse(path)
    if not isinstance(task, dict):
        return {}
    includes = task.pop("include", [])
    merged: Task = {}
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _merge_includes((path.parent / str(name)).resolve(), folder, (*parents, path))
    return merged | task


def _parse(path: Path) -> Any:
    """Parse a YAML file; `!function` becomes a TaskFunction."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> TaskFunction:
        module, _, name = str(loader.construct_scalar(node)).rpartition(".")
        return TaskFunction(file=path.parent / f"{module.replace('.', '/')}.py", name=name)

    Loader.add_constructor("!function", function)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  Loader extends SafeLoader
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the file must be valid YAML: {reason}", location=str(path)) from error


def _check(path: Path, task: Task, folder: Path, trusted: Sequence[str]) -> Task:
    """Return the task with its metric and absolute data paths; raise ConfigError if it is not allowed."""
    name = task["task"]
    for function in _find_functions(task):
        if not _is_file_in(folder, function.file):
            raise ConfigError(
                f"a function must be in a file of the folder, got {function.file}",
                location=str(path),
                hint="Move the file into the folder of the task",
            )
        if name not in trusted:
            raise ConfigError(
                f"task {name!r} must be in `trusted` to run {function.name} of {function.file}",
                location="trusted",
                hint=f"Review the file, then set trusted=[{name}]",
            )
    if "use_prompt" in task:
        raise ConfigError(
            "`use_prompt` is not supported: it loads prompts from outside the folder",
            location=f"{path}: use_prompt",
            hint="Use doc_to_text",
        )
    kwargs = task.get("dataset_kwargs")
    if (
        task.get("dataset_path") not in _LOCAL_FORMATS
        or not isinstance(kwargs, Mapping)
        or not kwargs.get("data_files")
    ):
        raise ConfigError(
            f"`dataset_path` must be a local format with data_files, got {task.get('dataset_path')!r}",
            location=f"{path}: dataset_path",
            hint=f"Use one of {', '.join(_LOCAL_FORMATS)}, and list the files in dataset_kwargs.data_files",
        )
    data = _resolve_data_files(kwargs["data_files"], path, folder)
    return {**task, "dataset_kwargs": {**kwargs, "data_files": data}, "metric_list": [_accuracy_metric(path, task)]}


def _find_functions(task: Any) -> Iterator[TaskFunction]:
    """Yield all functions in a task."""
    if isinstance(task, TaskFunction):
        yield task
    elif isinstance(task, (Mapping, list)):
        for value in task.values() if isinstance(task, Mapping) else task:
            yield from _find_functions(value)


def _resolve_data_files(files: Any, path: Path, folder: Path) -> Any:
    """Return data files as absolute paths in the same structure: a path, a list, or a mapping of splits."""
    if isinstance(files, Mapping):
        return {split: _resolve_data_files(value, path, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_resolve_data_files(value, path, folder) for value in files]
    resolved = (path.parent / str(files)).resolve()
    if not _is_file_in(folder, resolved):
        raise ConfigError(
            f"`data_files` must name files of the folder, got {str(files)!r}",
            location=f"{path}: dataset_kwargs.data_files",
            hint="Move the data into the folder of the task, and use a relative path",
        )
    return str(resolved)


def _is_file_in(folder: Path, path: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(folder)


def _accuracy_metric(path: Path, task: Task) -> dict[str, Any]:
    """Return the first accuracy metric of the task as an entry of metric_list."""
    metrics = task.get("metric_list")
    if metrics is None:
        metrics = [{"metric": _DEFAULT_METRICS.get(str(task.get("output_type", "generate_until")))}]
    for entry in metrics if isinstance(metrics, list) else []:
        if isinstance(entry, Mapping) and entry.get("metric") in ACCURACIES:
            options = {key: value for key, value in entry.items() if key != "hf_evaluate"}
            return {**options, "aggregation": "mean", "higher_is_better": True}
    raise ConfigError(
        f"`metric_list` must contain an accuracy metric, got {metrics}",
        location=f"{path}: metric_list",
        hint=f"Add one of: {', '.join(ACCURACIES)}",
    )
