"""Test incremental detokenization with multi-byte characters and stop texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeopt.serving.detokenizer import Detokenizer

BYTE_TOKENIZER = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
BYTE_TOKENIZER.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_TOKENIZER.decoder = decoders.ByteLevel()


def detokenize(text: str, *stop: str) -> tuple[str, bool]:
    """Encode `text` with one token per byte. Return the detokenized text, and whether a stop text ended it."""
    detokenizer, output = Detokenizer(BYTE_TOKENIZER, stop), ""
    for token in BYTE_TOKENIZER.encode(text).ids:
        output += detokenizer.push(token)
        if detokenizer.stopped:
            return output, True
    return output + detokenizer.flush(), False


@given(st.text(max_size=40))
def test_text_survives_round_trip(text: str) -> None:
    assert detokenize(text) == (text, False)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_output_ends_before_first_stop(text: str, stops: list[str]) -> None:
    output, stopped = detokenize(text, *stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert output == text
    else:
        consumed = text[: min(ends)[0]]
        assert output == consumed[: min(consumed.find(stop) for stop in stops if stop in consumed)]


def test_partial_stop_is_held_back() -> None:
    detokenizer = Detokenizer(BYTE_TOKENIZER, ("END",))
    assert [detokenizer.push(token) for token in BYTE_TOKENIZER.encode("xEN!").ids] == ["x", "", "", "EN!"]
