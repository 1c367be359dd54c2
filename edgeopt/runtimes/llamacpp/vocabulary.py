"""Write the tokenizer of a transformers model into a GGUF file, for use by llama.cpp's own tools.

edgeopt itself passes token ids to engines. llama.cpp's tools read tokens, merges, special tokens and the chat template
from the GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

BYTE_LEVEL_BPE, SENTENCEPIECE = "gpt2", "llama"
"""llama.cpp's names of the two tokenizer models."""
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[str, str] = {
    _WORD_PATTERN.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
    _WORD_PATTERN.replace("DIGITS", r"\p{N}"): "qwen2",
}
"""llama.cpp's names of pre-tokenizers, by the regular expression that splits text before byte-level BPE."""


def write(writer: gguf.GGUFWriter, directory: Path, size: int) -> None:
    """Write the tokenizer in `directory`, padded to a vocabulary of `size` tokens."""
    document = json.loads((directory / "tokenizer.json").read_text())
    model, added = document["model"], {entry["id"]: entry for entry in document.get("added_tokens", ())}
    tokens_by_id = {token_id: token for token, token_id in _token_ids(model).items()}
    tokens_by_id |= {token_id: entry["content"] for token_id, entry in added.items()}
    tokens = [tokens_by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(size)]
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(token_id, tokens_by_id, added) for token_id in range(size)])
    if _is_byte_level(document):
        writer.add_tokenizer_model(BYTE_LEVEL_BPE)
        writer.add_tokenizer_pre(_pre_tokenizer_name(document))
    else:
        writer.add_tokenizer_model(SENTENCEPIECE)
        writer.add_token_scores(_scores(model, tokens))
    gguf.SpecialVocab(directory, load_merges=_is_byte_level(document), n_vocab=size).add_to_gguf(writer, quiet=True)


def _token_ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each token. A Unigram model lists its tokens in the order of their ids."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {token: token_id for token_id, (token, _) in enumerate(vocabulary)}


def _token_type(token_id: int, tokens_by_id: Mapping[int, str], added: Mapping[int, Any]) -> int:
    types = gguf.TokenType
    if token_id not in tokens_by_id:
        return int(types.UNUSED)
    if token_id in added:
        return int(types.CONTROL if added[token_id]["special"] else types.USER_DEFINED)
    token = tokens_by_id[token_id]
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(types.BYTE if is_byte else types.NORMAL)


def _is_byte_level(document: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _pre_tokenizer_steps(document.get("pre_tokenizer")))


def _pre_tokenizer_name(document: Mapping[str, Any]) -> str:
    steps = _pre_tokenizer_steps(document.get("pre_tokenizer"))
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if patterns:
        return next((PRE_TOKENIZERS[pattern] for pattern in patterns if pattern in PRE_TOKENIZERS), "default")
    return "smollm" if any(step["type"] == "Digits" for step in steps) else "gpt-2"


def _pre_tokenizer_steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a pre-tokenizer, which is one step or a `Sequence` of steps."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer["type"] == "Sequence" else None
    return [pre_tokenizer] if steps is None else list(steps)


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Return the scores that order SentencePiece's merges: those of a Unigram model, or minus the rank of a merge."""
    if not isinstance(model["vocab"], Mapping):
        return [score for _, score in model["vocab"]] + [0.0] * (len(tokens) - len(model["vocab"]))
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    scores = {first + second: -float(rank) for rank, (first, second) in enumerate(pairs)}
    return [scores.get(token, 0.0) for token in tokens]
