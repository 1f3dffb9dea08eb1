"""The loss of a row out of its row quantities, and the cotangents that go back to them: what a call weighs and how.

weight_n (hard_weight CE_n + soft_weight D_n + z_loss lse_n^2 + <q_n, potential[group_n]>
          + <q_n @ features, feature_weight_n> + entropy_weight_n H_n)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.contract import DIFFERENTIABLE, Cotangents, Row
from ..teachers.contract import Rows
from .problem import Problem, loss_terms
from .selection import Selection


def soft_rows(problem: Problem, rows: Any) -> Tensor:
    """D_n times the T^2 of temperature_scaling."""
    return _times(problem.soft_scale, rows[Row.DIVERGENCE.value])


def _times(factor: float, rows: Tensor) -> Tensor:
    return rows if factor == 1.0 else factor * rows


def hard_rows(problem: Problem, rows: Any) -> Tensor:
    """CE_n = -(1 - eps) log q_y - eps sum_v log q_v / V with eps = label_smoothing."""
    eps = problem.label_smoothing
    hard: Tensor = -rows[Row.LOG_PROB.value]
    return hard if eps == 0 else (1.0 - eps) * hard - eps * rows[Row.MEAN_LOG_PROB.value]


def loss_rows(problem: Problem, rows: Any, features: Tensor | None, weight: Tensor | None) -> Tensor:
    """The loss of every row [N] from row quantities and q @ features [N, K]; a row that is ignored or of weight 0 gives
    0 whatever it holds. Differentiable in `rows` and `features`."""
    live, parts = loss_terms(problem), []
    if Row.LOG_PROB in live:
        parts.append(_times(problem.hard_weight, hard_rows(problem, rows)))
    if Row.DIVERGENCE in live:
        parts.append(_times(problem.soft_weight, soft_rows(problem, rows)))
    if Row.LSE in live:
        parts.append(problem.z_loss * rows[Row.LSE.value].square())
    if Row.POTENTIAL in live:
        parts.append(rows[Row.POTENTIAL.value])
    if problem.entropy_weight is not None:
        parts.append(problem.entropy_weight.to(problem.dtype) * rows[Row.ENTROPY.value])
    if problem.feature_weight is not None and features is not None:
        parts.append((problem.feature_weight.to(problem.dtype) * features).sum(-1))
    total: Tensor = sum(parts[1:], parts[0]) if parts else torch.zeros_like(rows[Row.LSE.value])
    return total if weight is None else torch.where(weight != 0, weight * total, 0.0)


def loss_cotangents(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor | None,
    rows: Rows | None = None,
    selection: Selection | None = None,
) -> Cotangents:
    """d(sum of `loss_rows`) / d(row quantities) of a chunk of rows `hidden` with weights [R]; rows: where they are
    among all N, None: they are all; selection: of the denominator that the sum is divided by."""

    def taken(of: Tensor | None) -> Tensor | None:
        return None if of is None else (of if rows is None else rows.take(of)).to(problem.dtype)

    denominator = 1.0 if selection is None else selection.denominator
    share = 1.0 if isinstance(denominator, Tensor) else 1.0 / denominator
    live = loss_terms(problem)
    out = hidden.new_zeros(DIFFERENTIABLE, hidden.shape[0], dtype=problem.dtype)
    if Row.LOG_PROB in live:
        out[Row.LOG_PROB].fill_(-share * problem.hard_weight * (1.0 - problem.label_smoothing))
    if Row.MEAN_LOG_PROB in live:
        out[Row.MEAN_LOG_PROB].fill_(-share * problem.hard_weight * problem.label_smoothing)
    if Row.DIVERGENCE in live:
        out[Row.DIVERGENCE].fill_(share * problem.soft_weight * problem.soft_scale)
    if Row.POTENTIAL in live:
        out[Row.POTENTIAL].fill_(share)
    if (by := taken(problem.entropy_weight)) is not None:
        out[Row.ENTROPY] = by * share
    features = taken(problem.feature_weight)
    features = None if features is None else features * share
    slope = torch.full_like(out[0], 2.0 * share * problem.z_loss) if Row.LSE in live else None  # of z_loss lse^2
    if isinstance(denominator, Tensor):
        by = 1.0 / denominator
        weight = by.expand(len(hidden)) if weight is None else weight * by
    if weight is not None:
        out = torch.where(weight != 0, out * weight, 0.0)
        slope = None if slope is None else torch.where(weight != 0, slope * weight, 0.0)
        by = weight[:, None]
        features = None if features is None else torch.where(by != 0, features * by, 0.0)
    return Cotangents(out, features, slope)
