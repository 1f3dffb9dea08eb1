"""What the row backends share: products from `gemm`, and row operations that are all they differ in.

A row operation reads logits [R, V] in the accumulation dtype as the product left them (the head's scale and
softcap are its business) and a chunk's target, and never touches hidden states, weights or features: features are
a potential of each row, so that q @ features and its gradient are products of torch around the row operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..teachers.contract import DenseTarget, Head, SparseTarget
from . import formulas, gemm, sparse
from .contract import DIFFERENTIABLE, Chunk, Cotangents, Gradients, Row, Terms

_ALIGN = 32  # logits: a row of a workspace starts on a cache line, so that products and loads are aligned for any V
_TILE = {"cpu": 1 << 20}  # logits whose probabilities, or potentials of features, exist at a time
_TILE_ELSEWHERE = 1 << 25


class RowOperations(Protocol):
    """The row operations, the same Python signatures in every row backend."""

    def row_statistics(self, logits: Tensor, chunk: Chunk, terms: Terms) -> Tensor:
        """Row quantities [len(Row), R] of raw logits [R, V]."""

    def row_gradient_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, cotangents: Cotangents, out: Tensor
    ) -> None:
        """out [R, V] = d / d(raw logits), in the input dtype; a row of `out` may be `logits`' own, in whole or its
        upper half."""

    def row_step_(self, logits: Tensor, chunk: Chunk, terms: Terms, cotangents: Cotangents, out: Tensor) -> Tensor:
        """Both: the row quantities, and the gradient into `out`."""

    def accumulate_columns_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, columns: Tensor
    ) -> None:
        """columns[group_n] += weight_n q_n over the chunk's rows, deterministically; columns [G, V]."""

    def row_probabilities(self, logits: Tensor, terms: Terms, statistics: Tensor) -> Tensor:
        """q [R, V] of raw logits."""


def _hard(terms: Terms) -> frozenset[Row]:
    return terms.differentiated - {Row.DIVERGENCE}


def _tempered(terms: Terms) -> Head:
    """The head whose logits are z / T: cap(x) / T = (softcap / T) tanh((x / T) / (softcap / T))."""
    head = terms.head
    cap = None if head.softcap is None else head.softcap / terms.temperature
    return Head(logit_scale=head.logit_scale / terms.temperature, softcap=cap)


