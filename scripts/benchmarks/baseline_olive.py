"""Evaluate models for Olive's search by perplexity on windows of token ids, and by size on disk.

Olive imports this module as a user script. Each evaluation is logged with its completion time. Olive 0.13 cannot
serialize metrics of type `custom`, so the search declares metrics of other types. Only their names are used.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import onnxruntime
from olive.evaluator.metric_result import MetricResult
from olive.evaluator.olive_evaluator import OliveEvaluator
from olive.evaluator.registry import Registry


@Registry.register("edgeopt_evaluator")
class PerplexityEvaluator(OliveEvaluator):
    """Olive evaluator that appends every evaluation to the JSON lines file `log`."""

    def __init__(self, windows, log, **options):
        super().__init__(**options)
        self.windows, self.log = windows, log

    def evaluate(self, model, metrics, device="cpu", execution_providers=None):
        values = measure(Path(model.model_path), self.windows)
        with Path(self.log).open("a") as file:
            file.write(json.dumps({**values, "at": time.time()}) + "\n")
        requested = [(metric.name, sub) for metric in metrics for sub in metric.sub_types]
        return MetricResult.model_validate(
            {
                f"{name}-{sub.name}": {"value": values[name], "priority": sub.priority, "higher_is_better": False}
                for name, sub in requested
            }
        )


def measure(path, windows):
    """Return perplexity and size in MiB of the ONNX model at `path`."""
    folder = path if path.is_dir() else path.parent
    session = onnxruntime.InferenceSession(str(next(folder.glob("*.onnx"))), providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty_cache = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    input_names = {entry.name for entry in session.get_inputs()}
    nll, count = 0.0, 0
    for ids in json.loads(Path(windows).read_text()):
        row = np.array([ids], dtype=np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
        feed |= {name: empty_cache for name in input_names if name.startswith("past_")}
        inputs = {name: value for name, value in feed.items() if name in input_names}
        logits = session.run(["logits"], inputs)[0][0].astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        nll -= log_probabilities[np.arange(len(ids) - 1), row[0, 1:]].sum()
        count += len(ids) - 1
    size_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {"perplexity": math.exp(nll / count), "mib": size_bytes / 2**20}
