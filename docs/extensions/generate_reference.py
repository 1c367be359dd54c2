"""Generate the reference pages from the code: commands, configuration, metrics and exit codes.

Sphinx calls `setup`. The pages are written before it reads the sources, into docs/reference/generated/, which
git ignores.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs" / "reference" / "generated"
_ERRORS_INTRODUCTION = """\
Every error that edgeopt raises on purpose derives from `edgeopt.EdgeoptError`. It has a `message`, a `location` (file,
key or argument) and a `hint`. The command line prints `location: message. hint` as one line and exits with the code of
the class. The Python API raises the error and never exits."""
_EXIT_CODES = {
    0: "done",
    1: "a step, build, measurement or service failed",
    2: "usage or configuration error; nothing was done",
    3: "no trial satisfies every limit",
    4: "a release gate refused",
    130: "interrupted by Ctrl-C; the same command continues",
}
REPEATED_OPTIONS = {"-h", "--json", "--debug", "--config-dir"}
"""Options of every command. They are described once."""


def setup(app: Any) -> dict[str, bool]:
    """Register the generator with Sphinx."""
    app.connect("builder-inited", lambda _: generate())
    return {"parallel_read_safe": True}


def generate() -> None:
    """Write all generated pages. A page that did not change keeps its time stamp."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    pages = {"commands": commands(), "configuration": configuration(), "metrics": metrics(), "errors": errors()}
    for name, text in pages.items():
        file = OUTPUT / f"{name}.md"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def commands() -> str:
    """Return the page of the command line, one section a command, from the parser."""
    from edgeopt.cli import main

    (subparsers,) = [a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    lines = ["# Commands", ""]
    lines += ["Every command accepts these options:", "", "| option | description |", "|---|---|"]
    first = next(iter(subparsers.choices.values()))
    lines += [_option_row(a) for a in first._actions if set(a.option_strings) & REPEATED_OPTIONS]
    lines += ["", f"Exit codes: {main.EXIT_CODES.removeprefix('exit codes: ')}. See [](errors.md).", ""]
    for group, names in main.GROUPS.items():
        lines += [f"## {group.capitalize()}", ""]
        for name in names:
            lines += _command_section(name, subparsers.choices[name], importlib.import_module(_module_of(name)))
    return "\n".join(lines)


def _module_of(command: str) -> str:
    return f"edgeopt.cli.commands.{command.replace('-', '_')}"


def _command_section(name: str, parser: argparse.ArgumentParser, module: Any) -> list[str]:
    lines = [f"### edgeopt {name}", "", f"{module.SUMMARY}.", "", "```console", f"$ {module.EXAMPLE}", "```", ""]
    own = [a for a in parser._actions if not set(a.option_strings) & REPEATED_OPTIONS]
    if own:
        lines += ["| argument | description |", "|---|---|", *map(_option_row, own), ""]
    if getattr(module, "KEYS", ()):
        lines += [f"Config keys: {', '.join(f'`{key}`' for key in module.KEYS)}. See [](configuration.md).", ""]
    return lines


def _option_row(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        name += f" {action.metavar or choices or action.dest.upper()}"
    text = (action.help or "") % {"default": action.default, "prog": "edgeopt"}
    return f"| `{name}` | {_cell(text)} |"


def configuration() -> str:
    """Return the page of config groups, their choices, and the fields of each class that a choice names."""
    lines = [
        "# Configuration",
        "",
        "Every folder in `conf/` is a group, and every file in it is a choice of that group.",
    ]
    lines += ["Select a choice with `GROUP=CHOICE`, and set a field with its path, such as"]
    lines += ["`step.quantize.block_size=128`. `edgeopt run --cfg` prints the composed configuration.", ""]
    lines += [
        "## The root configuration",
        "",
        "```yaml",
        (ROOT / "conf" / "config.yaml").read_text().strip(),
        "```",
        "",
    ]
    for folder in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        lines += [f"## {folder.name}", ""]
        lines += _group(folder)
    lines += [
        "## search",
        "",
        "The key `search` of a sweep file. See `sweeps/reference.yaml` for a complete example.",
        "",
    ]
    lines += _class_section("edgeopt.search.space.definition.Search", {})
    lines += ["## Release policies", "", "A file of `registry/`. This is the default policy:", ""]
    lines += ["```yaml", (ROOT / "registry" / "default.yaml").read_text().strip(), "```", "", "Gates:", ""]
    for target in _gate_classes():
        lines += _class_section(target, {})
    return "\n".join(lines)


def _group(folder: Path) -> list[str]:
    choices: dict[str, dict[str, str]] = {}
    texts = {}
    lines = ["| choice | description |", "|---|---|"]
    for file in sorted(folder.glob("*.yaml")):
        texts[file.stem] = file.read_text()
        lines.append(f"| `{file.stem}` | {_cell(_heading_comment(texts[file.stem]))} |")
        for target in re.findall(r"^\s*_target_: (\S+)", texts[file.stem], re.MULTILINE):
            choices.setdefault(target, {})[file.stem] = texts[file.stem]
    lines.append("")
    for target, files in choices.items():
        lines += _class_section(target, files)
    return lines


def _heading_comment(text: str) -> str:
    """Return the comment at the top of a YAML file, as one line."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def _class_section(target: str, files: dict[str, str]) -> list[str]:
    """Return the section of one config class; `files` are the YAML texts of the choices that name it, by choice."""
    module, _, name = target.rpartition(".")
    config_class = getattr(importlib.import_module(module), name)
    summary, documented = _docstring(config_class)
    lines = [f"### {name}", "", f"`{target}`", "", _prose(summary), ""]
    comments = {key: comment for text in files.values() for key, comment in _field_comments(text)}
    rows = []
    for field in dataclasses.fields(config_class):
        values = {_yaml_value(text, target, field.name) for text in files.values()} - {None}
        value = f"`{next(iter(values))}`" if len(values) == 1 else _default(field)
        text = documented.get(field.name) or comments.get(field.name, "")
        rows.append(f"| `{field.name}` | {_type(field)} | {_cell(value)} | {_cell(text)} |")
    if rows:
        lines += ["| field | type | default | description |", "|---|---|---|---|", *rows, ""]
    return lines


def _docstring(config_class: type) -> tuple[str, dict[str, str]]:
    """Return a docstring without its `Attributes:` section, and that section by attribute, also of base classes."""
    documented: dict[str, str] = {}
    for parent in reversed(config_class.__mro__):
        text = inspect.cleandoc(parent.__doc__ or "")
        section = re.search(r"^Attributes:\n((?:[ ]{4}.*\n?|\n)*)", text, re.MULTILINE)
        for entry in re.split(r"\n(?=[ ]{4}\S)", "\n" + section[1]) if section else ():
            names, colon, description = entry.strip().partition(":")
            if colon:
                documented |= {n.strip(): " ".join(description.split()) for n in names.split(",")}
    text = inspect.cleandoc(config_class.__doc__ or "")
    return re.split(r"^(?:Attributes|Raises|Args):", text, flags=re.MULTILINE)[0].strip(), documented


def _field_comments(text: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a YAML file that have a comment on their line."""
    for found in re.finditer(r"^\s*(\w+):[^#\n]*\s#\s*(.+)$", text, re.MULTILINE):
        yield found[1], found[2]


def _yaml_value(text: str, target: str, field: str) -> str | None:
    """Return a field's value in the mapping that names `target`; None if it is not set there."""
    for mapping in _mappings(yaml.safe_load(text)):
        if mapping.get("_target_") == target and field in mapping and not isinstance(mapping[field], dict):
            value = mapping[field]
            return "required" if value == "???" else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    return None


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def _type(field: dataclasses.Field[Any]) -> str:
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return f"`{text}`".replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{'null' if field.default is None else field.default}`"
    return "required" if field.default_factory is dataclasses.MISSING else "empty"


def _gate_classes() -> list[str]:
    found = []
    for file in sorted((ROOT / "edgeopt" / "release" / "gates").glob("[a-z]*.py")):
        module = importlib.import_module(f"edgeopt.release.gates.{file.stem}")
        found += [f"{module.__name__}.{n}" for n, c in vars(module).items() if _is_gate(c, module.__name__)]
    return found


def _is_gate(candidate: Any, module: str) -> bool:
    return dataclasses.is_dataclass(candidate) and hasattr(candidate, "check") and candidate.__module__ == module


def metrics() -> str:
    """Return conf/metrics.md as a page."""
    return (ROOT / "conf" / "metrics.md").read_text()


def errors() -> str:
    """Return the page of exit codes and error classes, from edgeopt.errors."""
    from edgeopt import errors as module

    lines = ["# Exit codes and errors", ""]
    lines += [_ERRORS_INTRODUCTION, "", "| exit code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in _EXIT_CODES.items()]
    lines.append("")
    lines += ["```text", *_error_tree(module.__doc__ or ""), "```", ""]
    lines += ["| class | derived from | exit code |", "|---|---|---|"]
    for name, error in vars(module).items():
        if isinstance(error, type) and issubclass(error, module.EdgeoptError):
            lines.append(f"| `{name}` | `{error.__bases__[0].__name__}` | {error.exit_code} |")
    return "\n".join([*lines, ""])


def _error_tree(docstring: str) -> list[str]:
    return [line.removeprefix("    ") for line in docstring.splitlines() if line.startswith("    ")]


def _prose(text: str) -> str:
    """Return a docstring as Markdown: characters with a meaning in Markdown are escaped outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<*_\[\]|])", r"\\\1", p) for p in parts)


def _cell(text: str) -> str:
    """Return text for one cell of a Markdown table."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        p.replace("|", "\\|") if p.startswith("`") else re.sub(r"(?<!\\)([<*_\[\]|])", r"\\\1", p) for p in parts
    )