def tiles(rows: Tensor, vocab: int | None = None) -> Iterator[slice]:
    """Rows of logits [R, V], as many at a time as may have temporaries of their size; of other rows, say V."""
    step = max(1, _TILE.get(rows.device.type, _TILE_ELSEWHERE) // max(1, vocab or rows.shape[1]))
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def rows_of(chunk: Chunk, rows: slice) -> Chunk:
    """Some rows of a chunk whose target is logits or sparse."""
    target = chunk.target
    if isinstance(target, SparseTarget):
        tail = None if target.tail is None else target.tail[rows]
        target = SparseTarget(target.index[rows], target.log_prob[rows], tail)
    elif target is not None:
        target = target._replace(hidden=target.hidden[rows])
    return Chunk(
        hidden=chunk.hidden[rows],
        label=None if chunk.label is None else chunk.label[rows],
        group=None if chunk.group is None else chunk.group[rows],
        weight=None if chunk.weight is None else chunk.weight[rows],
        target=target,
        down=None if chunk.down is None else chunk.down[rows],
    )


@dataclass
class RowWorkspace:
    """logits [rows, V] in the accumulation dtype and dlogits [rows, V] in the input dtype, of one memory: a narrow row
    of dlogits is the upper half of its row of logits. None for logits that the caller holds (dlogits go where
    `dhidden` points). target: the logits of a teacher's head, made by the first chunk that needs them; outcomes: of
    the chunk's sparse target, from its statistics."""

    rows: int
    logits: Tensor | None
    dlogits: Tensor | None
    target: Tensor | None = None
    outcomes: sparse.Outcomes | None = None

    def resolved(self, chunk: Chunk, multiply: bool) -> Chunk:
        """The chunk with its target as logits [R, V]; multiply: compute them, else they are still here."""
        if not isinstance(chunk.target, DenseTarget) or chunk.target.head.weight is None:
            return chunk
        hidden, head = chunk.target
        assert head.weight is not None
        if self.target is None:
            self.target = _matrix(self.rows, head.weight.shape[0], hidden)[:, : head.weight.shape[0]]
        logits = self.target[: hidden.shape[0]]
        if multiply:
            gemm.logits_(hidden, head.weight, head.bias, logits)
        return replace(chunk, target=DenseTarget(logits, head._replace(weight=None, bias=None)))


def _matrix(rows: int, vocab: int, like: Tensor) -> Tensor:
    """[rows, V or a little more] in the accumulation dtype of `like`."""
    return like.new_empty(rows, -(-vocab // _ALIGN) * _ALIGN, dtype=accumulate_dtype(like.dtype))


class RowBackend:
    """The backend contract on top of the row operations."""

    name: str
    best_rows = 4096
    emulated: tuple[str, ...] = ()
    operations: RowOperations

    def chunk_bytes(self, dtype: torch.dtype, projected: bool, target: int) -> int:
        """Own logits, which the gradient is written over, and the teacher's."""
        return max(1, accumulate_dtype(dtype).itemsize * projected + target)

    def workspace(self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool) -> RowWorkspace:
        """Memory for `rows` rows."""
        if terms.head.weight is None:
            return RowWorkspace(rows, None, None)
        wide = _matrix(rows, vocab, like)
        narrow = wide.view(like.dtype)[:, wide.view(like.dtype).shape[1] - wide.shape[1] :]
        return RowWorkspace(rows, wide[:, :vocab], narrow[:, :vocab])

    def chunk_statistics(
        self, workspace: RowWorkspace, chunk: Chunk, terms: Terms, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One product (two with a teacher's head) and one row operation, or two; see the contract."""
        logits, chunk = self._multiplied(workspace, chunk, terms)
        if isinstance(chunk.target, SparseTarget):
            if Row.DIVERGENCE in terms.wanted:
                return self._sparse_statistics(workspace, logits, chunk, terms, columns)
            chunk = replace(chunk, target=None)
        return self._dense_statistics(logits, chunk, terms, columns)

    def _dense_statistics(
        self, logits: Tensor, chunk: Chunk, terms: Terms, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        statistics = self.operations.row_statistics(logits, chunk, terms)
        if columns is not None:
            self.operations.accumulate_columns_(logits, chunk, terms, statistics, columns)
        if terms.features is None:
            return statistics, None
        features = statistics.new_empty(logits.shape[0], terms.features.shape[1])
        for rows in tiles(logits):
            q = self.operations.row_probabilities(logits[rows], terms, statistics[:, rows])
            features[rows] = (terms.features.t() @ q.t()).t()
        return statistics, features

    def _sparse_statistics(
        self, workspace: RowWorkspace, logits: Tensor, chunk: Chunk, terms: Terms, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The statistics without the target, and the log-sum-exp outside of it by a second sweep over the logits. Where
        the label's log-probability is all there is beside, that second sweep is the only one."""
        target, plain = chunk.target, replace(chunk, target=None)
        assert isinstance(target, SparseTarget)
        hard = replace(terms, wanted=terms.wanted - {Row.DIVERGENCE, Row.AGREEMENT}, differentiated=_hard(terms))
        raw = logits.gather(1, target.index)
        alone = (
            terms.temperature == 1.0
            and columns is None
            and terms.features is None
            and hard.wanted <= {Row.LSE, Row.LOG_PROB}
        )
        features = agreement = None
        if alone:
            statistics = raw.new_zeros(len(Row), len(raw), dtype=accumulate_dtype(raw.dtype))
            label = None if chunk.label is None or Row.LOG_PROB not in terms.wanted else chunk.label
            if label is not None:
                inside = (label >= 0) & (label < logits.shape[1])
                z_y = formulas.finished(logits.gather(1, torch.where(inside, label, 0)[:, None])[:, 0], terms.head)
        else:
            statistics, features = self._dense_statistics(logits, plain, hard, columns)
            if Row.AGREEMENT in terms.wanted:
                best = target.index.gather(1, target.log_prob.argmax(1, keepdim=True))[:, 0]
                asked = replace(hard, wanted=frozenset({Row.CORRECT}), differentiated=frozenset())
                agreement = self.operations.row_statistics(logits, replace(plain, label=best), asked)[Row.CORRECT]
        z = formulas.finished(raw, terms.head)
        tail = self._log_sum_exp_outside(workspace, logits, target.index, terms)
        z_of_target = z if terms.temperature == 1.0 else z / terms.temperature
        soft = sparse.log_add(tail, formulas.log_sum_exp(z_of_target))
        statistics[Row.SOFT_LSE], statistics[Row.SOFT_LSE_LOW] = soft
        if alone:
            statistics[Row.LSE], statistics[Row.LSE_LOW] = soft
            if label is not None:
                log_prob = (z_y - soft[0]) - soft[1]
                statistics[Row.LOG_PROB] = torch.where(inside, log_prob, torch.nan)
        if agreement is not None:
            statistics[Row.AGREEMENT] = agreement
        workspace.outcomes = sparse.complete_(statistics, target, z, tail, terms)
        return statistics, features

    def _log_sum_exp_outside(
        self, workspace: RowWorkspace, logits: Tensor, index: Tensor, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        """Of z / T outside of a row's `index`, and what its rounding dropped. The workspace's own logits are spent
        there where nobody reads them after, unless a head would finish them into something finite."""
        asked = replace(terms, wanted=frozenset({Row.LSE}), differentiated=frozenset(), potential=None, features=None)
        # the gradient at S is written over what is there, or there is none
        spent = Row.DIVERGENCE in terms.differentiated or not terms.differentiated
        if spent and workspace.logits is not None and terms.head.softcap is None and terms.head.logit_scale > 0:
            logits.scatter_(1, index, -torch.inf)
            asked = replace(asked, head=_tempered(terms))
            found = self.operations.row_statistics(logits, Chunk(logits), asked)
        else:
            parts = []
            for rows in tiles(logits):
                z = formulas.finished(logits[rows], terms.head) / terms.temperature
                z.scatter_(1, index[rows], -torch.inf)
                parts.append(self.operations.row_statistics(z, Chunk(z), replace(asked, head=Head())))
            found = torch.cat(parts, dim=1)
        return found[Row.LSE], found[Row.LSE_LOW]

    def chunk_gradient(
        self,
        workspace: RowWorkspace,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        features: Tensor | None,
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> None:
        """One row operation and up to two products; see the contract."""
        logits, out = self._rooms(workspace, chunk, gradients)
        chunk = workspace.resolved(chunk, multiply=False)
        if features is None or cotangents.features is None:
            self._row_gradient_(workspace.outcomes, logits, chunk, terms, statistics, cotangents, out)
        else:
            self._feature_gradient_(workspace.outcomes, logits, chunk, terms, statistics, features, cotangents, out)
        self._products(out, chunk, terms, gradients)

    def _row_gradient_(
        self,
        outcomes: sparse.Outcomes | None,
        logits: Tensor,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        cotangents: Cotangents,
        out: Tensor,
    ) -> None:
        """The row operation, and what a sparse target adds. Outside of its tokens that is a cotangent of SOFT_LSE,
        which at T = 1 is LSE; else a head divided by T makes it one, and what is hard takes a sweep of its own."""
        target = chunk.target
        if not isinstance(target, SparseTarget) or Row.DIVERGENCE not in terms.differentiated:
            plain = chunk if isinstance(target, DenseTarget) else replace(chunk, target=None)
            self.operations.row_gradient_(logits, plain, terms, statistics, cotangents, out)
            return
        assert outcomes is not None
        plain, hard = replace(chunk, target=None), replace(terms, differentiated=_hard(terms))
        settled = cotangents.settled(statistics)
        at = sparse.gradient_at(outcomes, target.index, plain, terms, statistics, settled, logits.shape[1])
        outside = sparse.slope_cotangent(statistics, settled)
        by = cotangents.rows.clone()
        by[Row.DIVERGENCE] = 0.0
        if terms.temperature == 1.0:
            by[Row.LSE] += outside
            hard = replace(hard, differentiated=hard.differentiated | {Row.LSE})
            self.operations.row_gradient_(
                logits, plain, hard, statistics, replace(cotangents, rows=by, features=None), out
            )
        else:
            soft = replace(terms, head=_tempered(terms), differentiated=frozenset({Row.LSE}), potential=None)
            known = statistics.clone()
            known[Row.LSE], known[Row.LSE_LOW] = statistics[Row.SOFT_LSE], statistics[Row.SOFT_LSE_LOW]
            alone = torch.zeros_like(by)
            alone[Row.LSE] = outside
            if not hard.differentiated:
                self.operations.row_gradient_(logits, plain, soft, known, Cotangents(alone), out)
            else:
                for rows in tiles(logits):
                    some, own = logits[rows], rows_of(plain, rows)
                    more = torch.empty_like(out[rows])
                    self.operations.row_gradient_(some, own, soft, known[:, rows], Cotangents(alone[:, rows]), more)
                    slope = None if cotangents.lse_slope is None else cotangents.lse_slope[rows]
                    part = Cotangents(by[:, rows], lse_slope=slope)
                    self.operations.row_gradient_(some, own, hard, statistics[:, rows], part, out[rows])
                    out[rows] += more
        out.scatter_(1, target.index, at.to(out.dtype))

    def chunk_step(
        self,
        workspace: RowWorkspace,
        chunk: Chunk,
        terms: Terms,
        columns: Tensor | None,
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor | None]:
        """One row operation for both halves, where nothing else reads the logits between them."""
        if columns is not None or terms.features is not None or isinstance(chunk.target, SparseTarget):
            statistics, features = self.chunk_statistics(workspace, chunk, terms, columns)
            self.chunk_gradient(workspace, chunk, terms, statistics, features, cotangents, gradients)
            return statistics, features
        _, chunk = self._multiplied(workspace, chunk, terms)
        logits, out = self._rooms(workspace, chunk, gradients)
        statistics = self.operations.row_step_(logits, chunk, terms, cotangents, out)
        self._products(out, chunk, terms, gradients)
        return statistics, None

    def _multiplied(self, workspace: RowWorkspace, chunk: Chunk, terms: Terms) -> tuple[Tensor, Chunk]:
        """The chunk's logits, its own and its target's."""
        if terms.head.weight is None or workspace.logits is None:
            return chunk.hidden, workspace.resolved(chunk, multiply=True)
        logits = workspace.logits[: chunk.hidden.shape[0]]
        gemm.logits_(chunk.hidden, terms.head.weight, terms.head.bias, logits)
        if terms.up is not None and chunk.down is not None:
            gemm.add_product_(chunk.down, terms.up, logits)
        return logits, workspace.resolved(chunk, multiply=True)

    def _rooms(self, workspace: RowWorkspace, chunk: Chunk, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Where the chunk's logits are, and where their gradient goes."""
        if workspace.logits is None or workspace.dlogits is None:  # the caller's logits: their gradient is the result
            assert gradients.dhidden is not None
            return chunk.hidden, gradients.dhidden
        return workspace.logits[: len(chunk.hidden)], workspace.dlogits[: len(chunk.hidden)]

    def _products(self, out: Tensor, chunk: Chunk, terms: Terms, gradients: Gradients) -> None:
        if terms.head.weight is not None and gradients.dhidden is not None:
            gemm.dhidden_(out, terms.head.weight, gradients.dhidden)
        if terms.up is not None and gradients.ddown is not None:
            gemm.dhidden_(out, terms.up, gradients.ddown)
        for right, left in ((gradients.dweight, chunk.hidden), (gradients.dup, chunk.down)):
            if right is not None and left is not None:
                gemm.dweight_(out, left, right, accumulate=not gradients.first)
        if gradients.dbias is not None:
            total = out.sum(0, dtype=gradients.dbias.dtype)
            gradients.dbias.copy_(total) if gradients.first else gradients.dbias.add_(total)

    def _feature_gradient_(
        self,
        outcomes: sparse.Outcomes | None,
        logits: Tensor,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        features: Tensor,
        cotangents: Cotangents,
        out: Tensor,
    ) -> None:
        """q phi k - q <q, phi k> is what a potential phi k [V] of the row's own adds; with c that of POTENTIAL, the two
        are the one potential phi k + c G of cotangent 1."""
        assert terms.features is not None
        assert cotangents.features is not None
        for rows in tiles(logits):
            kappa = cotangents.features[rows]  # [r, K]
            potential = (terms.features @ kappa.t()).t()  # [r, V]
            mean = (kappa * features[rows]).sum(-1)
            by = cotangents.rows[:, rows].clone()
            active = (kappa != 0).any(-1)
            if Row.POTENTIAL in terms.differentiated and terms.potential is not None:
                table = terms.potential[:1] if chunk.group is None else terms.potential[chunk.group[rows]]
                potential = potential + by[Row.POTENTIAL, :, None] * table
                mean = mean + by[Row.POTENTIAL] * statistics[Row.POTENTIAL, rows]
                active |= by[Row.POTENTIAL] != 0
            by[Row.POTENTIAL] = active.to(by.dtype)
            known = statistics[:, rows].clone()
            known[Row.POTENTIAL] = mean
            own = torch.arange(len(potential), device=potential.device)
            slope = None if cotangents.lse_slope is None else cotangents.lse_slope[rows]
            self._row_gradient_(
                None if outcomes is None else sparse.Outcomes(*(part[rows] for part in outcomes)),
                logits[rows],
                replace(rows_of(chunk, rows), group=own),
                replace(terms, potential=potential.contiguous(), differentiated=terms.differentiated | {Row.POTENTIAL}),
                known,
                Cotangents(by[:DIFFERENTIABLE], lse_slope=slope),
                out[rows],
            )
