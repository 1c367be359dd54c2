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
def test_texts_are_disjoint_exactly_where_no_document_stands_in_both(first: list[str], second: list[str]) -> None:
    if set(first) & set(second):
        with pytest.raises(InputError):
            require_disjoint(text(*first), text(*second))
    else:
        require_disjoint(text(*first), text(*second))


def test_an_overlap_names_both_texts_and_the_document() -> None:
    with pytest.raises(InputError, match=r"heard: document 1 \('seen before'…\).*in the calibration text learnt"):
        require_disjoint(text("x", "seen before", name="learnt"), text("new", "seen before", name="heard"))


@pytest.mark.parametrize("copy", ["a  b\n", "\ta b", "a\r\nb", " a b "])
def test_other_white_space_makes_no_other_document(copy: str) -> None:
    with pytest.raises(InputError):
        require_disjoint(text("a b"), text(copy))


@pytest.mark.parametrize("documents", [(), ("",), ("  \n", "\t")])
def test_a_text_without_words_is_refused(documents: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="empty"):
        Text(name="t", documents=documents)


def test_the_digest_depends_on_documents_and_their_order_alone() -> None:
    assert text("a", "b", name="x").digest == text("a", "b", name="y").digest
    assert len({text("a", "b").digest, text("b", "a").digest, text("ab").digest, text("a", "b", "").digest}) == 4
