"""Metrics that the pass of a loss computes beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Row
from .problem import Problem
from .row_loss import hard_rows, soft_rows


@dataclass(frozen=True)
class Metrics:
    """Of every token, from the loss's own pass, detached, in hidden's leading shape; 0 or False for ignored
    rows, None where it was not asked for, or the call had nothing to compute it from.

    loss of a row = hard_weight * hard_loss + soft_weight * soft_loss + ...; entropy and lse are the model's at
    T = 1; correct: argmax of the model is the label; teacher_agreement: both argmaxes agree.
    """

    hard_loss: Tensor | None
    soft_loss: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    correct: Tensor | None
    teacher_agreement: Tensor | None
    log_prob: Tensor | None  # log q_n[target_n]
    features: Tensor | None  # q @ features [..., K]
    mean_probability: Tensor | None  # [num_groups, V], where a group was given
    backend: str  # what served the call
    dropped: Tensor | None = None  # 0-d: a bound of the relative error of dhidden and dweight, under gradient_error
    active_columns: Tensor | None = None  # 0-d: the share of the columns of dlogits that was multiplied for them


def metrics_of(
    problem: Problem,
    rows: Any,
    features: Tensor | None,
    mean: Tensor | None,
    lead: torch.Size,
    left_out: Tensor | None = None,
) -> Metrics | None:
    """Of the row quantities that a call has computed; None where it asked for none."""
    if not problem.reports:
        return None

    def row(which: Row) -> Tensor | None:
        known: Tensor = rows[which.value]
        return known.reshape(lead) if which in problem.wanted else None

    error, share = (None, None) if left_out is None or left_out.numel() == 0 else left_out.unbind()
    correct, agreement = row(Row.CORRECT), row(Row.AGREEMENT)
    # with smoothing the cross-entropy is of two of them
    hard = row(Row.LOG_PROB) is not None and (problem.label_smoothing == 0 or row(Row.MEAN_LOG_PROB) is not None)
    return Metrics(
        hard_loss=hard_rows(problem, rows).reshape(lead) if hard else None,
        soft_loss=soft_rows(problem, rows).reshape(lead) if row(Row.DIVERGENCE) is not None else None,
        entropy=row(Row.ENTROPY),
        lse=row(Row.LSE),
        correct=None if correct is None else correct.bool(),
        teacher_agreement=None if agreement is None else agreement.bool(),
        log_prob=row(Row.LOG_PROB),
        features=None if problem.features is None or features is None else features.reshape(*lead, features.shape[1]),
        mean_probability=mean if problem.columns else None,
        backend=backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype).name,
        dropped=error,
        active_columns=share,
    )
