"""Statistics of repeated measurements: how far a figure may be off, as pure functions.

Samples of one process resemble each other more than samples of two (memory layout, page cache,
clock rate), so processes are resampled as wholes first. Intervals are percentile bootstrap intervals
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) with a fixed seed. Each
function returns (value, low, high), and the value always lies within the interval.
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
# Student's t at 97.5 %, by the number of samples less one (the first has no degree of freedom)
_T = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def median(samples: np.ndarray) -> Any:
    import numpy as np

    return np.median(samples, axis=-1)


def maximum(samples: np.ndarray) -> Any:
    return samples.max(axis=-1)


def percentile(percent: float) -> Statistic:
    import numpy as np

    return lambda samples: np.percentile(samples, percent, axis=-1)


def expected_shortfall(percent: float) -> Statistic:
    """Mean of the largest 100 - `percent` % of the samples, one at least (Acerbi and Tasche, cond-mat/0104295).

    Where a percentile says how bad the tail begins, this says how bad it is.
    """
    import numpy as np

    def worst(samples: np.ndarray) -> Any:
        count = max(1, round(samples.shape[-1] * (100 - percent) / 100))
        return np.partition(samples, -count, axis=-1)[..., -count:].mean(axis=-1)

    return worst


def bootstrap_processes(runs: Sequence[Sequence[float]], statistic: Statistic) -> tuple[float, float, float]:
    """A statistic of the pooled samples of several processes; each process gives equally many samples.

    Three intervals are united, because a few processes make each of them too narrow at times: the
    two-level bootstrap (processes, then samples within them), and of the statistic over single
    processes the range (of five it holds the median process with 1 - 2 / 2**5 = 94 %) and Student's
    t interval. Where no sample is negative, `low` is not either.
    """
    import numpy as np

    samples = np.asarray(runs, dtype=float)
    processes, count = samples.shape
    generator = np.random.default_rng(_SEED)
    chosen = generator.integers(processes, size=(RESAMPLES, processes, 1))
    drawn = samples[chosen, generator.integers(count, size=(RESAMPLES, processes, count))]
    figures = statistic(drawn.reshape(RESAMPLES, processes * count))
    value, low, high = _around(float(statistic(samples.ravel())), figures)
    single = np.asarray(statistic(samples))
    margin = _T[min(processes, len(_T)) - 1] * single.std(ddof=1) / processes**0.5 if processes > 1 else 0.0
    low = min(low, float(single.min()), float(single.mean() - margin))
    high = max(high, float(single.max()), float(single.mean() + margin))
    return value, max(low, 0.0) if samples.min() >= 0 else low, high


def bootstrap_clusters(clusters: Sequence[Sequence[float]], statistic: Statistic) -> tuple[float, float, float]:
    """A statistic of pooled samples that come in clusters, such as tokens in windows of text.

    Whole clusters are resampled.
    """
    import numpy as np

    arrays = [np.asarray(cluster, dtype=float) for cluster in clusters]
    draws = np.random.default_rng(_SEED).integers(len(arrays), size=(RESAMPLES, len(arrays)))
    figures = [float(statistic(np.concatenate([arrays[i] for i in chosen]))) for chosen in draws]
    return _around(float(statistic(np.concatenate(arrays))), figures)


def bootstrap_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """sum(numerators) / sum(denominators), resampling the pairs.

    With differences of two engines on the same windows as numerators this is the paired bootstrap.
    """
    import numpy as np

    over, under = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    draws = np.random.default_rng(_SEED).integers(over.size, size=(RESAMPLES, over.size))
    return _around(float(over.sum() / under.sum()), over[draws].sum(axis=1) / under[draws].sum(axis=1))


def bootstrap_group_means(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of the groups' means, resampling within each group: groups count equally, whatever their sizes."""
    import numpy as np

    generator, arrays = np.random.default_rng(_SEED), [np.asarray(group, dtype=float) for group in groups]
    means = [a[generator.integers(a.size, size=(RESAMPLES, a.size))].mean(axis=1) for a in arrays]
    return _around(float(np.mean([a.mean() for a in arrays])), np.mean(means, axis=0))


def _around(value: float, figures: Any) -> tuple[float, float, float]:
    import numpy as np

    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(figures, [tail, 100 - tail])
    return value, min(float(low), value), max(float(high), value)
