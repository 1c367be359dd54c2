"""Compute confidence intervals of repeated measurements, as pure functions.

Each function returns (value, low, high) with low <= value <= high. [low, high] is a 95 % interval from the percentile
bootstrap with a fixed seed: resample with replacement, compute the statistic of each resample, and take the 2.5 % and
97.5 % percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

Samples of one process are more alike than samples of different processes, because a process keeps its memory layout,
page cache and clock rate. Tokens of one window of text are correlated in the same way. The bootstrap therefore
resamples whole processes or windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Statistic = Callable[[np.ndarray], Any]
    """Reduces the last axis of an array of samples."""

CONFIDENCE = 0.95
RESAMPLES = 1000
_SEED = 20_261_122
_T_975 = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantile of Student's t by degrees of freedom; index 0 is unused."""


def median(samples: np.ndarray) -> Any:
    """Return the median along the last axis."""
    import numpy as np

    return np.median(samples, axis=-1)


def maximum(samples: np.ndarray) -> Any:
    """Return the maximum along the last axis."""
    return samples.max(axis=-1)


def percentile(percent: float) -> Statistic:
    """Return the statistic that computes the given percentile along the last axis, linearly interpolated."""
    import numpy as np

    return lambda samples: np.percentile(samples, percent, axis=-1)


def expected_shortfall(percent: float) -> Statistic:
    """Return the statistic that averages the largest 100 - `percent` % of the samples along the last axis.

    With n samples it is the mean of the k largest, where k = max(1, round(n (100 - percent) / 100)) (Acerbi and Tasche,
    On the Coherence of Expected Shortfall, cond-mat/0104295). A percentile gives the start of the tail, the expected
    shortfall its mean.
    """
    import numpy as np

    def tail_mean(samples: np.ndarray) -> Any:
        count = max(1, round(samples.shape[-1] * (100 - percent) / 100))
        return np.partition(samples, -count, axis=-1)[..., -count:].mean(axis=-1)

    return tail_mean


def bootstrap_processes(runs: Sequence[Sequence[float]], statistic: Statistic) -> tuple[float, float, float]:
    """Return the statistic of the pooled samples of P processes with its interval.

    `runs` has shape (P, samples per process). The interval is the union of three, because each alone is sometimes
    too narrow for few processes. With s_1 … s_P the statistic of each process:

    - The two-level bootstrap draws P processes with replacement, then as many samples of each (Davison and Hinkley,
      Bootstrap Methods and Their Application, 1997, section 3.8).
    - The range [min s_i, max s_i] contains the median process with probability 1 - 2 / 2**P, 94 % for five (David and
      Nagaraja, Order Statistics, 2003, section 7.1).
    - Student's t interval is mean(s) ± t(0.975, P - 1) std(s) / sqrt(P).

    If no sample is negative, `low` is at least 0.
    """
    import numpy as np

    samples = np.asarray(runs, dtype=float)
    processes, count = samples.shape
    generator = np.random.default_rng(_SEED)
    drawn_processes = generator.integers(processes, size=(RESAMPLES, processes, 1))
    resamples = samples[drawn_processes, generator.integers(count, size=(RESAMPLES, processes, count))]
    resampled = statistic(resamples.reshape(RESAMPLES, processes * count))
    value, low, high = _percentile_interval(float(statistic(samples.ravel())), resampled)
    by_process = np.asarray(statistic(samples))
    degrees = min(processes, len(_T_975)) - 1
    margin = _T_975[degrees] * by_process.std(ddof=1) / processes**0.5 if processes > 1 else 0.0
    low = min(low, float(by_process.min()), float(by_process.mean() - margin))
    high = max(high, float(by_process.max()), float(by_process.mean() + margin))
    return value, max(low, 0.0) if samples.min() >= 0 else low, high


def bootstrap_clusters(clusters: Sequence[Sequence[float]], statistic: Statistic) -> tuple[float, float, float]:
    """Return the statistic of the samples pooled from all clusters, such as the tokens of windows of text.

    The bootstrap resamples whole clusters (Davison and Hinkley, 1997, section 3.8).
    """
    import numpy as np

    arrays = [np.asarray(cluster, dtype=float) for cluster in clusters]
    draws = np.random.default_rng(_SEED).integers(len(arrays), size=(RESAMPLES, len(arrays)))
    resampled = [float(statistic(np.concatenate([arrays[i] for i in indices]))) for indices in draws]
    return _percentile_interval(float(statistic(np.concatenate(arrays))), resampled)


def bootstrap_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Return sum(numerators) / sum(denominators), resampling the pairs (numerator, denominator).

    With the differences of two engines on the same windows as numerators this is the paired bootstrap.
    """
    import numpy as np

    over, under = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    draws = np.random.default_rng(_SEED).integers(over.size, size=(RESAMPLES, over.size))
    resampled = over[draws].sum(axis=1) / under[draws].sum(axis=1)
    return _percentile_interval(float(over.sum() / under.sum()), resampled)


def bootstrap_group_means(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean of the groups' means, resampling within each group.

    Every group has the same weight, independent of its size (a stratified bootstrap).
    """
    import numpy as np

    generator, arrays = np.random.default_rng(_SEED), [np.asarray(group, dtype=float) for group in groups]
    resampled = [a[generator.integers(a.size, size=(RESAMPLES, a.size))].mean(axis=1) for a in arrays]
    return _percentile_interval(float(np.mean([a.mean() for a in arrays])), np.mean(resampled, axis=0))


def _percentile_interval(value: float, resampled: Any) -> tuple[float, float, float]:
    """Return `value` with the central 95 % of the resampled statistics, extended to contain `value`."""
    import numpy as np

    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return value, min(float(low), value), max(float(high), value)
