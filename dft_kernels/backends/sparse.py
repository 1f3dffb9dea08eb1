"""Sparse targets, the same for every backend: k tokens S of each row, and one bucket for all others.

Outcomes are the tokens of S and the bucket, whose log q is a log-sum-exp over the tokens outside. With g = df/dlog q
of each outcome, rho = g_bucket / q_bucket (0 without a bucket) and SLOPE = sum g - rho, summed over S as g - q rho
(which does not cancel where the bucket holds nearly all of q):

    outside of S    dz_v = d / T (-qT_v SLOPE)
    in S            dz_v = d / T (g_v - qT_v sum g)

The first is the dense formula with g = 0 and costs as much as a cross-entropy's gradient; the second is [R, k], and
overwrites the first at S. So a backend supplies z at S and the log-sum-exp outside of S; the rest is in this module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..teachers.contract import SparseTarget
from .contract import DIFFERENTIABLE, Chunk, Row, Terms
from .formulas import PAIRS, hard_gradient, log_softmax, soft_gradient, unfinished_


class Outcomes(NamedTuple):
    """The part of the outcomes that the gradient needs: z, log qT and g at S [R, k], and the sum of all g [R]."""

    z: Tensor
    log_q: Tensor
    slope: Tensor
    total: Tensor


def complete_(
    statistics: Tensor, target: SparseTarget, z: Tensor, tail: tuple[Tensor, Tensor], terms: Terms
) -> Outcomes:
    """Write DIVERGENCE and SLOPE into statistics that hold SOFT_LSE.

    z: finished logits at the target's tokens [R, k]; tail: log-sum-exp of z / T outside of them [R], and its
    rounding error.
    """
    pair, parameter = PAIRS[terms.divergence.name], terms.divergence.parameter
    lse, low = statistics[Row.SOFT_LSE, :, None], statistics[Row.SOFT_LSE_LOW, :, None]
    log_q = log_q_inside = log_softmax(z, terms.temperature, lse, low)
    log_p, bucket = target.log_prob, target.tail
    if bucket is not None:
        log_q_tail = (tail[0] - lse[:, 0]) + (tail[1] - low[:, 0])
        log_q = torch.cat([log_q, log_q_tail[:, None]], dim=1)
        log_p = torch.cat([log_p, bucket[:, None]], dim=1)
    slope = pair.slope(log_p, log_q, parameter)
    statistics[Row.DIVERGENCE] = pair.value(log_p, log_q, parameter).sum(-1)
    total, inside = slope.sum(-1), slope[:, : z.shape[1]]
    if bucket is None:
        statistics[Row.SLOPE] = total
    else:
        q = log_q.exp()
        rho = torch.where(q[:, -1:] > 0, slope[:, -1:] / q[:, -1:], 0.0)
        statistics[Row.SLOPE] = (inside - q[:, :-1] * rho).sum(-1)
    return Outcomes(z, log_q_inside, inside, total)


def gradient_at(
    outcomes: Outcomes,
    index: Tensor,
    chunk: Chunk,
    terms: Terms,
    statistics: Tensor,
    cotangents: Tensor,
    vocab: int,
    pull: Tensor | None = None,
) -> Tensor:
    """d / d(raw logits) at `index` [R, k], of everything that is differentiated. cotangents: settled; pull: a
    further factor of q at `index` [R, k], from features."""
    z, known, cotangent = outcomes.z, statistics[..., None], cotangents[..., None]
    log_q = outcomes.log_q
    if terms.temperature != 1.0:
        log_q = log_softmax(z, 1.0, known[Row.LSE], known[Row.LSE_LOW])
    potential = None
    if terms.potential is not None and Row.POTENTIAL in terms.differentiated:
        table = terms.potential.to(z.dtype)
        potential = table[0][index] if chunk.group is None else table[chunk.group[:, None], index]
    dz = hard_gradient(log_q, known, cotangent, terms, potential, vocab)
    if pull is not None:
        dz += torch.where(log_q > -torch.inf, log_q.exp() * pull, 0.0)
    if Row.LOG_PROB in terms.differentiated and chunk.label is not None:
        dz += torch.where(index == chunk.label[:, None], cotangent[Row.LOG_PROB], 0.0)
    known = known.clone()
    known[Row.SLOPE] = outcomes.total[:, None]
    dz += soft_gradient(outcomes.log_q, outcomes.slope, known, cotangent, terms.temperature)
    active = (cotangents[:DIFFERENTIABLE] != 0).any(0)
    if pull is not None:
        active |= (pull != 0).any(1)
    return unfinished_(dz, z, terms.head).masked_fill_(~active[:, None], 0.0)


def slope_cotangent(statistics: Tensor, cotangents: Tensor) -> Tensor:
    """The cotangent of SOFT_LSE [R] whose gradient is that of the tokens outside of S: -d SLOPE."""
    d = cotangents[Row.DIVERGENCE]
    return torch.where(d != 0, -d * statistics[Row.SLOPE], 0.0)


def log_add(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """log(e^a + e^b); a, b and the result are pairs of a value and its rounding error."""
    top = torch.maximum(a[0], b[0])
    top = torch.where(top.isinf(), 0.0, top)
    rest = (((a[0] - top) + a[1]).exp() + ((b[0] - top) + b[1]).exp()).log()
    lse = top + rest
    return lse, torch.where(lse.isfinite(), (top - lse) + rest, 0.0)
