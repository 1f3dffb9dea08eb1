"""The row mathematics in plain PyTorch, each formula once. The reference backend consists of these formulas; every
backend applies them to the few tokens of a sparse target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..teachers.contract import Head
from . import gemm
from .contract import Row, Terms


class Pair(NamedTuple):
    """A divergence as elementwise functions of (log_p, log_q, parameter), all [r, V]: the addends f >= 0 whose
    sum is D, and the slope g = df / dlog q. A probability of 0 is log = -inf; no NaN may come of it."""

    value: Callable[[Tensor, Tensor, float], Tensor]
    slope: Callable[[Tensor, Tensor, float], Tensor]


def _kl(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """a (log a - log b) - a + b with d = log b - log a; near a = b as a (e^d - 1 - d), which does not cancel."""
    addend = torch.where(d.abs() < 0.5, a * (torch.expm1(d) - d), b - a * (1.0 + d))
    return torch.where(a > 0, addend, b)


def _mix_over(d: Tensor, weight: float) -> Tensor:
    """log((weight a + (1 - weight) b) / b) with d = log a - log b; an error of d comes out as `weight` of it."""
    below = torch.log1p(weight * torch.expm1(d))
    above = d + torch.log1p((1.0 - weight) * torch.expm1(-d))
    return torch.where(d > 0, above, below)


def times(q: Tensor, factor: Tensor) -> Tensor:
    """q * factor with 0 * anything = 0"""
    return torch.where(q > 0, q * factor, 0.0)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    m = beta * p + (1.0 - beta) * q
    return beta * _kl(p, m, _mix_over(-d, 1.0 - beta)) + (1.0 - beta) * _kl(q, m, _mix_over(d, beta))


def _skewed(log_a: Tensor, log_b: Tensor, alpha: float) -> Tensor:
    """KL(a‖alpha a + (1 - alpha) b)"""
    a = log_a.exp()
    return _kl(a, alpha * a + (1.0 - alpha) * log_b.exp(), _mix_over(log_b - log_a, 1.0 - alpha))


def _skew_reverse_slope(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    ratio = -_mix_over(log_p - log_q, 1.0 - alpha)
    return times(log_q.exp(), ratio - alpha * torch.expm1(ratio))


def _power(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """p^alpha q^(1 - alpha), 0 where both are 0"""
    power = torch.exp(alpha * log_p + (1.0 - alpha) * log_q)
    return torch.where(torch.maximum(log_p, log_q) == -torch.inf, 0.0, power)


def _alpha(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    d, q = log_p - log_q, log_q.exp()
    near = q * (torch.expm1(alpha * d) - alpha * torch.expm1(d))
    far = _power(log_p, log_q, alpha) - alpha * log_p.exp() - (1.0 - alpha) * q
    return torch.where(d.abs() < 0.5, near, far) / (alpha * (alpha - 1.0))


PAIRS: dict[str, Pair] = {
    "forward_kl": Pair(
        lambda log_p, log_q, _: _kl(log_p.exp(), log_q.exp(), log_q - log_p),
        lambda log_p, log_q, _: log_q.exp() - log_p.exp(),
    ),
    "reverse_kl": Pair(
        lambda log_p, log_q, _: _kl(log_q.exp(), log_p.exp(), log_p - log_q),
        lambda log_p, log_q, _: times(log_q.exp(), log_q - log_p),
    ),
    "jensen_shannon": Pair(
        _jensen_shannon,
        lambda log_p, log_q, beta: times(log_q.exp(), (beta - 1.0) * _mix_over(log_p - log_q, beta)),
    ),
    "skew_kl": Pair(
        _skewed,
        lambda log_p, log_q, alpha: times(
            log_q.exp(), (alpha - 1.0) * torch.expm1(-_mix_over(log_q - log_p, 1.0 - alpha))
        ),
    ),
    "skew_reverse_kl": Pair(lambda log_p, log_q, alpha: _skewed(log_q, log_p, alpha), _skew_reverse_slope),
    "alpha_divergence": Pair(
        _alpha,
        lambda log_p, log_q, alpha: (log_q.exp() - _power(log_p, log_q, alpha)) / alpha,
    ),
    "total_variation": Pair(
        lambda log_p, log_q, _: 0.5 * (log_p.exp() - log_q.exp()).abs(),
        lambda log_p, log_q, _: times(0.5 * log_q.exp(), torch.sign(log_q - log_p)),
    ),
    "squared_hellinger": Pair(
        lambda log_p, log_q, _: 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square(),
        lambda log_p, log_q, _: 0.5 * (log_q.exp() - (0.5 * (log_p + log_q)).exp()),
    ),
}


def finished(raw: Tensor, head: Head) -> Tensor:
    """z = cap(logit_scale * raw) in the accumulation dtype; `raw` itself if that changes nothing."""
    z = raw.to(accumulate_dtype(raw.dtype))
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def head_logits(hidden: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """z [R, V] of a head and hidden states [R, H] (logits [R, V] where it has no weight), multiplied in hidden's
    accumulation dtype, into `out` where given."""
    if head.weight is None:
        raw = hidden if out is None else out.copy_(hidden)
    else:
        wide, vocab = accumulate_dtype(hidden.dtype), head.weight.shape[0]
        product = out if out is not None and out.dtype == wide else hidden.new_empty(len(hidden), vocab, dtype=wide)
        raw = gemm.logits_(hidden, head.weight, head.bias, product)
    z = finished(raw, head)
    return z if out is None or z is out else out.copy_(z)


def log_sum_exp(z: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp z [r], and its rounding error, which is to be added."""
    top = z.amax(-1)
    top = torch.where(top.isinf(), 0.0, top)
    rest = (z - top[:, None]).exp_().sum(-1).log()
    lse = top + rest
    return lse, torch.where(lse.isfinite(), (top - lse) + rest, 0.0)


