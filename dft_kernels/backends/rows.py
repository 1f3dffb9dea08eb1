"""The common part of the row backends: products from `gemm` around row operations. They differ only in the latter.

A row operation reads logits [R, V] as the product left them (it applies the head's scale and softcap itself) and a
chunk's target, and never touches hidden states, weights or features: features are a potential of each row, so that
q @ features and its gradient are products of torch around the row operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..teachers.contract import DenseTarget, Head, SparseTarget
from . import formulas, gemm, sparse
from .active import ActiveColumns
from .active_device import DeviceColumns
from .contract import DIFFERENTIABLE, Backward, Chunk, Cotangents, Outcomes, PartialBackend, Row, Statistics, Terms
from .gemm import tiles

_ALIGN = 32  # logits: a row of a workspace starts on a cache line, so that products and loads are aligned for any V


class Operand(NamedTuple):
    """What a row operation reads: raw logits [R, V], their chunk, whose target is logits or
    None, and the terms."""

    logits: Tensor
    chunk: Chunk
    terms: Terms

    def tiles(self) -> Iterator[tuple[slice, Operand]]:
        """Its rows, as many at a time as may have temporaries of the logits' size."""
        return ((rows, self.part(rows)) for rows in tiles(self.logits))

    def part(self, rows: slice) -> Operand:
        """Some of its rows."""
        return Operand(self.logits[rows], self.chunk.part(rows), self.terms)


class RowOperations(ABC):
    """The row operations, the same Python signatures in every row backend. statistics: [len(Row), R]."""

    @abstractmethod
    def row_statistics(self, x: Operand) -> Tensor:
        """The row quantities [len(Row), R]."""

    @abstractmethod
    def row_divergence_(self, x: Operand, statistics: Tensor) -> None:
        """DIVERGENCE and, where it is differentiated, SLOPE over the columns of `x`, whose target is dense, into
        `statistics`, under the log-sum-exps that these hold."""

    @abstractmethod
    def row_gradient_(self, x: Operand, statistics: Tensor, cotangents: Cotangents, out: Tensor) -> None:
        """out [R, V] = d / d(raw logits), in the input dtype; a row of `out` may be the memory of its row of logits, in
        whole or its upper half."""

    def row_step_(self, x: Operand, cotangents: Cotangents, out: Tensor) -> Tensor:
        """Both: the row quantities, and the gradient into `out`."""
        statistics = self.row_statistics(x)
        self.row_gradient_(x, statistics, cotangents, out)
        return statistics

    @abstractmethod
    def accumulate_columns_(self, x: Operand, statistics: Tensor, columns: Tensor) -> None:
        """columns[group_n] += weight_n q_n over the chunk's rows, deterministically; columns [G, V]."""

    @abstractmethod
    def row_probabilities(self, x: Operand, statistics: Tensor) -> Tensor:
        """q [R, V]."""


def _hard(terms: Terms) -> Terms:
    """The terms without a gradient of the divergence."""
    return terms._replace(differentiated=terms.differentiated - {Row.DIVERGENCE})


def _tempered(terms: Terms) -> Head:
    """The head whose logits are z / T: cap(x) / T = (softcap / T) tanh((x / T) / (softcap / T))."""
    head = terms.head
    cap = None if head.softcap is None else head.softcap / terms.temperature
    return Head(logit_scale=head.logit_scale / terms.temperature, softcap=cap)


