"""Build the engine of every recipe in conf/ and check that it uses no slow path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.stages import build_engine, compression_context

from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.config import parse
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.config_objects import instantiate
from edgeopt.core.corpus import Text
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "recipe").glob("*.yaml"))
SMALL = {
    "tokens": 256,
    "batch_tokens": 128,
    "window_tokens": 64,
    "windows": 4,
    "block_size": 16,
    "block_sizes": [16, 32],
    "powers": 3,
    "rank": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "max_perplexity_ratio": None,
}
"""Values of steps that suit the tiny model and a short text."""
TEXT = Text(
    name="text", documents=tuple(f"def read{n}(path):\n    return open(path).read({n})\n" * 6 for n in range(16))
)


def shrink(config: Any) -> Any:
    """Return the config of a step with the values of SMALL; values that are null stay."""
    if isinstance(config, dict):
        return {
            key: SMALL[key] if key in SMALL and value is not None else shrink(value) for key, value in config.items()
        }
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_engine_of_every_recipe_has_no_slow_path(recipe: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    original = checkpoint = import_checkpoint(tiny_model, tmp_path / "model")
    config = parse.compose([f"recipe={recipe}"])
    runtime = instantiate(dict(config["runtime"]), "runtime")
    if isinstance(runtime, LlamaCpp):
        pytest.importorskip("llama_cpp")
    if recipe == "heads_int4":
        config["step"]["prune"]["ratio"] = 0.5  # of two key-value heads
    for name, step in parse.recipe(config).steps:
        folder = tmp_path / name
        folder.mkdir()
        spec = instantiate(shrink(dict(step)), f"step.{name}").apply(
            checkpoint, folder, compression_context(original, TEXT)
        )
        checkpoint = Checkpoint.seal(folder, format="checkpoint-1", spec=spec, made_by={})
    runtime.check(checkpoint.spec)
    engine = build_engine(runtime, checkpoint, tmp_path / "engine")
    slow = [finding for finding in runtime.lint(engine) if "adapter branch" not in finding]
    assert slow == []
    assert ("int4_adapter" in recipe) == bool(runtime.lint(engine)), "only separate adapters add branches"
