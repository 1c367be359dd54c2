from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.corpus import Text, require_disjoint
from edgeopt.errors import InputError

words = st.text("abcdefgh", min_size=1, max_size=8)
documents = st.lists(words, min_size=1, max_size=6, unique=True)


def text(*documents: str, name: str = "t") -> Text:
    return Text(name=name, documents=documents)


@given(first=documents, second=documents)
def test_disjoint_texts_share_no_document(first: list[str], second: list[str]) -> None:
    if set(first) & set(second):
        with pytest.raises(InputError):
            require_disjoint(text(*first), text(*second))
    else:
        require_disjoint(text(*first), text(*second))


def test_overlap_names_both_texts_and_document() -> None:
    with pytest.raises(InputError, match=r"second: document 1 \('seen before'…\).*in the calibration text first"):
        require_disjoint(text("x", "seen before", name="first"), text("new", "seen before", name="second"))


@pytest.mark.parametrize("copy", ["a  b\n", "\ta b", "a\r\nb", " a b "])
def test_white_space_does_not_distinguish_documents(copy: str) -> None:
    with pytest.raises(InputError):
        require_disjoint(text("a b"), text(copy))


def test_blank_documents_may_be_in_both_texts() -> None:
    require_disjoint(text("a", "", "\n"), text("b", "", " "))


@pytest.mark.parametrize("documents", [(), ("",), ("  \n", "\t")])
def test_blank_text_is_rejected(documents: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="empty"):
        Text(name="t", documents=documents)


def test_digest_covers_documents_and_their_order() -> None:
    assert text("a", "b", name="x").digest == text("a", "b", name="y").digest
    assert len({text("a", "b").digest, text("b", "a").digest, text("ab").digest, text("a", "b", "").digest}) == 4