@dataclass
class RowWorkspace:
    """logits [rows, V] in the dtype of the terms and dlogits in the input dtype, of one memory: a row of dlogits is its
    row of logits, or the upper half of a wider one. Where dlogits are kept, they are [kept, V], and logits of their
    dtype stand there too. None for logits that the caller holds (dlogits go where `dhidden` points). target: the logits
    of a teacher's head, allocated by the first chunk that needs them; waiting: what the kept dlogits are to be
    multiplied by, (hidden, down) of each chunk."""

    rows: int
    terms: Terms
    logits: Tensor | None = None
    dlogits: Tensor | None = None
    keeps: bool = False
    target: Tensor | None = None
    waiting: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def rows_of(self, chunk: Chunk) -> slice:
        """Where the chunk stands in what is kept."""
        start = sum(len(hidden) for hidden, _ in self.waiting)
        return slice(start, start + len(chunk.hidden))

    def operand(self, chunk: Chunk, multiply: bool) -> Operand:
        """The chunk with its logits and its target's; multiply: compute them, else they are still here."""
        head, logits = self.terms.head, chunk.hidden
        if self.logits is not None:
            in_kept = self.keeps and self.logits is self.dlogits
            logits = self.logits[self.rows_of(chunk)] if in_kept else self.logits[: len(chunk.hidden)]
            if multiply and head.weight is not None:
                gemm.logits_(chunk.hidden, head.weight, head.bias, logits)
                if self.terms.up is not None and chunk.down is not None:
                    gemm.add_product_(chunk.down, self.terms.up, logits)
        return Operand(logits, self._resolved(chunk, multiply), self.terms)

    def _resolved(self, chunk: Chunk, multiply: bool) -> Chunk:
        """The chunk with a teacher's head and hidden states replaced by logits [R, V]."""
        if not isinstance(chunk.target, DenseTarget) or chunk.target.head.weight is None:
            return chunk
        hidden, head = chunk.target
        assert head.weight is not None
        if self.target is None:
            vocab = head.weight.shape[0]
            self.target = row_matrix(self.rows, vocab, hidden, self.terms.logits_dtype)[:, :vocab]
        logits = self.target[: hidden.shape[0]]
        if multiply:
            gemm.logits_(hidden, head.weight, head.bias, logits)
        return chunk._replace(target=DenseTarget(logits, head._replace(weight=None, bias=None)))

    def gradient(self, chunk: Chunk, backward: Backward) -> Tensor:
        """Where the gradient of the chunk's raw logits goes."""
        if self.dlogits is None:  # the caller's logits: their gradient is the result
            assert backward.dhidden is not None
            return backward.dhidden
        return self.dlogits[self.rows_of(chunk)] if self.keeps else self.dlogits[: len(chunk.hidden)]

    def products(self, out: Tensor, chunk: Chunk, backward: Backward) -> None:
        """The gradients that are products of dlogits, `out` [R, V], and its column sums, dbias."""
        terms, active, some = self.terms, backward.active, False
        if active is not None and active.pays and Row.MEAN_LOG_PROB not in terms.differentiated:  # of every column
            some = self._multiplied(active, out, chunk, backward)
        if terms.head.weight is not None and backward.dhidden is not None and not some:
            gemm.dhidden_(out, terms.head.weight, backward.dhidden)
        if terms.up is not None and backward.ddown is not None:
            gemm.dhidden_(out, terms.up, backward.ddown)
        if backward.dbias is not None:
            total = out.sum(0, dtype=backward.dbias.dtype)
            backward.dbias.copy_(total) if backward.first else backward.dbias.add_(total)
        if self.keeps and self.dlogits is not None:
            rows = self.rows_of(chunk)
            self.waiting.append((chunk.hidden, chunk.down))
            if not backward.last:
                return
            out, hidden = self.dlogits[: rows.stop], torch.cat([hidden for hidden, _ in self.waiting])
            down = None if chunk.down is None else torch.cat([down for _, down in self.waiting if down is not None])
            self.waiting.clear()
        else:
            hidden, down = chunk.hidden, chunk.down
        for right, left in ((None if some else backward.dweight, hidden), (backward.dup, down)):
            if right is not None and left is not None:
                gemm.dweight_(out, left, right, accumulate=not (backward.first or self.keeps))

    def _multiplied(self, active: ActiveColumns | DeviceColumns, out: Tensor, chunk: Chunk, backward: Backward) -> bool:
        """dhidden and dweight from some columns of `out` [R, V], if that pays."""
        target, likeliest = chunk.target, None
        if isinstance(target, SparseTarget):
            likeliest = target.best()
        elif target is not None:
            held = target.hidden if target.head.weight is None else self.target
            assert held is not None
            logits = held[: len(out)]
            likeliest = logits.argmax(1) if target.head.logit_scale > 0 else logits.argmin(1)
        into = (backward.dhidden, backward.dweight, backward.first)
        return active.products(out, chunk.hidden, (chunk.label, likeliest), *into)