def log_softmax(z: Tensor, temperature: float, lse: Tensor, low: Tensor) -> Tensor:
    """z / T - (lse + low); lse, low [r, 1]"""
    return ((z if temperature == 1.0 else z / temperature) - lse) - low


def hard_gradient(
    log_q: Tensor, known: Tensor, cotangent: Tensor, terms: Terms, potential: Tensor | None, vocab: int
) -> Tensor:
    """The gradient dz of the quantities at T = 1, without the label's own addend a e_y. With a, m, h, l, c the
    cotangents of LOG_PROB, MEAN_LOG_PROB, ENTROPY, LSE and POTENTIAL, and V the vocabulary:

        q (l - a - m - h (log q + H) + c (G - <q, G>)) + m / V

    log_q, potential: [r, n] columns, all V of them or some; known (statistics), cotangent: [., r, 1].
    """
    live = terms.differentiated
    factor = (cotangent[Row.LSE] - cotangent[Row.LOG_PROB] - cotangent[Row.MEAN_LOG_PROB]).expand_as(log_q)
    if Row.ENTROPY in live:
        factor = factor - cotangent[Row.ENTROPY] * (log_q + known[Row.ENTROPY])
    if Row.POTENTIAL in live and potential is not None:
        factor = factor + cotangent[Row.POTENTIAL] * (potential - known[Row.POTENTIAL])
    dz = times(log_q.exp(), factor)
    if Row.MEAN_LOG_PROB in live:
        dz += cotangent[Row.MEAN_LOG_PROB] / vocab
    return dz


def soft_gradient(log_q: Tensor, slope: Tensor, known: Tensor, cotangent: Tensor, temperature: float) -> Tensor:
    """The gradient dz of the divergence: d / T (g - qT SLOPE), with d its cotangent."""
    return cotangent[Row.DIVERGENCE] / temperature * (slope - times(log_q.exp(), known[Row.SLOPE]))


def unfinished_(dz: Tensor, z: Tensor, head: Head) -> Tensor:
    """d / draw of d / dz: times logit_scale (1 - (z / softcap)^2), in place."""
    if head.softcap is not None:
        dz *= 1.0 - (z / head.softcap).square()
    if head.logit_scale != 1.0:
        dz *= head.logit_scale
    return dz
