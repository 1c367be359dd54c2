"""Summarize a study in sentences: the recommended trial, and why a trial is or is not on the front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.recipe import label
from edgeopt.core.study_snapshot import ObjectiveSnapshot, StudySnapshot, TrialSnapshot

MIN_COMPARED, MAX_COMPARED = 2, 4
"""Number of trials in one comparison."""
_PHRASES = {
    "size": ("smaller", "larger"),
    "latency": ("faster", "slower"),
    "throughput": ("slower", "faster"),
}
"""Words for a value below and above the baseline, by the first part of the metric. Others use `lower NAME`."""
_SAME = 0.005


def recommended(snapshot: StudySnapshot) -> TrialSnapshot | None:
    """Return the champion's trial, or else the front's best compromise; None if the front is empty.

    The compromise has the lowest sum of its objectives, each scaled to 0 … 1 over the front.
    """
    front = [t for t in snapshot.front if all(o.metric in t.metrics for o in snapshot.objectives)]
    if snapshot.champion is not None:
        for trial in snapshot.trials:
            if trial.number == snapshot.champion.trial:
                return trial
    if not front:
        return None
    totals = dict.fromkeys((trial.number for trial in front), 0.0)
    for objective in snapshot.objectives:
        sign = 1.0 if objective.direction == "minimize" else -1.0
        values = {trial.number: sign * trial.metrics[objective.metric] for trial in front}
        low, spread = min(values.values()), max(values.values()) - min(values.values())
        for number, value in values.items():
            totals[number] += (value - low) / spread if spread else 0.0
    return min(front, key=lambda trial: (totals[trial.number], trial.number))


def summary(snapshot: StudySnapshot) -> str:
    """Return one or two sentences: the recommended trial compared with the original model, and the reason."""
    trial = recommended(snapshot)
    if trial is None:
        over = sum(1 for t in snapshot.trials if t.is_over)
        return f"No trial satisfies every limit yet ({over} of {len(snapshot.trials)} trials are over)."
    compared = comparison(trial, snapshot.objectives)
    versus = f" Compared with the original model it {compared}." if compared else ""
    if snapshot.champion is not None and trial.number == snapshot.champion.trial:
        reason = f"it is the champion (version {snapshot.champion.version} of {snapshot.champion.name})"
    elif len(snapshot.front) == 1:
        reason = "it is the only trial on the front"
    else:
        reason = f"it is the best compromise among the {len(snapshot.front)} trials on the front"
    return f"Recommended: trial {trial.number} ({label(trial.params) or 'no parameters'}), because {reason}.{versus}"


def comparison(trial: TrialSnapshot, objectives: Sequence[ObjectiveSnapshot]) -> str:
    """Return a verb phrase on the trial's objectives relative to its baseline; empty if the baseline is unknown.

    Example: `is 76 % smaller and 40 % faster, with 3.5 % higher perplexity`.
    """
    adjectives: list[str] = []
    nouns: list[str] = []
    for objective, change in _changes(trial, objectives):
        is_adjective = _group(objective.metric) in _PHRASES and abs(change) >= _SAME
        (adjectives if is_adjective else nouns).append(_relative(objective.metric, change))
    if not adjectives:
        return f"has {_join(nouns)}" if nouns else ""
    return f"is {_join(adjectives)}" + (f", with {_join(nouns)}" if nouns else "")


def _changes(
    trial: TrialSnapshot, objectives: Sequence[ObjectiveSnapshot]
) -> Iterator[tuple[ObjectiveSnapshot, float]]:
    """Yield each objective that was measured for the trial and its baseline, with the relative change."""
    for objective in objectives:
        value, base = trial.metrics.get(objective.metric), trial.baseline.get(objective.metric)
        if value is not None and base:
            yield objective, value / base - 1


def _relative(metric: str, change: float) -> str:
    name = readable(metric).rpartition(": ")[2]
    if abs(change) < _SAME:
        return "the same size" if _group(metric) == "size" else f"the same {name}"
    below, above = _PHRASES.get(_group(metric), (f"lower {name}", f"higher {name}"))
    percent = f"{100 * abs(change):.0f}" if abs(change) >= 0.1 else f"{100 * abs(change):.2g}"
    return f"{percent} % {below if change < 0 else above}"


def _group(metric: str) -> str:
    return metric.split("/")[0]


def _join(phrases: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def explanation(snapshot: StudySnapshot, trial: TrialSnapshot) -> list[str]:
    """Return five lines: the recipe, gains, losses, limits, and why the trial is or is not on the front."""
    better: list[str] = []
    worse: list[str] = []
    for objective, change in _changes(trial, snapshot.objectives):
        gain = change < 0 if objective.direction == "minimize" else change > 0
        if abs(change) >= _SAME:
            (better if gain else worse).append(_relative(objective.metric, change))
    known = any(o.metric in trial.baseline for o in snapshot.objectives)
    unknown = "not known: the original model was not measured for this trial"
    return [
        f"recipe: {label(trial.params) or 'no parameters'} (trial {trial.number}, {trial.origin})",
        f"gained: {', '.join(better) or ('nothing' if known else unknown)}",
        f"lost: {', '.join(worse) or ('nothing' if known else unknown)}",
        f"limits: {_limits(snapshot, trial)}",
        f"outcome: {_outcome(snapshot, trial)}",
    ]


def _limits(snapshot: StudySnapshot, trial: TrialSnapshot) -> str:
    if not snapshot.limits:
        return "none were set"
    parts = []
    for limit in snapshot.limits:
        excess = trial.excess.get(limit.metric)
        if excess is None:
            parts.append(f"{limit.metric} not measured")
        elif excess > 0:
            parts.append(
                f"{limit.metric} exceeds {_bound(limit.bound, limit.unit, limit.text)} by {100 * excess:.1f} %"
            )
        else:
            parts.append(
                f"{limit.metric} within {_bound(limit.bound, limit.unit, limit.text)} by {-100 * excess:.1f} %"
            )
    return "; ".join(parts)


def _bound(bound: float | None, unit: str, text: str) -> str:
    return text if bound is None else units.format_quantity(bound, unit)


def _outcome(snapshot: StudySnapshot, trial: TrialSnapshot) -> str:
    if trial.outcome == "failed":
        return f"failed: {trial.failure}"
    if trial.outcome == "front":
        best = [o.metric for o in snapshot.objectives if _is_best(snapshot, trial, o)]
        words = f"; best in {', '.join(best)}" if best else ""
        return f"on the front: no feasible trial dominates it{words}"
    if trial.outcome == "feasible":
        better = _dominating(snapshot, trial)
        if better is None:
            return "feasible, but an objective was not measured, so it is not ranked"
        return f"feasible, but trial {better.number} is at least as good in every objective and better in one"
    if trial.outcome in ("refused", "stopped"):
        return f"{trial.outcome_text}: {', '.join(trial.exceeded) or 'a limit'} would be exceeded"
    if trial.outcome == "infeasible":
        if trial.is_disturbed:
            return "infeasible: other processes disturbed a measurement, so a limit is not proven"
        return "infeasible: every limit must be measured and satisfied by the whole confidence interval"
    return trial.outcome_text


def _is_best(snapshot: StudySnapshot, trial: TrialSnapshot, objective: ObjectiveSnapshot) -> bool:
    values = [t.metrics[objective.metric] for t in snapshot.front if objective.metric in t.metrics]
    best = min(values) if objective.direction == "minimize" else max(values)
    return len(values) > 1 and trial.metrics.get(objective.metric) == best


def _dominating(snapshot: StudySnapshot, trial: TrialSnapshot) -> TrialSnapshot | None:
    names = [(o.metric, 1.0 if o.direction == "minimize" else -1.0) for o in snapshot.objectives]
    if any(name not in trial.metrics for name, _ in names):
        return None
    own = [sign * trial.metrics[name] for name, sign in names]
    for other in snapshot.front:
        values = [sign * other.metrics[name] for name, sign in names]
        if all(x <= y for x, y in zip(values, own, strict=True)) and values != own:
            return other
    return None
