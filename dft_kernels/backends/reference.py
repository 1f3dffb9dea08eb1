"""The reference backend: the row operations in plain PyTorch, on any device.

A row operation walks its chunk in tiles of a few rows, so that its temporaries stay in the cache and out of the
memory bill. Every formula of the row mathematics stands here once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import accumulate_dtype
from ..teachers import Head
from .contract import DIFFERENTIABLE, Chunk, Cotangents, Row, Terms
from .rows import RowBackend, rows_of, tiles


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


def _times(q: Tensor, factor: Tensor) -> Tensor:
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
    return _times(log_q.exp(), ratio - alpha * torch.expm1(ratio))


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
        lambda log_p, log_q, _: _times(log_q.exp(), log_q - log_p),
    ),
    "jensen_shannon": Pair(
        _jensen_shannon,
        lambda log_p, log_q, beta: _times(log_q.exp(), (beta - 1.0) * _mix_over(log_p - log_q, beta)),
    ),
    "skew_kl": Pair(
        _skewed,
        lambda log_p, log_q, alpha: _times(
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
        lambda log_p, log_q, _: _times(0.5 * log_q.exp(), torch.sign(log_q - log_p)),
    ),
    "squared_hellinger": Pair(
        lambda log_p, log_q, _: 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square(),
        lambda log_p, log_q, _: 0.5 * (log_q.exp() - (0.5 * (log_p + log_q)).exp()),
    ),
}


def _finished(raw: Tensor, head: Head) -> Tensor:
    """z = cap(logit_scale * raw) in the accumulation dtype; `raw` itself where nothing is to be done."""
    z = raw.to(accumulate_dtype(raw.dtype))
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _lse(z: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp z [r], and what its rounding dropped."""
    top = z.amax(-1)
    top = torch.where(top.isinf(), 0.0, top)
    rest = (z - top[:, None]).exp_().sum(-1).log()
    lse = top + rest
    return lse, torch.where(lse.isfinite(), (top - lse) + rest, 0.0)


def _log_softmax(z: Tensor, temperature: float, lse: Tensor, low: Tensor) -> Tensor:
    """z / T - (lse + low); lse, low [r, 1]"""
    return ((z if temperature == 1.0 else z / temperature) - lse) - low


class _Tile:
    """What both halves of the step derive from a few rows of logits: z, its labels, its target's log p."""

    def __init__(self, logits: Tensor, chunk: Chunk, terms: Terms, tile: slice) -> None:
        chunk = rows_of(chunk, tile)
        self.z = _finished(logits[tile], terms.head)  # [r, V]
        self.label, self.group, self.target = chunk.label, chunk.group, None
        if chunk.target is not None:
            self.target = _finished(chunk.target.hidden, chunk.target.head).to(self.z.dtype)

    def potential(self, table: Tensor) -> Tensor:
        """The potential of each row: [r, V], or [1, V] where there is one group."""
        rows = table[:1] if self.group is None else table.index_select(0, self.group)
        return rows.to(self.z.dtype)

    def label_index(self) -> tuple[Tensor, Tensor]:
        """Labels [r, 1] safe to gather with, and where they are inside the vocabulary."""
        assert self.label is not None
        inside = (self.label >= 0) & (self.label < self.z.shape[1])
        return torch.where(inside, self.label, 0)[:, None], inside


