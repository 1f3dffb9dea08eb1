"""A backend over the columns of this process: any other's two halves, between which the processes' statistics meet.

Backends know nothing of ranks. To them a part of a vocabulary is a vocabulary, and what they are asked for differs
where the whole matters:

    label elsewhere      its gradient -a q is that of the log-sum-exp, whose cotangent takes it over; label 0 stands in
    mean log-probability m / V and -m q: a cotangent m V_i / V, and -m (1 - V_i / V) of the log-sum-exp
    sparse target        tokens elsewhere have ids below 0
    divergence           sums of their own (`chunk_sums`), under the log-sum-exps of the whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import sparse
from ..backends.contract import (
    Backend,
    Backward,
    Chunk,
    Cotangents,
    Outcomes,
    PartialBackend,
    Row,
    Statistics,
    Terms,
)
from ..dtypes import accumulate_dtype
from ..teachers.contract import SparseTarget
from .merging import added, exchanged, merge_, split, weighted
from .shards import Shards
from .sums import Sums

_UNSUMMED = frozenset({Row.SOFT_LSE, Row.TARGET_LSE})  # of a divergence, before its sums
_BY_LSE = frozenset({Row.LOG_PROB, Row.MEAN_LOG_PROB})  # whose gradient is in part that of LSE


@dataclass
class ShardedWorkspace:
    """The workspace of this process's columns (None: it has none), and what is on its way to the others. own: the last
    chunk, of these columns."""

    rows: int
    terms: Terms  # of the whole
    part: Terms
    inner: Any
    sums: Sums
    own: Chunk | None = None


class ShardedBackend(Backend[ShardedWorkspace]):
    """`backend` over a part of the vocabulary. sums: whether gradients of hidden states are summed over the processes,
    complete after the last chunk alone, or left as this process's part."""

    def __init__(self, backend: PartialBackend[Any], shards: Shards, sums: bool) -> None:
        self.backend, self.shards, self.overlaps = backend, shards, sums and len(shards.sizes) > 1
        self.name, self.best_rows, self.even_rows = backend.name, backend.best_rows, backend.even_rows
        self.keeps, self.emulated = backend.keeps, backend.emulated

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Where the other is."""
        return self.backend.unavailable(device, dtype)

    def chunk_bytes(self, logits: torch.dtype, projected: bool, target: int) -> int:
        """That of the other."""
        return self.backend.chunk_bytes(logits, projected, target)

    def holds(self, terms: Terms, like: Tensor) -> torch.dtype:
        """What the other does, of terms in two halves."""
        return terms.logits_dtype

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """As the other does."""
        self.backend.scale_(gradient, factor)

    def workspace(
        self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool, kept: int = 0
    ) -> ShardedWorkspace:
        """Scratch for this process's columns."""
        wanted, differentiated = terms.wanted | {Row.LSE}, terms.differentiated
        if Row.DIVERGENCE in wanted:
            wanted = wanted - {Row.DIVERGENCE} | _UNSUMMED
        if differentiated & _BY_LSE:
            differentiated |= {Row.LSE}
        part = terms._replace(wanted=wanted, differentiated=differentiated)
        inner = None
        if self.shards.size:
            inner = self.backend.workspace(rows, vocab, like, part, gradient, kept)
        return ShardedWorkspace(rows, terms, part, inner, Sums(self.shards))

    def chunk_statistics(self, workspace: ShardedWorkspace, chunk: Chunk, columns: Tensor | None) -> Statistics:
        """The other's, one exchange, and for a divergence to a dense target a sweep and an exchange more."""
        terms = workspace.terms
        workspace.own = self._own(chunk)
        if workspace.inner is None:
            found = self._nothing(chunk, terms)
        else:
            found = self.backend.chunk_statistics(workspace.inner, workspace.own, None)
        found = self._merged(found, chunk, workspace)
        workspace.sums.advance()
        dense = Row.DIVERGENCE in terms.wanted and chunk.target is not None and found.outcomes is None
        if workspace.inner is not None and (dense or columns is not None):
            self.backend.chunk_sums(workspace.inner, workspace.own, found, columns)
        if dense:
            rows = (Row.DIVERGENCE, Row.SLOPE)
            every = self.shards.gathered(torch.stack([found.rows[row] for row in rows]))
            for row, total in zip(rows, every.sum(0, dtype=torch.float64), strict=True):
                found.rows[row] = total
        return found

    def chunk_gradient(self, workspace: ShardedWorkspace, chunk: Chunk, found: Statistics, backward: Backward) -> None:
        """The other's, and the sums of dhidden and ddown over the processes, the last chunk's complete with all."""
        if workspace.inner is not None:
            assert workspace.own is not None
            own = self._cotangents(backward.cotangents, chunk, workspace.part)
            self.backend.chunk_gradient(workspace.inner, workspace.own, found, backward._replace(cotangents=own))
        else:
            for gradient in (backward.dhidden, backward.ddown):
                if gradient is not None:
                    gradient.zero_()
        if self.overlaps:
            for gradient in (backward.dhidden, backward.ddown):
                if gradient is not None:
                    workspace.sums.begin(gradient)
        if backward.last:
            workspace.sums.finish()

    def _own(self, chunk: Chunk) -> Chunk:
        """The chunk, with ids of these columns."""
        label, target, start = chunk.label, chunk.target, self.shards.start
        if label is not None:
            label = torch.where(self.shards.own(label), label - start, 0)
        if isinstance(target, SparseTarget):
            index = torch.where(self.shards.own(target.index), target.index - start, -1)
            target = SparseTarget(index, target.log_prob, target.tail, whole=False)
        return chunk._replace(label=label, target=target)

    def _cotangents(self, given: Cotangents, chunk: Chunk, part: Terms) -> Cotangents:
        """With what of a gradient is q times a number as a cotangent of LSE."""
        if not part.differentiated & _BY_LSE:
            return given
        rows = given.rows.clone()
        if Row.LOG_PROB in part.differentiated and chunk.label is not None:
            outside = (chunk.label < 0) | (chunk.label >= self.shards.total)  # NaN, as everywhere
            rows[Row.LOG_PROB] = torch.where(self.shards.own(chunk.label), rows[Row.LOG_PROB], 0.0)
            moved = given.rows[Row.LOG_PROB] - rows[Row.LOG_PROB]
            rows[Row.LSE] -= torch.where(outside & (moved != 0), torch.nan, moved)
        if Row.MEAN_LOG_PROB in part.differentiated:
            share = self.shards.size / self.shards.total
            rows[Row.MEAN_LOG_PROB] *= share
            rows[Row.LSE] -= (1.0 - share) * given.rows[Row.MEAN_LOG_PROB]
        return given._replace(rows=rows)

    def _merged(self, found: Statistics, chunk: Chunk, workspace: ShardedWorkspace) -> Statistics:
        """The whole vocabulary's, by one exchange of all that is needed."""
        terms, target = workspace.terms, chunk.target
        rows = exchanged(workspace.part.wanted, isinstance(target, SparseTarget))
        told = [torch.stack([found.rows[row] for row in rows])]
        if found.features is not None:
            told.append(found.features.t())
        if found.outcomes is not None:
            told += [found.outcomes.z.t(), torch.stack(found.outcomes.tail)]
        every = self.shards.gathered(torch.cat(told))
        parts, *more = every.split([len(one) for one in told], dim=1)
        share = merge_(found.rows, parts, rows, self.shards, chunk.label)
        features = outcomes = None
        if found.features is not None:
            features = weighted(share[:, None], more.pop(0)).t().to(found.rows.dtype).contiguous()
        if isinstance(target, SparseTarget) and terms.compared:
            z, tail = more
            outside = split(added(tail[:, 0], tail[:, 1]), found.rows.dtype)
            outcomes = sparse.complete_(found.rows, target, z.amax(0).t(), outside, terms)
        return Statistics(found.rows, features, outcomes)

    def _nothing(self, chunk: Chunk, terms: Terms) -> Statistics:
        """The statistics of no columns."""
        count, wide = len(chunk.hidden), accumulate_dtype(chunk.hidden.dtype)
        rows = chunk.hidden.new_zeros(len(Row), count, dtype=wide)
        for row in (Row.LSE, Row.SOFT_LSE, Row.TARGET_LSE, Row.TOP, Row.TARGET_TOP):
            rows[row] = -torch.inf
        features = None if terms.features is None else rows.new_zeros(count, terms.features.shape[1])
        outcomes = None
        if isinstance(chunk.target, SparseTarget) and terms.compared:
            empty = torch.full_like(chunk.target.log_prob, -torch.inf)
            outcomes = Outcomes(empty, empty, empty, rows[0], (rows[Row.LSE], rows[0]))
        return Statistics(rows, features, outcomes)
