"""The house's layers, held by reading every import. See ARCHITECTURE.md: one direction, and no room knows another."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import edgeopt

PACKAGE = Path(edgeopt.__file__).parent
LEVEL_0 = {
    "errors",
    "units",
    "part",
    "spec",
    "artifact",
    "text",
    "recipe",
    "target",
    "result",
    "tags",
    "kernels",
    "process",
    "secrets",
    "context",
    "libraries",
    "__init__",
}
LEVEL_1 = {"ports", "network", "tensor_files", "grid", "adapters", "tokens", "intake"}
ROOMS = {"compress", "runtimes", "measure", "models", "texts", "judge", "store", "tracking", "release", "serving"}
LEVEL_3 = {"job", "rungs", "work", "pipeline"}
LEVEL_5 = {
    "composition",
    "config",
    "assembly",
    "profiling",
    "commands",
    "cli",
    "display",
    "diagnosis",
    "hydra_plugins",
    "mlflow_plugins",
    "pages",
}
ANYTHING = LEVEL_0 | LEVEL_1 | ROOMS | LEVEL_3 | LEVEL_5 | {"search"}

WITHIN_COMPRESS = {"quantization": {"recovery"}, "pruning": {"recovery"}, "recovery": set()}
"""Which rooms of compress each of them may know, beside the mathematics that all share."""

OWNERS = {
    "mlflow": {"tracking", "release", "models", "mlflow_plugins", "pages"},
    "optuna": {"search"},
    "hydra": {"composition", "hydra_plugins"},
    "omegaconf": {"composition", "hydra_plugins"},
    "transformers": {"models", "compress", "network", "runtimes"},
    "peft": {"models", "compress", "network"},
    "sqlalchemy": {"search", "tracking", "release", "measure"},
    "onnxruntime": {"runtimes", "measure"},
    "onnxruntime_genai": {"runtimes", "measure"},
    "gguf": {"runtimes"},
    "llama_cpp": {"runtimes"},
    "tensorrt": {"runtimes"},
    "tokenizers": {"tokens", "serving"},
    "starlette": {"serving", "pages", "commands", "mlflow_plugins"},
    "safetensors": {"tensor_files"},
    "plotly": {"tracking"},
    "matplotlib": {"tracking"},
    "codecarbon": {"measure"},
    "lm_eval": {"measure"},
    "model_signing": {"release"},
}
"""Who may import a library at all; a library that is not named here may be used in every room of level 1 and above."""
HEAVY = {
    "torch",
    "transformers",
    "mlflow",
    "optuna",
    "hydra",
    "omegaconf",
    "onnxruntime",
    "onnxruntime_genai",
    "onnx",
    "gguf",
    "llama_cpp",
    "tensorrt",
    "plotly",
    "matplotlib",
    "codecarbon",
    "peft",
    "datasets",
    "lm_eval",
    "model_signing",
}
HEAVY_FROM_THE_START = ("tracking", "release", "mlflow_plugins", "pages")


def allowed(room: str) -> set[str]:
    """Every room that `room` may import from."""
    if room in LEVEL_0:
        return LEVEL_0
    if room in LEVEL_1:
        return LEVEL_0 | LEVEL_1
    if room in ROOMS:
        return LEVEL_0 | LEVEL_1 | {room}
    if room in LEVEL_3:
        return LEVEL_0 | LEVEL_1 | LEVEL_3 | {"judge", "store"}
    if room == "search":
        return LEVEL_0 | LEVEL_1 | ROOMS | LEVEL_3 | {"search"}
    return ANYTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name: of which module, at the top of the file or later, for types alone or for use."""

    file: str
    line: int
    module: str
    top: bool
    typing: bool

    @property
    def room(self) -> str:
        """The importing room: a folder or a file of edgeopt."""
        return Path(self.file).parts[0].removesuffix(".py")

    @property
    def library(self) -> str:
        return self.module.split(".")[0]

    @property
    def imported_room(self) -> str:
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    def __str__(self) -> str:
        return f"edgeopt/{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> Iterator[Import]:
    yield from _visit(ast.parse(source).body, file, top=True, typing=False)


