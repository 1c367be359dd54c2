"""Compare the names in the fake library with TensorRT's real Python bindings."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import fake_tensorrt

STUB_FUNCTION = "void *{}(void) {{ return 0; }}"
LIST_NAMES = """
import inspect, json, tensorrt_bindings as trt
names = {name: dir(value) for name, value in vars(trt).items() if inspect.isclass(value)}
print(json.dumps({"version": trt.__version__, "names": names}))
"""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory) -> dict[str, list[str]]:
    """Return the classes of TensorRT's bindings with their members.

    The bindings link against NVIDIA's libraries, which need a GPU driver. Stub libraries with the same symbols replace
    them: each failed import names one more undefined symbol.
    """
    if find_spec("tensorrt_bindings") is None or shutil.which("cc") is None:
        pytest.skip("needs TensorRT's bindings and a C compiler")
    folder = tmp_path_factory.mktemp("bindings")
    spec = find_spec("tensorrt_bindings")
    library = Path(str(spec.origin)).with_name("tensorrt.so")
    library_names = {name.decode() for name in re.findall(rb"libnv[a-z_]+\.so\.\d+", library.read_bytes())}
    undefined_symbol = re.compile(r"undefined symbol: (\w+)")
    symbols: list[str] = []
    for _ in range(40):
        source = folder / "stub.c"
        source.write_text("\n".join(map(STUB_FUNCTION.format, symbols)) + "\n")
        for name in library_names:
            subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / name, source], check=True)
        process = subprocess.run(
            [sys.executable, "-c", LIST_NAMES],
            env={"LD_LIBRARY_PATH": str(folder), "LD_BIND_NOW": "", "PATH": ""},
            capture_output=True,
            text=True,
        )
        if process.returncode == 0:
            document = json.loads(process.stdout)
            assert document["version"].startswith("11.4")
            return document["names"]
        missing = undefined_symbol.search(process.stderr)
        assert missing, process.stderr
        symbols.append(missing[1])
    raise AssertionError(symbols)


def test_fake_names_exist_in_tensorrt_bindings(bindings):
    classes = {
        name: [member for member in vars(value) if not member.startswith("_")]
        for name, value in inspect.getmembers(fake_tensorrt, inspect.isclass)
        if value.__module__ == fake_tensorrt.__name__
    }
    assert "IExecutionContext" in classes
    unknown = {f"{name}.{m}" for name, members in classes.items() for m in members if m not in bindings.get(name, [])}
    assert not unknown
