"""The reference backend: the row operations in plain PyTorch, on any device.

A row operation walks its chunk in tiles of a few rows, so that its temporaries stay in the cache and out of the
memory bill. The formulas are in formulas.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..teachers.contract import DenseTarget
from .contract import DIFFERENTIABLE, Cotangents, Row, Terms
from .formulas import PAIRS, finished, hard_gradient, log_softmax, log_sum_exp, soft_gradient, times, unfinished_
from .rows import Operand, RowBackend, RowOperations


class _Tile:
    """A few rows, as both halves of the step use them: z, labels, groups, the target's logits."""

    def __init__(self, x: Operand) -> None:
        self.z = finished(x.logits, x.terms.head)  # [r, V]
        self.label, self.group, self.target = x.chunk.label, x.chunk.group, None
        if isinstance(x.chunk.target, DenseTarget):
            self.target = finished(x.chunk.target.hidden, x.chunk.target.head).to(self.z.dtype)

    def potential(self, table: Tensor) -> Tensor:
        """The potential of each row: [r, V], or [1, V] where there is one group."""
        rows = table[:1] if self.group is None else table.index_select(0, self.group)
        return rows.to(self.z.dtype)

    def label_index(self) -> tuple[Tensor, Tensor]:
        """Labels [r, 1] safe to gather with, and where they are inside the vocabulary."""
        assert self.label is not None
        inside = (self.label >= 0) & (self.label < self.z.shape[1])
        return torch.where(inside, self.label, 0)[:, None], inside