def _visit(nodes: list[ast.stmt], file: str, *, top: bool, typing: bool) -> Iterator[Import]:
    for node in nodes:
        for module in _names(node, file):
            yield Import(file=file, line=node.lineno, module=module, top=top, typing=typing)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        runs_on_import = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(node, name, [])
            if isinstance(inner, list):
                yield from _visit(inner, file, top=runs_on_import, typing=typing or (guarded and name == "body"))
        for handler in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            yield from _visit(handler.body, file, top=runs_on_import, typing=typing)


def _names(node: ast.stmt, file: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"edgeopt/{file}:{node.lineno}: imports are absolute, so that a reader sees the room"
    assert node.module is not None
    if node.module != "edgeopt":
        return [node.module]
    rooms = [alias.name for alias in node.names]  # `from edgeopt import tokens` names a room, `… __version__` does not
    return [f"edgeopt.{r}" if (PACKAGE / r).is_dir() or (PACKAGE / f"{r}.py").is_file() else "edgeopt" for r in rooms]


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [i for p in FILES for i in imports_of(p.read_text(), p.relative_to(PACKAGE).as_posix())]


def test_every_file_belongs_to_a_level() -> None:
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES}
    assert rooms <= ANYTHING, f"{sorted(rooms - ANYTHING)} stand in no level: put them into one above"


def test_no_room_imports_one_that_it_may_not_know() -> None:
    inside = [i for i in IMPORTS if i.library == "edgeopt"]
    assert inside
    wrong = [str(i) for i in inside if i.imported_room not in allowed(i.room)]
    assert not wrong, "\n".join(wrong)


def test_techniques_of_one_kind_do_not_know_those_of_another() -> None:
    inside = [i for i in IMPORTS if i.room == "compress" and i.imported_room == "compress"]
    assert inside
    for found in inside:
        own = Path(found.file).parts[1]
        imported = found.module.split(".")[2]
        known = {own, *WITHIN_COMPRESS.get(own, ())}
        assert imported not in WITHIN_COMPRESS or imported in known, found


def test_the_lowest_level_needs_the_standard_library_alone() -> None:
    foreign = [
        str(i)
        for i in IMPORTS
        if i.room in LEVEL_0 and i.library not in sys.stdlib_module_names and i.library != "edgeopt"
    ]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_is_known_only_to_its_rooms(library: str) -> None:
    wrong = [str(i) for i in IMPORTS if i.library == library and not i.typing and i.room not in OWNERS[library]]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    def may(found: Import) -> bool:
        if found.room == "hydra_plugins" and found.library in ("hydra", "omegaconf"):
            return True  # it is Hydra that imports them
        if found.file.startswith("runtimes/") and Path(found.file).parent.name != "runtimes":
            return Path(found.file).name != "__init__.py"  # which imports the others when it builds or opens
        return found.room in HEAVY_FROM_THE_START and Path(found.file).name != "__init__.py"

    early = [str(i) for i in IMPORTS if i.library in HEAVY and i.top and not i.typing and not may(i)]
    assert not early, "\n".join(early)


@pytest.mark.parametrize(
    "module",
    [
        "edgeopt.cli",
        "edgeopt.cli.commands.sweep",
        "edgeopt.config.parse",
        "edgeopt.release.audit",
        "edgeopt.release.overview",
        "edgeopt.search.study",
    ],
)
def test_importing_a_command_loads_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not HEAVY & set(done.stdout.split())


def test_a_gguf_file_is_written_without_llama_cpp() -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; import edgeopt.runtimes.llamacpp.runtime.export"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_reader_of_imports_sees_what_it_must() -> None:
    source = (
        "import torch\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import mlflow\n"
        "try:\n    import onnx\nexcept ImportError:\n    import peft\n"
        "def f():\n    if True:\n        import optuna\n"
        "class C:\n    import plotly\n    def g(self):\n        import matplotlib\n"
        "from edgeopt import tokens, __version__\n"
    )
    found = {i.module: (i.top, i.typing) for i in imports_of(source, "compress/x.py")}
    assert found["torch"] == found["onnx"] == found["peft"] == found["plotly"] == (True, False)
    assert found["mlflow"] == (True, True)
    assert found["optuna"] == found["matplotlib"] == (False, False)
    assert {"edgeopt.checkpoints.tokenizer", "edgeopt"} <= found.keys()
