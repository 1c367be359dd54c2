"""Name and explain metrics for people."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ABBREVIATIONS = {"rss", "pss", "kl", "cpu", "gpu", "ram", "ttft"}
_UNIT_IN_NAME = re.compile(r"_(ms|mib|s|tokens_per_s)$")

_EXPLANATIONS: Mapping[str, str] = {
    "size/engine_mib": "Size of all files to deploy, in MiB.",
    "memory/peak_rss_mib": "Highest resident memory (RSS) of a fresh process that fills the context of the target.",
    "memory/steady_rss_mib": "Resident memory (RSS) after loading, before the first token.",
    "latency/cold_start_ms": "Time from starting the process to the first token.",
    "latency/load_ms": "Time to open the engine.",
    "latency/burst_ms": "Time until the last of several simultaneous requests is answered.",
    "throughput/decode_tokens_per_s": "Tokens generated per second.",
    "quality/perplexity": "Perplexity on the evaluation text: lower means the model predicts the text better.",
    "quality/perplexity_ratio": "Perplexity divided by the perplexity of the original model; 1 means nothing was lost.",
    "quality/kl_mean": "Mean Kullback-Leibler divergence from the original model's predictions; 0 means identical.",
    "quality/kl_p99": "99th percentile of the Kullback-Leibler divergence from the original model's predictions.",
    "quality/top1_agreement": "Share of positions where the most likely token is the original model's.",
    "quality/exact_match": "Share of greedy continuations that equal the original model's token for token.",
    "quality/parity_error": "Largest logit difference from PyTorch, relative to the largest logit.",
}
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"latency/decode_p(\d+)_ms"), r"Time per generated token, \1th percentile."),
    (re.compile(r"latency/ttft_(\d+)_ms"), r"Time to first token (TTFT) after a prompt of \1 tokens."),
    (re.compile(r"tasks/.*accuracy.*"), "Accuracy on a benchmark task."),
    (re.compile(r"energy/measured/(.*)_j_per_token"), r"Energy per token of the \1, from a hardware counter."),
    (re.compile(r"energy/estimated/(.*)_j_per_token"), r"Energy per token of the \1, estimated by a model."),
    (re.compile(r"energy/measured/power_w"), "Power during decoding, from hardware counters."),
    (re.compile(r"energy/estimated/power_w"), "Power during decoding, estimated by a model."),
)


def readable(metric: str) -> str:
    """Return `memory/peak_rss_mib` as `memory: peak RSS`; the unit is shown with the value."""
    words = _UNIT_IN_NAME.sub("", metric).replace("/", ": ").replace("_", " ").split(" ")
    return " ".join(word.upper() if word in _ABBREVIATIONS else word for word in words)


def explain(metric: str) -> str:
    """Return one sentence on what a metric measures; empty if the metric has none."""
    if metric in _EXPLANATIONS:
        return _EXPLANATIONS[metric]
    for pattern, template in _PATTERNS:
        if match := pattern.fullmatch(metric):
            return match.expand(template)
    return ""
