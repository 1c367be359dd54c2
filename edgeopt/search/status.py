"""How a study goes, in plain data: who works, what was spent and saved, how the front grows, when it may end."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from edgeopt.search.pareto.ranking import EVALUATED, spent_j, spent_s
from edgeopt.search.storage.trial import DONE, Row
from edgeopt.search.study import Study


def status(study: Study) -> dict[str, Any]:
    """The document of `edgeopt status`. Seconds and joules are those of all trials together, whoever evaluated them."""
    rows, members, standing = study.rows(), study.ledger.members(), study.standing
    at_work = {row.worker: row for row in rows if row.state == "running"}
    evaluated = [row for row in rows if row.state in EVALUATED]
    over, front = study.over(), standing.front(rows)
    return {
        "study": study.name,
        "over": over,
        "workers": [
            {"worker": m.worker, "role": m.role, "trial": at_work[m.worker].number if m.worker in at_work else None}
            for m in members
        ],
        "trials": dict(Counter(row.state for row in rows)),
        "unrecorded": len(study.unrecorded()),
        "budget": study.search.trials,
        "feasible": _feasible(rows),
        "front": len(front),
        "rungs": dict(Counter(row.summary.refused for row in rows if row.summary is not None and row.summary.refused)),
        "broken_limits": _broken(rows),
        "attempts_lost": _lost(rows),
        "spent_s": spent_s(rows),
        "spent_j": spent_j(rows),
        "saved_s": _saved(rows),
        "hypervolume": standing.volume(rows, front),
        "left_s": None if over else _left_s(study, evaluated, max(1, len(members))),
    }


def progress(study: Study, last: Row) -> tuple[dict[str, float], int]:
    """Where the study stood when `last` ended: numbers by name, and how many trials were over by then.

    What comes later changes nothing of it, so that it can be told at any time.
    """
    rows = [row for row in study.rows() if row.state in DONE and _end(row) <= _end(last)]
    front = study.standing.front(rows)
    found = {f"trials/{state}": float(count) for state, count in Counter(row.state for row in rows).items()}
    found |= {
        "progress/feasible": float(_feasible(rows)),
        "progress/front": float(len(front)),
        "progress/hypervolume": study.standing.volume(rows, front),
        "progress/attempts_lost": float(_lost(rows)),
        "spent/trials_s": spent_s(rows),
        "spent/trials_j": spent_j(rows),
    }
    return found | {f"saved/{by}_s": seconds for by, seconds in _saved(rows).items()}, len(rows)


def _end(row: Row) -> tuple[float, int]:
    return row.ended_s or 0.0, row.number


def _feasible(rows: list[Row]) -> int:
    return sum(1 for row in rows if row.summary is not None and row.summary.feasible)


def _lost(rows: list[Row]) -> int:
    """Attempts that came to nothing."""
    return sum(row.attempt - 1 for row in rows)


def _broken(rows: list[Row]) -> dict[str, int]:
    """How many trials break each limit, by what was measured or predicted."""
    held = [(metric, h) for row in rows if row.summary is not None for metric, h in row.summary.verdicts.items()]
    return dict(Counter(metric for metric, h in held if not h.satisfied and h.excess is not None and h.excess > 0))


def _saved(rows: list[Row]) -> dict[str, float]:
    """Seconds that were not spent: by refusals and by stopping early, as long trials take else, and by the cache."""
    summaries = [row.summary for row in rows if row.summary is not None]
    whole = [s.spent_s + sum(s.saved_s.values()) for s in summaries if s.metrics and not s.refused and not s.failure]
    usual = statistics.median(whole) if whole else 0.0
    refused = sum(1 for row in rows if row.state == "refused")
    stopped = [row.summary for row in rows if row.state == "stopped" and row.summary is not None]
    return {
        "prediction": refused * usual,
        "rungs": sum(max(0.0, usual - s.spent_s - sum(s.saved_s.values())) for s in stopped),
        "cache": sum(sum(s.saved_s.values()) for s in summaries),
    }


def _left_s(study: Study, evaluated: list[Row], workers: int) -> float | None:
    """Seconds until the budget of trials is spent, if they go on as they went; None before the first."""
    spent = [row.summary.spent_s for row in evaluated if row.summary is not None]
    if not spent:
        return None
    return max(0, study.search.trials - len(evaluated)) * statistics.mean(spent) / workers
