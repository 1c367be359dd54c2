"""Contract suite of `TextSource`, run against every implementation that needs no network."""

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


def jsonl(folder: Path) -> TextSource:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": d, "more": 1}, ensure_ascii=False) for d in DOCUMENTS) + "\n\n")
    return TextFile(path=str(path))


def txt(folder: Path) -> TextSource:
    (folder / "text.txt").write_text(DOCUMENTS[0])
    return TextFile(path=str(folder / "text.txt"))


SOURCES: dict[str, Callable[[Path], TextSource]] = {
    "bundled calibration": lambda _: BundledText(split="calibration"),
    "bundled validation": lambda _: BundledText(split="validation"),
    "jsonl file": jsonl,
    "txt file": txt,
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> TextSource:
    return SOURCES[request.param](tmp_path)


class TestEveryTextSource:
    def test_it_gives_documents_with_words(self, source: TextSource) -> None:
        text = source.load()
        assert isinstance(text, Text)
        assert text.name
        assert all(isinstance(document, str) for document in text.documents)
        assert any(document.strip() for document in text.documents)

    def test_it_gives_the_same_text_again(self, source: TextSource) -> None:
        assert source.load() == source.load()
        assert source.load().digest == source.load().digest

    def test_it_is_a_part(self, source: TextSource) -> None:
        again = instantiate(json.loads(json.dumps(to_config(source))))
        assert again == source
        assert again.load() == source.load()


def missing(folder: Path) -> TextSource:
    return TextFile(path=str(folder / "absent.txt"))


def with_content(name: str, content: bytes) -> Callable[[Path], TextSource]:
    def make(folder: Path) -> TextSource:
        (folder / name).write_bytes(content)
        return TextFile(path=str(folder / name))

    return make


def a_folder(folder: Path) -> TextSource:
    (folder / "folder.txt").mkdir()
    return TextFile(path=str(folder / "folder.txt"))


UNUSABLE: dict[str, tuple[Callable[[Path], TextSource], str]] = {
    "missing": (missing, r"absent\.txt: there is no such file"),
    "a folder": (a_folder, r"folder\.txt: the text cannot be read"),
    "empty txt": (with_content("a.txt", b" \n"), "empty"),
    "empty jsonl": (with_content("a.jsonl", b"\n"), "empty"),
    "not UTF-8": (with_content("a.txt", b"caf\xe9"), "UTF-8"),
    "another format": (with_content("a.csv", b"a,b"), r"\.csv is not a text format"),
    "no suffix": (with_content("a", b"a"), "no suffix"),
    "a line that is no JSON": (with_content("a.jsonl", b'{"text": "a"}\n{'), r"a\.jsonl:2: "),
    "a line without text": (with_content("a.jsonl", b'{"text": "a"}\n\n{"content": "b"}'), r"a\.jsonl:3: "),
    "a line that is a list": (with_content("a.jsonl", b'["text"]'), r"a\.jsonl:1: "),
    "a text that is null": (with_content("a.jsonl", b'{"text": null}'), r"a\.jsonl:1: "),
    "a text that is a number": (with_content("a.jsonl", b'{"text": 3}'), r"a\.jsonl:1: "),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_source_without_usable_text_is_an_input_error(tmp_path: Path, case: str) -> None:
    make, told = UNUSABLE[case]
    with pytest.raises(InputError, match=told) as caught:
        make(tmp_path).load()
    assert caught.value.hint


def test_a_hub_text_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"pip install 'edgeopt\[hub\]'"):
        HubText(repo="a/b", revision="main", split="test").load()


@settings(max_examples=60)
@given(
    documents=st.lists(st.text(min_size=1), min_size=1, max_size=5).filter(lambda found: any(d.strip() for d in found))
)
@example(documents=["line\u2028separator", "next\x85line\x0b\x1c"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_gives_back_every_document(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], ascii_only: bool
) -> None:
    """Among them those with line separators that JSON leaves as they are, such as U+2028 and U+0085."""
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    lines = [json.dumps({"text": document}, ensure_ascii=ascii_only) for document in documents]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert list(TextFile(path=str(path)).load().documents) == documents


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_jsonl_of_any_platform_is_read(tmp_path: Path, line_end: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line_end.join(['{"text": "a"}', '{"text": "b"}', ""]).encode())
    assert TextFile(path=str(tmp_path / "a.jsonl")).load().documents == ("a", "b")


def test_only_the_first_documents_are_taken_where_a_number_is_given(tmp_path: Path) -> None:
    path = to_config(jsonl(tmp_path))["path"]
    assert list(TextFile(path=path, documents=2).load().documents) == DOCUMENTS[:2]
    assert list(TextFile(path=path, documents=99).load().documents) == DOCUMENTS
    with pytest.raises(ConfigError, match="documents"):
        TextFile(path=path, documents=-1)


def test_the_bundled_texts_do_not_overlap() -> None:
    require_disjoint(BundledText(split="calibration").load(), BundledText(split="validation").load())


@pytest.mark.parametrize(
    "name", ["tinystories/calibration.jsonl", "tinystories/evaluation.jsonl", "wikitext-2/test.txt"]
)
def test_real_texts_are_read(realdata: Path, name: str) -> None:
    assert sum(map(len, TextFile(path=str(realdata / name)).load().documents)) > 100_000
