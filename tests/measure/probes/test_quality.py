"""Test quality and parity on bigram engines, whose metrics follow from their table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import toy_bench

from edgeopt.core.judge import judge
from edgeopt.core.target import Limit
from edgeopt.errors import MeasureError
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.probes.quality import Quality, estimate_perplexity, find_regressed_windows

QUALITY = ("quality", "parity")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Return the folder of a measured baseline and its measurements by metric."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, toy_bench.build_and_measure(folder, FakeRuntime(), toy_bench.make_bench(*QUALITY))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, baseline):
    folder, scratch = tmp_path_factory.mktemp("compressed"), baseline[0] / "measured" / "scratch"
    references = {"baseline": scratch, "checkpoint": scratch}
    return folder, toy_bench.build_and_measure(
        folder, FakeRuntime(noise=0.5), toy_bench.make_bench(*QUALITY), references=references
    )


def samples(folder, probe="quality"):
    (run,) = json.loads((folder / "measured" / "samples.json").read_text())["runs"]
    return run["report"]["samples"][probe]


def windows(folder):
    from edgeopt.measure.harness.workload import build_workload

    return build_workload(
        toy_bench.make_text(),
        folder / "engine",
        context_length=128,
        prompt_lengths=(16,),
        window_tokens=512,
        max_windows=8,
    ).documents


def log_p(folder, ids):
    """Return log p of the next token after each token except the last, shape (tokens - 1, vocabulary)."""
    rows = np.load(folder / "engine" / "table.npy").astype(np.float64)[ids[:-1]]
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def test_perplexity_matches_the_table(baseline):
    folder, measurements = baseline
    chosen = np.concatenate([log_p(folder, ids)[np.arange(len(ids) - 1), ids[1:]] for ids in windows(folder)])
    assert measurements["quality/perplexity"].value == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
    assert measurements["quality/perplexity"].count == chosen.size


def test_divergence_matches_both_tables(baseline, compressed):
    pairs = [(log_p(baseline[0], ids), log_p(compressed[0], ids)) for ids in windows(baseline[0])]
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(axis=-1) for p, q in pairs])
    same = np.concatenate([p.argmax(axis=-1) == q.argmax(axis=-1) for p, q in pairs])
    measurements = compressed[1]
    assert measurements["quality/kl_mean"].value == pytest.approx(kl.mean(), rel=1e-3)
    assert measurements["quality/kl_p99"].value == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert measurements["quality/top1_agreement"].value == pytest.approx(same.mean())


def test_worst_decile_is_mean_of_largest_tenth(baseline, compressed):
    pairs = [(log_p(baseline[0], ids), log_p(compressed[0], ids)) for ids in windows(baseline[0])]
    kl = np.sort(np.concatenate([(np.exp(p) * (p - q)).sum(axis=-1) for p, q in pairs]))
    worst = compressed[1]["quality/kl_worst_decile"]
    assert worst.value == pytest.approx(kl[-round(kl.size / 10) :].mean(), rel=1e-3)
    assert worst.value >= np.percentile(kl, 90)
    assert worst.low < worst.value < worst.high


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.2])
def test_regressed_share_counts_windows_above_margin(baseline, compressed, tmp_path, margin):
    mean_log_p = [
        np.mean([log_p(folder, ids)[i, token] for i, token in enumerate(ids[1:])])
        for folder in (baseline[0], compressed[0])
        for ids in windows(folder)
    ]
    above_margin = np.subtract(*np.split(np.asarray(mean_log_p), 2)) > margin
    bench = toy_bench.make_bench(
        probes={"quality": {"_target_": "edgeopt.measure.probes.quality.Quality", "margin_nats": margin}}
    )
    references = {"baseline": baseline[0] / "measured" / "scratch"}
    share = toy_bench.build_and_measure(tmp_path, FakeRuntime(noise=0.5), bench, references=references)[
        "quality/regressed_share"
    ]
    assert share.value == pytest.approx(above_margin.mean())
    assert share.count == above_margin.size
    assert f"more than {margin:g} nats per token" in share.method


@pytest.mark.parametrize(
    ("metric", "limit", "satisfied"),
    [
        ("quality/regressed_share", "100 %", True),
        ("quality/regressed_share", 0.05, False),
        ("quality/kl_worst_decile", "5 nats", True),
        ("quality/kl_worst_decile", 0.01, False),
    ],
)
def test_limits_apply_to_tail_metrics(compressed, metric, limit, satisfied):
    (verdict,) = judge(compressed[1].values(), [Limit.parse(metric, limit, Quality.METRICS)], {})
    assert verdict.satisfied is satisfied
    assert satisfied or "above" in verdict.reason


def test_window_at_the_margin_has_not_regressed():
    assert find_regressed_windows([1.0, 1.5, -3.0], [4, 4, 4], 0.25) == [False, True, False]


def test_ratio_is_quotient_of_perplexities(baseline, compressed):
    expected = compressed[1]["quality/perplexity"].value / baseline[1]["quality/perplexity"].value
    ratio = compressed[1]["quality/perplexity_ratio"]
    assert ratio.value == pytest.approx(expected, rel=1e-6)
    assert ratio.low < ratio.value < ratio.high


def test_paired_interval_is_narrower(compressed):
    ratio, perplexity = compressed[1]["quality/perplexity_ratio"], compressed[1]["quality/perplexity"]
    assert (ratio.high - ratio.low) / ratio.value < (perplexity.high - perplexity.low) / perplexity.value


def test_engine_equals_itself(baseline, tmp_path):
    scratch = baseline[0] / "measured" / "scratch"
    measurements = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(), toy_bench.make_bench(*QUALITY), references={"baseline": scratch, "checkpoint": scratch}
    )
    assert measurements["quality/perplexity_ratio"].value == measurements["quality/perplexity_ratio"].high == 1
    assert measurements["quality/kl_p99"].high < 1e-5
    assert measurements["quality/regressed_share"].high == 0
    assert measurements["quality/top1_agreement"].value == 1
    assert measurements["quality/parity_error"].value == 0
    assert measurements["quality/parity_top1"].value == 1


def test_parity_error_is_relative_to_largest_logit(baseline, compressed):
    ids = np.concatenate([window[:64] for window in windows(baseline[0])[:4]])
    expected_logits, logits = (np.load(folder / "engine" / "table.npy")[ids] for folder, _ in (baseline, compressed))
    expected = np.abs(expected_logits - logits).max() / np.abs(expected_logits).max()
    assert compressed[1]["quality/parity_error"].value == pytest.approx(expected, rel=1e-6)


def test_relative_metrics_need_references(baseline):
    assert set(baseline[1]) == {"quality/perplexity"}


def test_worst_windows_are_recorded_as_text(compressed):
    worst = samples(compressed[0])["worst"]
    losses = [window["nll_per_token"] for window in worst]
    assert losses == sorted(losses, reverse=True)
    assert len(worst) == 8
    assert worst[0]["text"].startswith("w")
    assert worst[0]["baseline_nll_per_token"] > 0


def test_baseline_of_other_text_is_rejected(baseline, tmp_path):
    with pytest.raises(MeasureError, match="got other windows"):
        toy_bench.build_and_measure(
            tmp_path,
            FakeRuntime(),
            toy_bench.make_bench("quality"),
            evaluation=toy_bench.make_text(seed=9),
            references={"baseline": baseline[0] / "measured" / "scratch"},
        )


def test_extreme_loss_is_an_error():
    with pytest.raises(MeasureError, match="does not model the text"):
        estimate_perplexity([1e6, 1e6], [1, 1])