class ReferenceOperations(RowOperations):
    """Row statistics, row gradient and column sums in PyTorch."""

    def row_statistics(self, x: Operand) -> Tensor:
        """Reads each logit about ten times, tile by tile."""
        terms, wanted = x.terms, x.terms.wanted
        wide = accumulate_dtype(x.logits.dtype)
        statistics = torch.zeros(len(Row), x.logits.shape[0], dtype=wide, device=x.logits.device)
        for rows, some in x.tiles():
            tile, out = _Tile(some), statistics[:, rows]
            out[Row.LSE], out[Row.LSE_LOW] = log_sum_exp(tile.z)
            log_q = log_softmax(tile.z, 1.0, out[Row.LSE, :, None], out[Row.LSE_LOW, :, None])
            if Row.LOG_PROB in wanted:
                index, inside = tile.label_index()
                out[Row.LOG_PROB] = torch.where(inside, log_q.gather(1, index)[:, 0], torch.nan)
            if Row.MEAN_LOG_PROB in wanted:
                out[Row.MEAN_LOG_PROB] = log_q.mean(-1)
            if Row.ENTROPY in wanted or Row.POTENTIAL in wanted:
                q = log_q.exp()
                if Row.ENTROPY in wanted:
                    out[Row.ENTROPY] = -times(q, log_q).sum(-1)
                if terms.potential is not None and Row.POTENTIAL in wanted:
                    out[Row.POTENTIAL] = (q * tile.potential(terms.potential)).sum(-1)
            if Row.CORRECT in wanted:
                out[Row.CORRECT] = torch.eq(tile.z.argmax(-1), tile.label_index()[0][:, 0]) & tile.label_index()[1]
            if Row.CORRECT in wanted or Row.AGREEMENT in wanted:
                out[Row.TOP] = tile.z.amax(-1)
            if tile.target is not None:
                if Row.AGREEMENT in wanted:
                    out[Row.AGREEMENT] = torch.eq(tile.z.argmax(-1), tile.target.argmax(-1))
                    out[Row.TARGET_TOP] = tile.target.amax(-1)
                if terms.compared:
                    out[Row.SOFT_LSE], out[Row.SOFT_LSE_LOW] = log_sum_exp(tile.z / terms.temperature)
                    theirs = log_sum_exp(tile.target / terms.teacher_temperature)
                    out[Row.TARGET_LSE], out[Row.TARGET_LSE_LOW] = theirs
                if Row.DIVERGENCE in wanted:
                    self._divergence(tile, terms, out)
        return statistics

    def row_divergence_(self, x: Operand, statistics: Tensor) -> None:
        """Tile by tile."""
        for rows, some in x.tiles():
            self._divergence(_Tile(some), x.terms, statistics[:, rows])

    def _divergence(self, tile: _Tile, terms: Terms, out: Tensor) -> None:
        assert tile.target is not None
        pair = PAIRS[terms.divergence.name]
        log_q, log_p = self._logs(tile, terms, out[..., None])
        out[Row.DIVERGENCE] = pair.value(log_p, log_q, terms.divergence.parameter).sum(-1)
        if Row.DIVERGENCE in terms.differentiated:
            out[Row.SLOPE] = pair.slope(log_p, log_q, terms.divergence.parameter).sum(-1)

    @staticmethod
    def _logs(tile: _Tile, terms: Terms, known: Tensor) -> tuple[Tensor, Tensor]:
        """log qT and log p [r, V] of a tile; known [., r, 1]."""
        assert tile.target is not None
        log_q = log_softmax(tile.z, terms.temperature, known[Row.SOFT_LSE], known[Row.SOFT_LSE_LOW])
        log_p = log_softmax(tile.target, terms.teacher_temperature, known[Row.TARGET_LSE], known[Row.TARGET_LSE_LOW])
        return log_q, log_p

    def row_gradient_(self, x: Operand, statistics: Tensor, cotangents: Cotangents, out: Tensor) -> None:
        """With a, m, h, l, d, c the cotangents of LOG_PROB, MEAN_LOG_PROB, ENTROPY, LSE, DIVERGENCE and POTENTIAL:

        dz = q (l - a - m - h (log q + H) + c (G - <q, G>)) + a e_y + m / V
           + d (g - qT sum g) / T
        draw = dz * logit_scale * (1 - (z / softcap)^2)
        """
        terms, by = x.terms, cotangents.settled(statistics)
        live = terms.differentiated
        for rows, some in x.tiles():
            tile, known = _Tile(some), statistics[:, rows, None]  # [., r, 1]
            cotangent = by[:, rows, None]
            z = tile.z
            log_q = log_softmax(z, 1.0, known[Row.LSE], known[Row.LSE_LOW])
            potential = None if terms.potential is None else tile.potential(terms.potential)
            dz = hard_gradient(log_q, known, cotangent, terms, potential, z.shape[1])
            if Row.LOG_PROB in live:
                index, inside = tile.label_index()
                dz.scatter_add_(1, index, torch.where(inside[:, None], cotangent[Row.LOG_PROB], torch.nan))
            if Row.DIVERGENCE in live and tile.target is not None:
                log_q, log_p = self._logs(tile, terms, known)
                slope = PAIRS[terms.divergence.name].slope(log_p, log_q, terms.divergence.parameter)
                dz += soft_gradient(log_q, slope, known, cotangent, terms.temperature)
            active = (by[:DIFFERENTIABLE, rows] != 0).any(0)
            out[rows].copy_(unfinished_(dz, z, terms.head).masked_fill_(~active[:, None], 0.0))

    def row_probabilities(self, x: Operand, statistics: Tensor) -> Tensor:
        """exp((z - lse) - low)"""
        z, known = finished(x.logits, x.terms.head), statistics[..., None]
        return log_softmax(z, 1.0, known[Row.LSE], known[Row.LSE_LOW]).exp()

    def accumulate_columns_(self, x: Operand, statistics: Tensor, columns: Tensor) -> None:
        """A product with the [G, r] matrix of weights: no atomics."""
        groups = torch.arange(columns.shape[0], device=columns.device)[:, None]
        for rows, some in x.tiles():
            q, weight, group = self.row_probabilities(some, statistics[:, rows]), some.chunk.weight, some.chunk.group
            if weight is None:
                weight = q.new_ones(q.shape[0])
            q.masked_fill_(weight[:, None] == 0, 0.0)
            if group is not None:
                weight = torch.where(group == groups, weight, 0.0)  # [G, r]
            columns.addmm_(weight.view(-1, q.shape[0]), q)


class ReferenceBackend(RowBackend):
    """PyTorch on any device: always available, and the baseline for every other backend."""

    name = "reference"
    operations = ReferenceOperations()

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never: it runs wherever PyTorch does."""
        return None