class ReferenceOperations:
    """Row statistics, row gradient and column sums in PyTorch."""

    def row_statistics(self, logits: Tensor, chunk: Chunk, terms: Terms) -> Tensor:
        """See `backends.rows.RowOperations`. Reads each logit about ten times, tile by tile."""
        wide = accumulate_dtype(logits.dtype)
        statistics = torch.zeros(len(Row), logits.shape[0], dtype=wide, device=logits.device)
        for rows in tiles(logits):
            tile, out, wanted = _Tile(logits, chunk, terms, rows), statistics[:, rows], terms.wanted
            out[Row.LSE], out[Row.LSE_LOW] = _lse(tile.z)
            log_q = _log_softmax(tile.z, 1.0, out[Row.LSE, :, None], out[Row.LSE_LOW, :, None])
            if Row.LOG_PROB in wanted:
                index, inside = tile.label_index()
                out[Row.LOG_PROB] = torch.where(inside, log_q.gather(1, index)[:, 0], torch.nan)
            if Row.MEAN_LOG_PROB in wanted:
                out[Row.MEAN_LOG_PROB] = log_q.mean(-1)
            if Row.ENTROPY in wanted or Row.POTENTIAL in wanted:
                q = log_q.exp()
                if Row.ENTROPY in wanted:
                    out[Row.ENTROPY] = -_times(q, log_q).sum(-1)
                if terms.potential is not None and Row.POTENTIAL in wanted:
                    out[Row.POTENTIAL] = (q * tile.potential(terms.potential)).sum(-1)
            if Row.CORRECT in wanted:
                out[Row.CORRECT] = torch.eq(tile.z.argmax(-1), tile.label_index()[0][:, 0]) & tile.label_index()[1]
            if tile.target is not None:
                if Row.AGREEMENT in wanted:
                    out[Row.AGREEMENT] = torch.eq(tile.z.argmax(-1), tile.target.argmax(-1))
                if Row.DIVERGENCE in wanted:
                    self._divergence(tile, terms, out)
        return statistics

    def _divergence(self, tile: _Tile, terms: Terms, out: Tensor) -> None:
        assert tile.target is not None
        pair = PAIRS[terms.divergence.name]
        out[Row.SOFT_LSE], out[Row.SOFT_LSE_LOW] = _lse(tile.z / terms.temperature)
        out[Row.TARGET_LSE], out[Row.TARGET_LSE_LOW] = _lse(tile.target / terms.teacher_temperature)
        log_q, log_p = self._logs(tile, terms, out[..., None])
        out[Row.DIVERGENCE] = pair.value(log_p, log_q, terms.divergence.parameter).sum(-1)
        if Row.DIVERGENCE in terms.differentiated:
            out[Row.SLOPE] = pair.slope(log_p, log_q, terms.divergence.parameter).sum(-1)

    @staticmethod
    def _logs(tile: _Tile, terms: Terms, known: Tensor) -> tuple[Tensor, Tensor]:
        """log qT and log p [r, V] of a tile; known [., r, 1]."""
        assert tile.target is not None
        log_q = _log_softmax(tile.z, terms.temperature, known[Row.SOFT_LSE], known[Row.SOFT_LSE_LOW])
        log_p = _log_softmax(tile.target, terms.teacher_temperature, known[Row.TARGET_LSE], known[Row.TARGET_LSE_LOW])
        return log_q, log_p

    def row_gradient_(
        self,
        logits: Tensor,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        cotangents: Cotangents,
        out: Tensor,
    ) -> None:
        """See `backends.rows.RowOperations`. With a, m, h, l, d, c the cotangents of LOG_PROB, MEAN_LOG_PROB,
        ENTROPY, LSE, DIVERGENCE and POTENTIAL:

            dz = q (l - a - m - h (log q + H) + c (G - <q, G>)) + a e_y + m / V
               + d (g - qT sum g) / T
            draw = dz * logit_scale * (1 - (z / softcap)^2)
        """
        live, by = terms.differentiated, cotangents.settled(statistics)
        for rows in tiles(logits):
            tile, known = _Tile(logits, chunk, terms, rows), statistics[:, rows, None]  # [., r, 1]
            cotangent = by[:, rows, None]
            z = tile.z
            log_q = _log_softmax(z, 1.0, known[Row.LSE], known[Row.LSE_LOW])
            factor = (cotangent[Row.LSE] - cotangent[Row.LOG_PROB] - cotangent[Row.MEAN_LOG_PROB]).expand_as(z)
            if Row.ENTROPY in live:
                factor = factor - cotangent[Row.ENTROPY] * (log_q + known[Row.ENTROPY])
            if Row.POTENTIAL in live and terms.potential is not None:
                centred = tile.potential(terms.potential) - known[Row.POTENTIAL]
                factor = factor + cotangent[Row.POTENTIAL] * centred
            dz = _times(log_q.exp(), factor)
            if Row.LOG_PROB in live:
                index, inside = tile.label_index()
                dz.scatter_add_(1, index, torch.where(inside[:, None], cotangent[Row.LOG_PROB], torch.nan))
            if Row.MEAN_LOG_PROB in live:
                dz += cotangent[Row.MEAN_LOG_PROB] / z.shape[1]
            if Row.DIVERGENCE in live and tile.target is not None:
                log_q, log_p = self._logs(tile, terms, known)
                slope = PAIRS[terms.divergence.name].slope(log_p, log_q, terms.divergence.parameter)
                dz += cotangent[Row.DIVERGENCE] / terms.temperature * (slope - _times(log_q.exp(), known[Row.SLOPE]))
            if terms.head.softcap is not None:
                dz *= 1.0 - (z / terms.head.softcap).square()
            if terms.head.logit_scale != 1.0:
                dz *= terms.head.logit_scale
            active = (by[:DIFFERENTIABLE, rows] != 0).any(0)
            out[rows].copy_(dz.masked_fill_(~active[:, None], 0.0))

    def row_step_(self, logits: Tensor, chunk: Chunk, terms: Terms, cotangents: Cotangents, out: Tensor) -> Tensor:
        """One after the other."""
        statistics = self.row_statistics(logits, chunk, terms)
        self.row_gradient_(logits, chunk, terms, statistics, cotangents, out)
        return statistics

    def row_probabilities(self, logits: Tensor, terms: Terms, statistics: Tensor) -> Tensor:
        """exp((z - lse) - low)"""
        z, known = _finished(logits, terms.head), statistics[..., None]
        return _log_softmax(z, 1.0, known[Row.LSE], known[Row.LSE_LOW]).exp()

    def accumulate_columns_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, columns: Tensor
    ) -> None:
        """See `backends.rows.RowOperations`. A product with the [G, r] matrix of weights: no atomics."""
        groups = torch.arange(columns.shape[0], device=columns.device)[:, None]
        for rows in tiles(logits):
            q = self.row_probabilities(logits[rows], terms, statistics[:, rows])
            weight = q.new_ones(q.shape[0]) if chunk.weight is None else chunk.weight[rows]
            q.masked_fill_(weight[:, None] == 0, 0.0)
            if chunk.group is not None:
                weight = torch.where(chunk.group[rows] == groups, weight, 0.0)  # [G, r]
            columns.addmm_(weight.view(-1, q.shape[0]), q)


class ReferenceBackend(RowBackend):
    """PyTorch on any device: what every other backend is measured against, and the one that is always there."""

    name = "reference"
    operations = ReferenceOperations()

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never: it runs wherever PyTorch does."""
        return None
