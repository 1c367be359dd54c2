"""Task files of lm-evaluation-harness as plain data: found by name, local, and without code unless it is trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt.core.artifact import sha256_of
from edgeopt.core.config_objects import digest, nearest
from edgeopt.errors import ConfigError

Task = dict[str, Any]

ACCURACIES = ("acc", "acc_norm", "exact_match")
"""Metrics of lm-eval that are 0 or 1 for each document and that it computes itself."""
_DEFAULT = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}
_LOCAL = ("json", "csv", "parquet", "arrow", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """`!function module.name`: Python code beside a task file, which reading does not run."""

    file: Path
    name: str

    def load(self) -> Any:
        """Run the file; the function of that name in it."""
        import runpy

        return runpy.run_path(str(self.file))[self.name]


def read(folder: Path, names: Sequence[str], trusted: Sequence[str]) -> dict[str, Task]:
    """The named tasks in the YAML files of `folder`, each with one metric and with absolute paths of its data.

    Raises ConfigError for a task that is absent, that takes data from elsewhere, that measures no
    accuracy, or that names a function without being trusted.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is no folder", location="path", hint="Give the folder of the task files")
    found: dict[str, tuple[Path, Task]] = {}
    for path in sorted(path for path in folder.rglob("*.yaml") if path.is_file()):
        task = _merged(path, folder, ())
        name = task.get("task")
        if isinstance(name, str) and name in found:
            raise ConfigError(f"task {name!r} stands in {found[name][0]} too", location=str(path), hint="Rename one")
        if isinstance(name, str):
            found[name] = path, task
    for name in names:
        if name not in found:
            hint = f"{nearest(name, found)} The folder has: {', '.join(found) or 'no task'}".strip()
            raise ConfigError(f"there is no task {name!r}", location="names", hint=hint)
    return {name: _checked(*found[name], folder, trusted) for name in names}


def content(folder: Path) -> str:
    """Digest of the names and contents of all files in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([[str(path.relative_to(folder)), sha256_of(path)] for path in files])


def loaded(task: Any) -> Any:
    """`task` with its functions in place of their names."""
    if isinstance(task, Function):
        return task.load()
    if isinstance(task, Mapping):
        return {key: loaded(value) for key, value in task.items()}
    return [loaded(value) for value in task] if isinstance(task, list) else task


def _merged(path: Path, folder: Path, above: tuple[Path, ...]) -> Task:
    """A task file over the files that it includes; {} for YAML that is no mapping."""
    if path in above or not _lies_in(folder, path):
        raise ConfigError(
            f"it includes {str(path)!r}, which is no other file of the folder",
            location=str(above[-1]),
            hint="Include files of the same folder, not in a circle",
        )
    task = _parsed(path)
    if not isinstance(task, dict):
        return {}
    includes = task.pop("include", [])
    merged: Task = {}
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _merged((path.parent / str(name)).resolve(), folder, (*above, path))
    return merged | task


def _parsed(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Function:
        module, _, name = str(loader.construct_scalar(node)).rpartition(".")
        return Function(file=path.parent / f"{module.replace('.', '/')}.py", name=name)

    Loader.add_constructor("!function", function)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  it is a safe loader
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"it cannot be read ({told})", location=str(path), hint="Mend the file") from error


def _checked(path: Path, task: Task, folder: Path, trusted: Sequence[str]) -> Task:
    name = task["task"]
    for function in _functions(task):
        if not _lies_in(folder, function.file):
            raise ConfigError(
                f"{function.file} is no file of the folder", location=str(path), hint="Put it beside the task"
            )
        if name not in trusted:
            raise ConfigError(
                f"task {name!r} would run {function.name} of {function.file}",
                location="trusted",
                hint=f"Read that file, then allow it: trusted=[{name}]",
            )
    if "use_prompt" in task:
        raise ConfigError(
            "prompts of other places are not read", location=f"{path}: use_prompt", hint="Give doc_to_text"
        )
    kwargs = task.get("dataset_kwargs")
    if task.get("dataset_path") not in _LOCAL or not isinstance(kwargs, Mapping) or not kwargs.get("data_files"):
        raise ConfigError(
            f"{task.get('dataset_path')!r} is no data of the folder",
            location=f"{path}: dataset_path",
            hint=f"Give one of {', '.join(_LOCAL)}, and the files in dataset_kwargs.data_files",
        )
    data = _located(kwargs["data_files"], path, folder)
    return {**task, "dataset_kwargs": {**kwargs, "data_files": data}, "metric_list": [_accuracy(path, task)]}


def _functions(task: Any) -> Iterator[Function]:
    if isinstance(task, Function):
        yield task
    elif isinstance(task, (Mapping, list)):
        for value in task.values() if isinstance(task, Mapping) else task:
            yield from _functions(value)


def _located(files: Any, path: Path, folder: Path) -> Any:
    """Data files as absolute paths, in the shape that they are given in: one, a list, or those of each split."""
    if isinstance(files, Mapping):
        return {split: _located(value, path, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_located(value, path, folder) for value in files]
    located = (path.parent / str(files)).resolve()
    if not _lies_in(folder, located):
        raise ConfigError(
            f"{str(files)!r} is no file of the folder",
            location=f"{path}: dataset_kwargs.data_files",
            hint="Put the data beside the task, and give its path from there",
        )
    return str(located)


def _lies_in(folder: Path, path: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(folder)


def _accuracy(path: Path, task: Task) -> dict[str, Any]:
    """The first metric that is an accuracy, as an entry of metric_list."""
    listed = task.get("metric_list")
    if listed is None:
        listed = [{"metric": _DEFAULT.get(str(task.get("output_type", "generate_until")))}]
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, Mapping) and entry.get("metric") in ACCURACIES:
            options = {key: value for key, value in entry.items() if key != "hf_evaluate"}
            return {**options, "aggregation": "mean", "higher_is_better": True}
    raise ConfigError(
        f"none of its metrics is an accuracy: {listed}",
        location=f"{path}: metric_list",
        hint=f"List one of: {', '.join(ACCURACIES)}",
    )
