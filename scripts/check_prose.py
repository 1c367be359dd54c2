"""Check the writing rules that a program can check: docstring openings, test names, and phrases to avoid.

Usage: scripts/check_prose.py [FILE ...]. Without files it checks edgeopt/, tests/, scripts/, conf/ and docs/.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LABEL_OPENINGS = {"what", "whether", "how", "who", "whom", "why", "which", "where"}
TEST_NAME_WORDS = 8
"""Without the word `test`."""
PHRASES = (
    r"(?<!there )\b(?:is|are) no (?!longer|more\b|less\b)[a-z]",
    r"\b(?:is|are|was|were) told\b",
    r"\bas it does else\b",
    r"\btakes? its place\b",
    r"\bmend\b",
    r"\bheirs?\b",
    r"\banew\b",
    r"\bforetold\b",
    r"\bthat there is\b",
    r"\bstands? (?:beside|in it)\b",
)
"""Inverted, archaic or invented phrases; see CONTRIBUTING.md."""
_PHRASE = re.compile("|".join(PHRASES), re.IGNORECASE)
FOLDERS = ("edgeopt", "tests", "scripts", "conf", "sweeps", "registry", "docs")
SUFFIXES = (".py", ".yaml", ".md", ".html", ".j2")


def main() -> int:
    """Print every violation as `file:line: message` and return 1 if there is one."""
    selected = [Path(name).resolve() for name in sys.argv[1:]]
    files = selected or sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    violations = [line for path in files if path.suffix in SUFFIXES and path.is_file() for line in check(path)]
    print("\n".join(violations), end="\n" if violations else "")
    return 1 if violations else 0


def check(path: Path) -> Iterator[str]:
    """Yield the violations of one file."""
    if path == Path(__file__).resolve():  # it contains the phrases
        return
    name = path.relative_to(ROOT)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _check_python(ast.parse(text), str(name))
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _PHRASE.search(line):
            yield f"{name}:{number}: avoid {match.group(0)!r}"


def _check_python(tree: ast.Module, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = (ast.get_docstring(node) or "").split()
        if docstring and docstring[0].strip(".,:;").lower() in LABEL_OPENINGS:
            yield f"{name}:{getattr(node, 'lineno', 1)}: a docstring must not open with {docstring[0]!r}"
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            words = len(node.name.split("_")) - 1
            if words > TEST_NAME_WORDS:
                yield f"{name}:{node.lineno}: {node.name} must have at most {TEST_NAME_WORDS} words, got {words}"


if __name__ == "__main__":
    sys.exit(main())
