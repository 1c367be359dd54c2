"""Check the layers by reading every import: imports go down, stages are independent, and there are no cycles."""

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

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"core"}),
    frozenset({"checkpoints", "machine", "cache"}),
    frozenset({"compress", "runtimes", "measure", "models", "datasets", "tracking", "release", "serving"}),
    frozenset({"pipeline"}),
    frozenset({"search"}),
    frozenset({"config", "hydra_plugins", "pages"}),
    frozenset({"studies", "mlflow_plugins"}),
    frozenset({"api"}),
    frozenset({"cli"}),
)
"""Folders and root modules of edgeopt, lowest first. A folder imports itself and lower layers only."""

NOT_IMPORTED_BY = {
    "pipeline": {"compress", "runtimes", "measure", "models", "datasets", "tracking", "release", "serving"},
    "search": {"compress", "runtimes", "measure", "models", "datasets", "tracking", "release", "serving"},
}
"""Lower folders that a folder must not import. It receives their objects and uses them by protocol."""

WITHIN_COMPRESS = {"quantization": {"recovery"}, "pruning": {"recovery"}, "recovery": set()}
"""Subfolders of compress/ that a subfolder may import, in addition to the modules outside these subfolders."""

OWNERS = {
    "mlflow": {"tracking", "release", "models", "mlflow_plugins", "pages"},
    "optuna": {"search"},
    "hydra": {"config", "hydra_plugins"},
    "omegaconf": {"config", "hydra_plugins"},
    "transformers": {"models", "checkpoints", "compress", "runtimes"},
    "peft": {"models", "checkpoints", "compress"},
    "sqlalchemy": {"search", "tracking", "release", "machine"},
    "onnxruntime": {"runtimes", "measure", "machine"},
    "onnxruntime_genai": {"runtimes", "measure"},
    "gguf": {"runtimes"},
    "llama_cpp": {"runtimes"},
    "tensorrt": {"runtimes"},
    "tokenizers": {"checkpoints", "serving"},
    "starlette": {"serving", "pages", "cli", "mlflow_plugins"},
    "safetensors": {"checkpoints"},
    "plotly": {"tracking"},
    "matplotlib": {"tracking"},
    "codecarbon": {"machine"},
    "lm_eval": {"measure"},
    "model_signing": {"release"},
}
"""Folders that may import a library. A library that is absent here may be imported everywhere above core/."""

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
    "pandas",
}
"""Libraries with a slow import, to be imported inside the functions that use them."""

HEAVY_AT_TOP = ("tracking", "release", "mlflow_plugins", "pages")
"""Folders whose modules may import heavy libraries at the top; their `__init__.py` may not."""


