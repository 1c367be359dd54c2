"""Text that comes token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeopt.serving.detokenizer import Decoding

BYTES = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES.decoder = decoders.ByteLevel()


def told(text: str, *stops: str) -> tuple[str, bool]:
    """What comes of `text`, a byte a token."""
    decoding, found = Decoding(BYTES, stops), ""
    for token in BYTES.encode(text).ids:
        found += decoding.push(token)
        if decoding.stopped:
            return found, True
    return found + decoding.end(), False


@given(st.text(max_size=40))
def test_a_text_comes_out_as_it_went_in_whatever_its_characters_take(text: str) -> None:
    assert told(text) == (text, False)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    found, stopped = told(text, *stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert found == text
    else:
        seen = text[: min(ends)[0]]
        assert found == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_what_may_begin_a_stop_is_held_back_until_it_does_not() -> None:
    decoding = Decoding(BYTES, ("END",))
    assert [decoding.push(token) for token in BYTES.encode("xEN!").ids] == ["x", "", "", "EN!"]
