"""Predict the result of a trial by arithmetic, from the sizes of the model. This takes milliseconds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

from edgeopt.checkpoints import importing
from edgeopt.config import parse
from edgeopt.config.assemble import Request, empty_result, this_machine
from edgeopt.core.config_objects import canonical_json, instantiate
from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.result import Failure
from edgeopt.errors import EdgeoptError
from edgeopt.pipeline import evaluate as pipeline
from edgeopt.search.expected_error import expected_error
from edgeopt.search.prediction import Prediction
from edgeopt.search.space.parameter import Params


def predict_trial(request: Request, params: Params) -> Prediction:
    """Predict the metrics and the expected error of one trial.

    Invalid parameters give a prediction with a failure of stage `plan`.
    """
    empty = empty_result(request, params)
    try:
        config = request.compose(params)
        target = parse.instantiate_group(config, "target")
        runtime = parse.instantiate_group(config, "runtime")
        recipe = parse.recipe(config)
        original, copied_bytes = _model_sizes(canonical_json(config["model"]))
        steps = [(name, instantiate(step, f"step.{name}")) for name, step in recipe.steps]
        plan = pipeline.plan(steps, runtime, original)
    except EdgeoptError as error:
        failure = Failure(stage="plan", kind=type(error).__name__, message=str(error))
        return Prediction(result=replace(empty, failure=failure))
    emulated = target.is_emulated_by(this_machine())
    predictions = plan.runtime.predict(plan.spec, target, copied_bytes=copied_bytes)
    uncompressed = plan.runtime.baseline.predict(original, target, copied_bytes=copied_bytes)
    return Prediction(
        result=replace(empty, recipe=recipe.summary(), predictions=predictions, emulated=emulated, target=target.name),
        expected_error=expected_error([step for _, step in steps], plan.specs),
        baseline={m.metric: m.value for m in uncompressed},
    )


@cache
def _model_sizes(config_json: str) -> tuple[ModelSpec, int]:
    """Return the model spec of a source, and the bytes of the files that its engines copy; read once per process."""
    folder = instantiate(json.loads(config_json), "model").locate()
    return importing.spec_of(folder), importing.copied_bytes(folder)