def layer_of(folder: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if folder in layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """Import of one module.

    Attributes:
        file: importing file, relative to edgeopt/.
        top: whether the import runs when the file is imported.
        typing: whether the import is under `if TYPE_CHECKING`.
    """

    file: str
    line: int
    module: str
    top: bool
    typing: bool

    @property
    def folder(self) -> str:
        """Return the folder or root module of the importing file."""
        return Path(self.file).parts[0].removesuffix(".py")

    @property
    def library(self) -> str:
        return self.module.split(".")[0]

    @property
    def imported_folder(self) -> str:
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    def __str__(self) -> str:
        return f"edgeopt/{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> Iterator[Import]:
    """Yield every import of a source text, including imports inside functions."""
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
    """Return the modules that a statement imports: a.b.c for `from a.b import c` if that is a module of edgeopt."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"edgeopt/{file}:{node.lineno}: imports must be absolute"
    assert node.module is not None
    if node.module.split(".")[0] != "edgeopt":
        return [node.module]
    full = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else node.module for name in full]


def module_of(path: Path) -> str:
    parts = ("edgeopt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_of(path) for path in FILES}
ALL_IMPORTS = [i for p in FILES for i in imports_of(p.read_text(), p.relative_to(PACKAGE).as_posix())]
INTERNAL_IMPORTS = [i for i in ALL_IMPORTS if i.library == "edgeopt"]


def test_root_holds_three_modules() -> None:
    assert {p.name for p in PACKAGE.glob("*.py")} <= {"__init__.py", "api.py", "errors.py"}


def test_every_folder_has_a_layer() -> None:
    folders = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert folders <= frozenset().union(*LAYERS), "add the new folder to LAYERS"


def test_imports_go_down() -> None:
    assert INTERNAL_IMPORTS
    wrong = [
        str(i)
        for i in INTERNAL_IMPORTS
        if "__init__" not in (i.folder, i.imported_folder)
        and i.folder != i.imported_folder
        and layer_of(i.imported_folder) >= layer_of(i.folder)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", NOT_IMPORTED_BY)
def test_folder_receives_stages_by_protocol(folder: str) -> None:
    wrong = [str(i) for i in INTERNAL_IMPORTS if i.folder == folder and i.imported_folder in NOT_IMPORTED_BY[folder]]
    assert not wrong, "\n".join(wrong)


def test_modules_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in INTERNAL_IMPORTS:
        importer = module_of(PACKAGE / found.file)
        if not found.typing and importer != found.module:
            graph[importer].add(found.module)
    assert not _cycle(graph), " -> ".join(_cycle(graph))


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return one cycle of the graph as a path, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := visit(following, [*path, node]):
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        if found := visit(start, []):
            return found
    return []


def test_cycle_is_found() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_compression_kinds_stay_separate() -> None:
    inside = [i for i in ALL_IMPORTS if i.folder == "compress" and i.imported_folder == "compress"]
    assert inside
    for found in inside:
        own = Path(found.file).parts[1]
        imported = found.module.split(".")[2]
        known = {own, *WITHIN_COMPRESS.get(own, ())}
        assert imported not in WITHIN_COMPRESS or imported in known, found


def test_core_needs_standard_library_only() -> None:
    foreign = [
        str(i)
        for i in ALL_IMPORTS
        if i.folder in ("core", "errors")
        and not i.typing
        and i.library not in sys.stdlib_module_names
        and i.library != "edgeopt"
    ]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_library_is_imported_by_its_owners(library: str) -> None:
    wrong = [str(i) for i in ALL_IMPORTS if i.library == library and not i.typing and i.folder not in OWNERS[library]]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_late() -> None:
    def allowed(found: Import) -> bool:
        parts = Path(found.file).parts
        if found.folder == "hydra_plugins" and found.library in ("hydra", "omegaconf"):
            return True  # Hydra imports these files itself
        if found.folder == "runtimes" and len(parts) > 2:
            return parts[-1] not in ("__init__.py", "runtime.py")  # runtime.py imports these modules in functions
        return found.folder in HEAVY_AT_TOP and parts[-1] != "__init__.py"

    early = [str(i) for i in ALL_IMPORTS if i.library in HEAVY and i.top and not i.typing and not allowed(i)]
    assert not early, "\n".join(early)


@pytest.mark.parametrize(
    "module",
    [
        "edgeopt",
        "edgeopt.cli.main",
        "edgeopt.cli.commands.sweep",
        "edgeopt.config.parse",
        "edgeopt.release.audit",
        "edgeopt.release.overview",
        "edgeopt.search.study",
    ],
)
def test_import_loads_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not HEAVY & set(done.stdout.split())


def test_gguf_export_needs_no_llama_cpp() -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; import edgeopt.runtimes.llamacpp.export"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_reader_sees_every_form() -> None:
    source = (
        "import torch\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import mlflow\n"
        "try:\n    import onnx\nexcept ImportError:\n    import peft\n"
        "def f():\n    if True:\n        import optuna\n"
        "class C:\n    import plotly\n    def g(self):\n        import matplotlib\n"
        "from edgeopt.core import units\n"
        "from edgeopt import __version__\n"
    )
    found = {i.module: (i.top, i.typing) for i in imports_of(source, "compress/x.py")}
    assert found["torch"] == found["onnx"] == found["peft"] == found["plotly"] == (True, False)
    assert found["mlflow"] == (True, True)
    assert found["optuna"] == found["matplotlib"] == (False, False)
    assert {"edgeopt.core.units", "edgeopt"} <= found.keys()
