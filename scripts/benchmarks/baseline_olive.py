"""An evaluator of Olive's that minimizes perplexity on windows of token ids, and bytes.

Imported by Olive as a user script; each evaluation is told with the time at which it was known. It is an evaluator of
its own because Olive 0.13 cannot write down metrics of the type `custom`; those that it is given stand for their names.
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


@Registry.register("judge")
class Judge(OliveEvaluator):
    def __init__(self, windows, told, **more):
        super().__init__(**more)
        self.windows, self.told = windows, told

    def evaluate(self, model, metrics, device="cpu", execution_providers=None):
        found = measured(Path(model.model_path), self.windows)
        with Path(self.told).open("a") as file:
            file.write(json.dumps({**found, "at": time.time()}) + "\n")
        wanted = [(metric.name, sub) for metric in metrics for sub in metric.sub_types]
        return MetricResult.model_validate(
            {
                f"{name}-{sub.name}": {"value": found[name], "priority": sub.priority, "higher_is_better": False}
                for name, sub in wanted
            }
        )


def measured(path, windows):
    folder = path if path.is_dir() else path.parent
    session = onnxruntime.InferenceSession(str(next(folder.glob("*.onnx"))), providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    names = {entry.name for entry in session.get_inputs()}
    nll, count = 0.0, 0
    for ids in json.loads(Path(windows).read_text()):
        row = np.array([ids], dtype=np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
        feed |= {name: past for name in names if name.startswith("past_")}
        given = {name: value for name, value in feed.items() if name in names}
        logits = session.run(["logits"], given)[0][0].astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        nll -= log_probabilities[np.arange(len(ids) - 1), row[0, 1:]].sum()
        count += len(ids) - 1
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {"perplexity": math.exp(nll / count), "mib": size / 2**20}
