"""Perplexity of a GGUF file on windows of token ids, by llama.cpp.

Run as `peer_llamacpp.py MODEL.gguf WINDOWS.json` with a Python that has llama-cpp-python and gguf; it prints
{"perplexity", "weights_bytes"}.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from llama_cpp import Llama

path, windows = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
llama = Llama(path, n_ctx=max(map(len, windows)), n_threads=2, verbose=False, logits_all=True)
nll, count = 0.0, 0
for ids in windows:
    llama.reset()
    llama.eval(ids)
    logits = np.array(llama.scores[: len(ids) - 1], dtype=np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    nll -= log_probabilities[np.arange(len(ids) - 1), ids[1:]].sum()
    count += len(ids) - 1
stored = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
print(json.dumps({"perplexity": math.exp(nll / count), "weights_bytes": stored}))
