"""Reproduce the published perplexities of a trained model, if its files are available."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from support.stages import apply_step, build_engine

from edgeopt.checkpoints import tokenizer as tokens
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.runtimes.genai.runtime import Genai

STORIES, STORY_TOKENS = 150, 400


@pytest.fixture(scope="module")
def checkpoint(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_checkpoint(realdata / "TinyStories-656K", tmp_path_factory.mktemp("tinystories"))


@pytest.fixture(scope="module")
def stories(realdata: Path, checkpoint: Checkpoint) -> list[list[int]]:
    tokenizer, prefix = tokens.load(checkpoint.directory), tokens.prefix_ids(checkpoint.directory)
    with (realdata / "tinystories" / "evaluation.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, STORIES)]
    return [(prefix + tokenizer.encode(text, add_special_tokens=False).ids)[:STORY_TOKENS] for text in texts]


def perplexity(engine: Engine, stories: list[list[int]]) -> float:
    """Return the perplexity of the engine on all stories."""
    session = Genai().open(engine, threads=2)
    nats, count = 0.0, 0
    for story in stories:
        logits = session.logits(story)[:-1].astype(np.float64)
        target_logits = logits[np.arange(len(logits)), story[1:]]
        nats += float((np.log(np.exp(logits).sum(axis=1)) - target_logits).sum())
        count += len(logits)
    session.close()
    return float(np.exp(nats / count))


@pytest.mark.parametrize(
    ("values", "lowest", "highest"),
    [
        ({"weights": "fp32"}, 22.495, 22.505),
        ({"weights": "int8", "lm_head": "int8", "embedding": "float"}, 22.45, 22.54),
        ({"weights": "int4", "lm_head": "int4", "embedding": "int4"}, 23.5, 24.12),
    ],
    ids=lambda v: v["weights"] if isinstance(v, dict) else "",
)
def test_perplexity_matches_published_values(
    values: dict[str, str],
    lowest: float,
    highest: float,
    checkpoint: Checkpoint,
    stories: list[list[int]],
    tmp_path: Path,
) -> None:
    """The upper bound of int4 is the perplexity under ONNX Runtime's own quantizer."""
    quantized = apply_step(Quantize(**values), checkpoint, tmp_path / "quantized")
    engine = build_engine(Genai(), quantized, tmp_path / "engine")
    assert lowest <= perplexity(engine, stories) <= highest
