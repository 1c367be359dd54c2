"""Check the errors of invalid sweeps: they are raised before the first trial."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import ErrorOf

SWEEP: dict[str, tuple[list[str], list[str]]] = {
    "misspelt sweep": (["--config-name", "referenec"], ["--config-name: ", "'referenec'", "Did you mean reference?"]),
    "config that is not a sweep": (["--config-name", "config"], ["search: nothing is configured"]),
    "misspelt direction": (
        ["search.objectives={latency/decode_p50_ms: minimise}"],
        ["search.objectives.latency/decode_p50_ms: ", "minimize or maximize, got 'minimise'"],
    ),
    "unknown metric in objectives": (
        ["++search.objectives={quality/perplexty: minimize}"],
        ["search.objectives.quality/perplexty", "quality/perplexity"],
    ),
    "objective that is not measured": (
        ["measure.probes.quality=null", "model=local", "model.path={tiny}"],
        ["search.objectives.quality/perplexity: the objective quality/perplexity is not measured", "null"],
    ),
    "no objective left": (
        ["search.objectives={quality/perplexity: null, latency/decode_p50_ms: null, size/engine_mib: null}"],
        ["search.objectives: `objectives` must set the direction of at least one metric"],
    ),
    "unknown metric in limits": (["limits.size.engine_mbi=3 MiB"], ["'size/engine_mbi'", "size/engine_mib"]),
    "limit without unit": (["limits.size.engine_mib=3"], ["limits.size.engine_mib: the value must have a unit, got 3"]),
    "enqueued outside the space": (["search.enqueue=[{recipe: int3}]"], ["search.enqueue: ", "got 'int3' for recipe"]),
    "enqueued without a parameter": (["search.enqueue=[{recipe: int4}]"], ["search.enqueue: ", "block_size"]),
    "enqueued number": (["search.enqueue=[3]"], ["search.enqueue[0]: `enqueue[0]` must be a mapping, got 3"]),
    "unknown sampler": (
        ["search.sampler=tpee"],
        ["search.sampler: `sampler` must be one of ", "tpe, nsga2, gp, random; got 'tpee'", "Did you mean tpe?"],
    ),
    "no trials": (["search.trials=0"], ["search.trials: `trials` must be at least 1, got 0"]),
    "study with a slash": (["search.study=a/b"], ["search.study: `study` must be a name without slashes, got 'a/b'"]),
    "parameter that is a number": (
        ["search.parameters.recipe=3"],
        ["search.parameters.recipe: ", "must be a mapping, got 3"],
    ),
    "unknown policy": (["promote=nope", "model=local", "model.path={tiny}"], ["nope.yaml", "default.yaml"]),
    "parameter that is not a key": (
        ["+search.parameters.recipes={choices: [int4], when: {recipe: [prune_int4]}}"],
        ["recipes: ", "Did you mean recipe?"],
    ),
    "choice that does not exist": (["search.parameters.recipe.choices=[int8,int44]", "search.enqueue=[]"], ["int44"]),
    "misspelt override": (["serch.trials=3"], ["serch.trials: ", "Did you mean search.trials?"]),
}


@pytest.mark.parametrize("case", SWEEP)
def test_bad_sweep_is_rejected_before_its_first_trial(
    case: str, error_of: ErrorOf, work: Path, tiny_model: Path
) -> None:
    overrides, expected = SWEEP[case]
    line = error_of("sweep", *(o.replace("{tiny}", str(tiny_model)) for o in overrides))
    assert [part for part in expected if part not in line] == [], line
    assert not list(work.glob(".edgeopt/studies/*/trials")), "no trial started"
    assert not list(work.glob("mlflow.db")), "nothing was recorded"
