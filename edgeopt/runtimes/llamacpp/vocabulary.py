"""A tokenizer of transformers in the form that llama.cpp's own tools read.

edgeopt reads engines by token ids; whoever takes the file to llama.cpp itself finds tokens, merges, special tokens and
the chat template in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

BYTE_LEVEL, PIECES = "gpt2", "llama"
"""llama.cpp's names of byte-level BPE and of SentencePiece's."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, str] = {
    _WORDS.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
    _WORDS.replace("DIGITS", r"\p{N}"): "qwen2",
}
"""llama.cpp's names of the patterns by which byte-level tokenizers split text first."""


def write(writer: gguf.GGUFWriter, directory: Path, size: int) -> None:
    """Write the tokenizer in `directory` for a model of `size` tokens, of which it may know fewer."""
    document = json.loads((directory / "tokenizer.json").read_text())
    model, added = document["model"], {entry["id"]: entry for entry in document.get("added_tokens", ())}
    known = {number: token for token, number in _numbered(model).items()}
    known |= {number: entry["content"] for number, entry in added.items()}
    tokens = [known.get(number, f"[PAD{number}]") for number in range(size)]
    writer.add_token_list(tokens)
    writer.add_token_types([_kind(number, known, added) for number in range(size)])
    if _is_byte_level(document):
        writer.add_tokenizer_model(BYTE_LEVEL)
        writer.add_tokenizer_pre(_split(document))
    else:
        writer.add_tokenizer_model(PIECES)
        writer.add_token_scores(_scores(model, tokens))
    gguf.SpecialVocab(directory, load_merges=_is_byte_level(document), n_vocab=size).add_to_gguf(writer, quiet=True)


def _numbered(model: Mapping[str, Any]) -> dict[str, int]:
    """The number of each token; Unigram models list them in their order."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {token: number for number, (token, _) in enumerate(vocabulary)}


def _kind(number: int, known: Mapping[int, str], added: Mapping[int, Any]) -> int:
    kinds = gguf.TokenType
    if number not in known:
        return int(kinds.UNUSED)
    if number in added:
        return int(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
    token = known[number]
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(kinds.BYTE if is_byte else kinds.NORMAL)


def _is_byte_level(document: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(document.get("pre_tokenizer")))


def _split(document: Mapping[str, Any]) -> str:
    parts = _parts(document.get("pre_tokenizer"))
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    if patterns:
        return next((SPLITS[pattern] for pattern in patterns if pattern in SPLITS), "default")
    return "smollm" if any(part["type"] == "Digits" for part in parts) else "gpt-2"


def _parts(given: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer that may be a sequence of them."""
    if given is None:
        return []
    inner = given.get("pretokenizers") if given["type"] == "Sequence" else None
    return [given] if inner is None else list(inner)


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """By which SentencePiece's BPE prefers one merge to another: here the earlier one."""
    if not isinstance(model["vocab"], Mapping):
        return [score for _, score in model["vocab"]] + [0.0] * (len(tokens) - len(model["vocab"]))
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    ranks = {first + second: -float(rank) for rank, (first, second) in enumerate(pairs)}
    return [ranks.get(token, 0.0) for token in tokens]
