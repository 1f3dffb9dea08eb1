"""Which row quantities a call computes for their own sake."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..backends.contract import Row
from .checks import Checks

METRICS = {  # of `Metrics`: the row quantities that each is
    "hard_loss": (Row.LOG_PROB,),
    "soft_loss": (Row.DIVERGENCE,),
    "entropy": (Row.ENTROPY,),
    "lse": (Row.LSE,),
    "correct": (Row.CORRECT,),
    "teacher_agreement": (Row.AGREEMENT,),
    "log_prob": (Row.LOG_PROB,),
    "features": (),
    "mean_probability": (),
    "dropped": (),
    "active_columns": (),
}


def metric_names(check: Checks, return_metrics: Any) -> frozenset[str]:
    """The names of `Metrics` that a call asks for."""
    if return_metrics is False:
        return frozenset()
    if return_metrics is True:
        return frozenset(METRICS)
    names = return_metrics if isinstance(return_metrics, Collection) and not isinstance(return_metrics, str) else [None]
    if set(names) - {*METRICS}:
        relation = f"be True, False, or some of {', '.join(METRICS)}"
        check.fail("return_metrics", relation, repr(return_metrics), "Pass a set of these names")
    return frozenset(names)


def reported(metrics: frozenset[str], statistics: bool, smoothed: bool) -> int:
    """Bit r: Row(r) is asked for by the metrics, or as one of the statistics that are returned. smoothed: whether the
    cross-entropy is."""
    rows = {Row.LSE, Row.ENTROPY, Row.LOG_PROB, Row.DIVERGENCE} if statistics else set()
    for name in metrics:
        rows |= set(METRICS[name])
    if "hard_loss" in metrics and smoothed:
        rows.add(Row.MEAN_LOG_PROB)
    return sum(1 << row for row in rows)
