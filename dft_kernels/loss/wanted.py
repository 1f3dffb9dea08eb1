"""Which row quantities a call computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..backends.contract import Row
from .checks import Checks
from .problem import Problem

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
}


def metric_names(check: Checks, return_metrics: Any) -> frozenset[str]:
    """The names of `Metrics` that a call asks for."""
    if isinstance(return_metrics, bool):
        return frozenset(METRICS) if return_metrics else frozenset()
    names = return_metrics if isinstance(return_metrics, Collection) and not isinstance(return_metrics, str) else [None]
    if set(names) - {*METRICS}:
        relation = f"be True, False, or some of {', '.join(METRICS)}"
        check.fail("return_metrics", relation, repr(return_metrics), "Pass a set of these names")
    return frozenset(names)


def wanted(problem: Problem, loss: frozenset[Row], metrics: frozenset[str], statistics: bool) -> int:
    """Bit r: Row(r) is computed, for the loss, the metrics, or as the statistics that are returned."""
    rows = {Row.LSE, Row.ENTROPY, Row.LOG_PROB, Row.DIVERGENCE} if statistics else set(loss)
    for name in metrics:
        rows |= set(METRICS[name])
    if "hard_loss" in metrics and problem.label_smoothing != 0:
        rows.add(Row.MEAN_LOG_PROB)
    if problem.target is None:
        rows -= {Row.LOG_PROB, Row.MEAN_LOG_PROB, Row.CORRECT}
    if not problem.has_teacher:
        rows -= {Row.DIVERGENCE, Row.AGREEMENT}
    return sum(1 << row for row in rows)
