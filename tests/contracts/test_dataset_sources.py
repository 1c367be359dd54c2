"""Contract suite of `TextSource`, for every implementation that needs no network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeopt.core.config_objects import instantiate, to_config
from edgeopt.core.corpus import Text, require_disjoint
from edgeopt.core.protocols import TextSource
from edgeopt.datasets.bundled import BundledText
from edgeopt.datasets.file import TextFile
from edgeopt.datasets.hub import HubText
from edgeopt.errors import ConfigError, InputError

DOCUMENTS = ["def f(x):\n    return x\n", "Ein zweiter Text — mit Umlauten: äöü", "third"]


def make_jsonl(folder: Path) -> TextSource:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": d, "more": 1}, ensure_ascii=False) for d in DOCUMENTS) + "\n\n")
    return TextFile(path=str(path))


def make_txt(folder: Path) -> TextSource:
    (folder / "text.txt").write_text(DOCUMENTS[0])
    return TextFile(path=str(folder / "text.txt"))


SOURCES: dict[str, Callable[[Path], TextSource]] = {
    "bundled calibration": lambda _: BundledText(split="calibration"),
    "bundled validation": lambda _: BundledText(split="validation"),
    "jsonl file": make_jsonl,
    "txt file": make_txt,
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> TextSource:
    return SOURCES[request.param](tmp_path)


class TestEveryTextSource:
    def test_source_returns_documents(self, source: TextSource) -> None:
        text = source.load()
        assert isinstance(text, Text)
        assert text.name
        assert all(isinstance(document, str) for document in text.documents)
        assert any(document.strip() for document in text.documents)

    def test_second_call_returns_same_text(self, source: TextSource) -> None:
        assert source.load() == source.load()
        assert source.load().digest == source.load().digest

    def test_config_round_trip_preserves_source(self, source: TextSource) -> None:
        again = instantiate(json.loads(json.dumps(to_config(source))))
        assert again == source
        assert again.load() == source.load()


def missing_file(folder: Path) -> TextSource:
    return TextFile(path=str(folder / "absent.txt"))


def with_content(name: str, content: bytes) -> Callable[[Path], TextSource]:
    def make(folder: Path) -> TextSource:
        (folder / name).write_bytes(content)
        return TextFile(path=str(folder / name))

    return make


def folder_with_suffix(folder: Path) -> TextSource:
    (folder / "folder.txt").mkdir()
    return TextFile(path=str(folder / "folder.txt"))


UNUSABLE: dict[str, tuple[Callable[[Path], TextSource], str]] = {
    "missing": (missing_file, r"absent\.txt: the file does not exist"),
    "folder": (folder_with_suffix, r"folder\.txt: the text cannot be read"),
    "empty txt": (with_content("a.txt", b" \n"), "empty"),
    "empty jsonl": (with_content("a.jsonl", b"\n"), "empty"),
    "not UTF-8": (with_content("a.txt", b"caf\xe9"), "UTF-8"),
    "other format": (with_content("a.csv", b"a,b"), r"must end in \.txt or \.jsonl, got \.csv"),
    "no suffix": (with_content("a", b"a"), "no suffix"),
    "line is not JSON": (with_content("a.jsonl", b'{"text": "a"}\n{'), r"a\.jsonl:2: "),
    "line without text": (with_content("a.jsonl", b'{"text": "a"}\n\n{"content": "b"}'), r"a\.jsonl:3: "),
    "line is a list": (with_content("a.jsonl", b'["text"]'), r"a\.jsonl:1: "),
    "text is null": (with_content("a.jsonl", b'{"text": null}'), r"a\.jsonl:1: "),
    "text is a number": (with_content("a.jsonl", b'{"text": 3}'), r"a\.jsonl:1: "),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_text_raises_input_error(tmp_path: Path, case: str) -> None:
    make, message = UNUSABLE[case]
    with pytest.raises(InputError, match=message) as caught:
        make(tmp_path).load()
    assert caught.value.hint


def test_missing_datasets_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # simulates a missing package
    with pytest.raises(InputError, match=r"pip install 'edgeopt\[hub\]'"):
        HubText(repo="a/b", revision="main", split="test").load()


@settings(max_examples=60)
@given(
    documents=st.lists(st.text(min_size=1), min_size=1, max_size=5).filter(
        lambda texts: any(text.strip() for text in texts)
    )
)
@example(documents=["line\u2028separator", "next\x85line\x0b\x1c"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_round_trip_preserves_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], ascii_only: bool
) -> None:
    """Documents may contain line separators that JSON does not escape, such as U+2028 and U+0085."""
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    lines = [json.dumps({"text": document}, ensure_ascii=ascii_only) for document in documents]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert list(TextFile(path=str(path)).load().documents) == documents


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_jsonl_accepts_any_line_end(tmp_path: Path, line_end: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line_end.join(['{"text": "a"}', '{"text": "b"}', ""]).encode())
    assert TextFile(path=str(tmp_path / "a.jsonl")).load().documents == ("a", "b")


def test_documents_field_limits_the_count(tmp_path: Path) -> None:
    path = to_config(make_jsonl(tmp_path))["path"]
    assert list(TextFile(path=path, documents=2).load().documents) == DOCUMENTS[:2]
    assert list(TextFile(path=path, documents=99).load().documents) == DOCUMENTS
    with pytest.raises(ConfigError, match="documents"):
        TextFile(path=path, documents=-1)


def test_bundled_texts_are_disjoint() -> None:
    require_disjoint(BundledText(split="calibration").load(), BundledText(split="validation").load())


@pytest.mark.parametrize(
    "name", ["tinystories/calibration.jsonl", "tinystories/evaluation.jsonl", "wikitext-2/test.txt"]
)
def test_published_text_is_read(realdata: Path, name: str) -> None:
    assert sum(map(len, TextFile(path=str(realdata / name)).load().documents)) > 100_000