def row_matrix(rows: int, vocab: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, V or a little more] on the device of `like`."""
    return like.new_empty(rows, -(-vocab // _ALIGN) * _ALIGN, dtype=dtype)


class RowBackend(PartialBackend[RowWorkspace]):
    """The backend contract on top of the row operations."""

    best_rows = 4096
    even_rows = 1024
    keeps = True
    operations: RowOperations

    def chunk_bytes(self, logits: torch.dtype, projected: bool, target: int) -> int:
        """Own logits, which the gradient is written over, and the teacher's."""
        return max(1, logits.itemsize * projected + target)

    def workspace(
        self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool, kept: int = 0
    ) -> RowWorkspace:
        """Memory for `rows` rows of logits, unless the caller holds them, and for `kept` rows of dlogits."""
        if terms.head.weight is None:
            return RowWorkspace(rows, terms)
        dlogits = row_matrix(kept, vocab, like, like.dtype)[:, :vocab] if kept else None
        if dlogits is not None and terms.logits_dtype == like.dtype:
            return RowWorkspace(rows, terms, dlogits, dlogits, keeps=True)
        logits = row_matrix(rows, vocab, like, terms.logits_dtype)
        if dlogits is not None:
            return RowWorkspace(rows, terms, logits[:, :vocab], dlogits, keeps=True)
        over = logits.view(like.dtype)
        return RowWorkspace(rows, terms, logits[:, :vocab], over[:, over.shape[1] - logits.shape[1] :][:, :vocab])

    def chunk_statistics(self, workspace: RowWorkspace, chunk: Chunk, columns: Tensor | None) -> Statistics:
        """One product (two with a teacher's head) and one row operation, or two."""
        x = workspace.operand(chunk, multiply=True)
        if isinstance(chunk.target, SparseTarget):
            if x.terms.compared:
                own = workspace.logits is not None and (columns is not None or not x.terms.columns)
                return self._sparse_statistics(x, chunk.target, columns, own)
            x = x._replace(chunk=chunk._replace(target=None))
        return self._dense_statistics(x, columns)

    def _dense_statistics(self, x: Operand, columns: Tensor | None) -> Statistics:
        statistics = self.operations.row_statistics(x)
        if columns is not None:
            self.operations.accumulate_columns_(x, statistics, columns)
        if x.terms.features is None:
            return Statistics(statistics)
        features = statistics.new_empty(x.logits.shape[0], x.terms.features.shape[1])
        for rows, tile in x.tiles():
            q = self.operations.row_probabilities(tile, statistics[:, rows])
            features[rows] = (x.terms.features.t() @ q.t()).t()
        return Statistics(statistics, features)

    def chunk_sums(self, workspace: RowWorkspace, chunk: Chunk, found: Statistics, columns: Tensor | None) -> None:
        """One row operation each."""
        x = workspace.operand(chunk, multiply=False)
        if isinstance(chunk.target, DenseTarget) and x.terms.compared:
            self.operations.row_divergence_(x, found.rows)
        if columns is not None:
            self.operations.accumulate_columns_(x._replace(chunk=chunk._replace(target=None)), found.rows, columns)

    def _sparse_statistics(self, x: Operand, target: SparseTarget, columns: Tensor | None, own: bool) -> Statistics:
        """The statistics without the target, and the log-sum-exp outside of it by a second sweep over the logits. Where
        no more is wanted beside it than the label's log-probability, that second sweep is the only one. own: the
        logits are the workspace's, and nobody sums columns of them later."""
        logits, terms = x.logits, x.terms
        hard = _hard(terms)._replace(
            wanted=terms.wanted - {Row.DIVERGENCE, Row.SOFT_LSE, Row.TARGET_LSE, Row.AGREEMENT}
        )
        plain = Operand(logits, x.chunk._replace(target=None), hard)
        raw = sparse.gathered(logits, target)
        alone = (
            terms.temperature == 1.0
            and columns is None
            and terms.features is None
            and hard.wanted <= {Row.LSE, Row.LOG_PROB}
        )
        agreement = label = None
        if alone:
            found = Statistics(raw.new_zeros(len(Row), len(raw), dtype=accumulate_dtype(raw.dtype)))
            label = x.chunk.label if Row.LOG_PROB in terms.wanted else None
            if label is not None:
                inside = (label >= 0) & (label < logits.shape[1])
                z_y = formulas.finished(logits.gather(1, torch.where(inside, label, 0)[:, None])[:, 0], terms.head)
        else:
            found = self._dense_statistics(plain, columns)
            if Row.AGREEMENT in terms.wanted:
                asked = hard._replace(wanted=frozenset({Row.CORRECT}), differentiated=frozenset())
                best = Operand(logits, plain.chunk._replace(label=target.best()), asked)
                agreement = self.operations.row_statistics(best)
        statistics, z = found.rows, formulas.finished(raw, terms.head)
        if not target.whole:
            z = z.masked_fill(target.index < 0, -torch.inf)
        tail = self._log_sum_exp_outside(x, target, own)
        z_of_target = z if terms.temperature == 1.0 else z / terms.temperature
        soft = sparse.log_add(tail, formulas.log_sum_exp(z_of_target))
        statistics[Row.SOFT_LSE], statistics[Row.SOFT_LSE_LOW] = soft
        if alone:
            statistics[Row.LSE], statistics[Row.LSE_LOW] = soft
            if label is not None:
                log_prob = (z_y - soft[0]) - soft[1]
                statistics[Row.LOG_PROB] = torch.where(inside, log_prob, torch.nan)
        if agreement is not None:
            statistics[Row.AGREEMENT], statistics[Row.TOP] = agreement[Row.CORRECT], agreement[Row.TOP]
        return found._replace(outcomes=sparse.complete_(statistics, target, z, tail, terms))

    def _log_sum_exp_outside(self, x: Operand, target: SparseTarget, own: bool) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of z / T outside of a row's target, and its rounding error. The workspace's own logits are
        overwritten there where nobody reads them after, unless a head would turn -inf into something finite."""
        terms, logits = x.terms, x.logits
        asked = terms._replace(wanted=frozenset({Row.LSE}), differentiated=frozenset(), potential=None, features=None)
        # the gradient at the target's tokens is written over what is there, or there is none
        spent = Row.DIVERGENCE in terms.differentiated or not terms.differentiated
        if spent and own and terms.head.softcap is None and terms.head.logit_scale > 0:
            sparse.hide_(logits, target)
            tempered = asked._replace(head=_tempered(terms))
            found = self.operations.row_statistics(Operand(logits, Chunk(logits), tempered))
        else:
            parts = []
            for rows in tiles(logits):
                z = formulas.finished(logits[rows], terms.head) / terms.temperature
                sparse.hide_(z, target.part(rows))
                parts.append(self.operations.row_statistics(Operand(z, Chunk(z), asked._replace(head=Head()))))
            found = torch.cat(parts, dim=1)
        return found[Row.LSE], found[Row.LSE_LOW]

    def chunk_gradient(self, workspace: RowWorkspace, chunk: Chunk, found: Statistics, backward: Backward) -> None:
        """One row operation and up to two products."""
        x, out = workspace.operand(chunk, multiply=False), workspace.gradient(chunk, backward)
        cotangents = backward.cotangents
        if found.features is None or cotangents.features is None:
            self._row_gradient_(found.outcomes, x, found.rows, cotangents, out)
        else:
            self._feature_gradient_(x, found, cotangents, out)
        workspace.products(out, chunk, backward)

    def _row_gradient_(
        self, outcomes: Outcomes | None, x: Operand, statistics: Tensor, cotangents: Cotangents, out: Tensor
    ) -> None:
        """The row operation, and what a sparse target adds. Outside of its tokens that is a cotangent of SOFT_LSE,
        which at T = 1 is LSE; else a head divided by T makes it one, and the other terms take a sweep of their own."""
        target, terms = x.chunk.target, x.terms
        plain = x if isinstance(target, DenseTarget) else x._replace(chunk=x.chunk._replace(target=None))
        if not isinstance(target, SparseTarget) or Row.DIVERGENCE not in terms.differentiated:
            self.operations.row_gradient_(plain, statistics, cotangents, out)
            return
        assert outcomes is not None
        hard, settled = plain._replace(terms=_hard(terms)), cotangents.settled(statistics)
        at = sparse.gradient_at(outcomes, target.index, plain.chunk, terms, statistics, settled, x.logits.shape[1])
        outside = sparse.slope_cotangent(statistics, settled)
        own = Cotangents(cotangents.rows.clone(), lse_slope=cotangents.lse_slope)
        own.rows[Row.DIVERGENCE] = 0.0
        if terms.temperature == 1.0:
            own.rows[Row.LSE] += outside
            with_lse = hard.terms._replace(differentiated=hard.terms.differentiated | {Row.LSE})
            self.operations.row_gradient_(hard._replace(terms=with_lse), statistics, own, out)
        else:
            soft = terms._replace(head=_tempered(terms), differentiated=frozenset({Row.LSE}), potential=None)
            known = statistics.clone()
            known[Row.LSE], known[Row.LSE_LOW] = statistics[Row.SOFT_LSE], statistics[Row.SOFT_LSE_LOW]
            pull = Cotangents(torch.zeros_like(own.rows))
            pull.rows[Row.LSE] = outside
            if not hard.terms.differentiated:
                self.operations.row_gradient_(plain._replace(terms=soft), known, pull, out)
            else:
                for rows, tile in hard.tiles():
                    more = torch.empty_like(out[rows])
                    self.operations.row_gradient_(tile._replace(terms=soft), known[:, rows], pull.part(rows), more)
                    self.operations.row_gradient_(tile, statistics[:, rows], own.part(rows), out[rows])
                    out[rows] += more
        sparse.put_(out, target, at)

    def chunk_step(
        self, workspace: RowWorkspace, chunk: Chunk, columns: Tensor | None, backward: Backward
    ) -> Statistics:
        """One row operation for both halves, where nothing else reads the logits between them."""
        if columns is not None or workspace.terms.features is not None or isinstance(chunk.target, SparseTarget):
            return super().chunk_step(workspace, chunk, columns, backward)
        x, out = workspace.operand(chunk, multiply=True), workspace.gradient(chunk, backward)
        statistics = self.operations.row_step_(x, backward.cotangents, out)
        workspace.products(out, chunk, backward)
        return Statistics(statistics)

    def _feature_gradient_(self, x: Operand, found: Statistics, cotangents: Cotangents, out: Tensor) -> None:
        """q phi k - q <q, phi k> is what a potential phi k [V] of the row's own adds; with c that of POTENTIAL, the two
        are the one potential phi k + c G of cotangent 1."""
        terms = x.terms
        assert terms.features is not None
        for rows, tile in x.tiles():
            known, own = found.rows[:, rows].clone(), cotangents.part(rows)
            assert own.features is not None
            assert found.features is not None
            kappa, by = own.features, own.rows.clone()
            potential = (terms.features @ kappa.t()).t()  # [r, V]
            mean = (kappa * found.features[rows]).sum(-1)
            active = (kappa != 0).any(-1)
            if Row.POTENTIAL in terms.differentiated and terms.potential is not None:
                table = terms.potential[:1] if tile.chunk.group is None else terms.potential[tile.chunk.group]
                potential = potential + by[Row.POTENTIAL, :, None] * table
                mean = mean + by[Row.POTENTIAL] * known[Row.POTENTIAL]
                active |= by[Row.POTENTIAL] != 0
            by[Row.POTENTIAL], known[Row.POTENTIAL] = active.to(by.dtype), mean
            each = torch.arange(len(potential), device=potential.device)  # a group for every row
            differentiated = terms.differentiated | {Row.POTENTIAL}
            tile = Operand(
                tile.logits,
                tile.chunk._replace(group=each),
                terms._replace(potential=potential.contiguous(), differentiated=differentiated),
            )
            part = None if found.outcomes is None else found.outcomes.part(rows)
            self._row_gradient_(part, tile, known, Cotangents(by[:DIFFERENTIABLE], None, own.lse_slope), out[rows])
