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

import torch
from torch import Tensor

from ..teachers.contract import SparseTarget
from .contract import DIFFERENTIABLE, Chunk, Outcomes, Row, Terms
from .formulas import PAIRS, hard_gradient, log_softmax, soft_gradient, unfinished_


def gathered(rows: Tensor, target: SparseTarget) -> Tensor:
    """rows [R, V] at the target's tokens [R, k]; anything for those of another part of the vocabulary."""
    return rows.gather(1, target.index if target.whole else target.index.clamp_min(0))


def hide_(logits: Tensor, target: SparseTarget) -> Tensor:
    """-inf into logits [R, V] at the target's tokens."""
    if target.whole:
        return logits.scatter_(1, target.index, -torch.inf)
    least = torch.where(target.index < 0, torch.inf, -torch.inf).to(logits.dtype)
    return logits.scatter_reduce_(1, target.index.clamp_min(0), least, "amin")


def put_(out: Tensor, target: SparseTarget, values: Tensor) -> Tensor:
    """values [R, k] into `out` [R, V] at the target's tokens."""
    values = values.to(out.dtype)
    if target.whole:
        return out.scatter_(1, target.index, values)
    index, absent = target.index.clamp_min(0), target.index < 0
    out.scatter_reduce_(1, index, absent.to(out.dtype), "prod")  # 0 where a value goes
    return out.scatter_add_(1, index, torch.where(absent, 0.0, values))


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
    return Outcomes(z, log_q_inside, inside, total, tail)


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
        at = index.clamp_min(0)
        potential = table[0][at] if chunk.group is None else table[chunk.group[:, None], at]
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
