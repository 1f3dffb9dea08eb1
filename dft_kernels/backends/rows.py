"""What the row backends share: products from `gemm`, and row operations that are all they differ in.

A row operation reads logits [R, V] in the accumulation dtype as the product left them (the head's scale and
softcap are its business) and a chunk's target, and never touches hidden states, weights or features: features are
a potential of each row, so that q @ features and its gradient are products of torch around the row operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import gemm
from ..teachers import DenseTarget, Head
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


class KernelOperations:
    """The row operations by compiled kernels. `kernels` returns the room that has them: Rows, row_statistics,
    row_gradient, row_step, accumulate_columns and probabilities as in `triton_ops`. This is the translation, of a chunk
    and its terms into one description of rows."""

    def __init__(self, kernels: Callable[[], Any], **more: Any) -> None:
        self.kernels, self.more = kernels, more  # more: fields of Rows that these kernels have beyond the common ones

    def row_statistics(self, logits: Tensor, chunk: Chunk, terms: Terms) -> Tensor:
        """One launch."""
        rows = self._rows(logits, chunk, terms)
        return self.kernels().row_statistics(rows, _bits(terms.wanted), _bits(terms.differentiated))

    def row_gradient_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, cotangents: Cotangents, out: Tensor
    ) -> None:
        """One launch."""
        rows, live = self._rows(logits, chunk, terms), _bits(terms.differentiated)
        self.kernels().row_gradient(rows, statistics, live, cotangents.rows, cotangents.lse_slope, out)

    def row_step_(self, logits: Tensor, chunk: Chunk, terms: Terms, cotangents: Cotangents, out: Tensor) -> Tensor:
        """One launch."""
        rows, wanted, live = self._rows(logits, chunk, terms), _bits(terms.wanted), _bits(terms.differentiated)
        return self.kernels().row_step(rows, wanted, live, cotangents.rows, cotangents.lse_slope, out)

    def accumulate_columns_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, columns: Tensor
    ) -> None:
        """One launch, and the order of the rows by group."""
        weight = None if chunk.weight is None else chunk.weight.contiguous()
        self.kernels().accumulate_columns(self._rows(logits, chunk, terms), statistics, weight, columns)

    def row_probabilities(self, logits: Tensor, terms: Terms, statistics: Tensor) -> Tensor:
        """One launch."""
        return self.kernels().probabilities(self._rows(logits, Chunk(logits), terms), statistics)

    def _rows(self, logits: Tensor, chunk: Chunk, terms: Terms) -> Any:
        target, head = chunk.target or (None, Head())
        potential = terms.potential
        return self.kernels().Rows(
            logits=_along_rows(logits),
            scale=terms.head.logit_scale,
            cap=terms.head.softcap,
            label=None if chunk.label is None else chunk.label.contiguous(),
            group=None if chunk.group is None else chunk.group.contiguous(),
            potential=None if potential is None else potential.to(gemm.accumulate_dtype(logits.dtype)).contiguous(),
            target=None if target is None else _along_rows(target),
            target_scale=head.logit_scale,
            target_cap=head.softcap,
            divergence=terms.divergence.name,
            parameter=terms.divergence.parameter,
            temperature=terms.temperature,
            target_temperature=terms.teacher_temperature,
            **self.more,
        )


def _bits(rows: frozenset[Row]) -> int:
    return sum(1 << row for row in rows)


def _along_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def tiles(logits: Tensor) -> Iterator[slice]:
    """Rows of `logits`, as many at a time as may have temporaries of their size."""
    step = max(1, _TILE.get(logits.device.type, _TILE_ELSEWHERE) // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def rows_of(chunk: Chunk, rows: slice) -> Chunk:
    """Some rows of a chunk whose target is logits."""
    return Chunk(
        hidden=chunk.hidden[rows],
        label=None if chunk.label is None else chunk.label[rows],
        group=None if chunk.group is None else chunk.group[rows],
        weight=None if chunk.weight is None else chunk.weight[rows],
        target=None if chunk.target is None else chunk.target._replace(hidden=chunk.target.hidden[rows]),
    )


@dataclass
class RowWorkspace:
    """logits [rows, V] in the accumulation dtype and dlogits [rows, V] in the input dtype, of one memory: a narrow row
    of dlogits is the upper half of its row of logits. None for logits that the caller holds (dlogits go where
    `dhidden` points). target: the logits of a teacher's head, made by the first chunk that needs them."""

    rows: int
    logits: Tensor | None
    dlogits: Tensor | None
    target: Tensor | None = None

    def resolved(self, chunk: Chunk, multiply: bool) -> Chunk:
        """The chunk with its target as logits [R, V]; multiply: compute them, else they are still here."""
        if chunk.target is None or chunk.target.head.weight is None:
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
    return like.new_empty(rows, -(-vocab // _ALIGN) * _ALIGN, dtype=gemm.accumulate_dtype(like.dtype))


class RowBackend:
    """The backend contract on top of the row operations."""

    name: str
    best_rows = 4096
    emulated: tuple[str, ...] = ()
    operations: RowOperations

    def chunk_bytes(self, dtype: torch.dtype, projected: bool, target: int) -> int:
        """Own logits, which the gradient is written over, and the teacher's."""
        return max(1, gemm.accumulate_dtype(dtype).itemsize * projected + target)

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
        """One product and one row operation; see the contract."""
        logits, chunk = self._multiplied(workspace, chunk, terms)
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
            self.operations.row_gradient_(logits, chunk, terms, statistics, cotangents, out)
        else:
            self._feature_gradient_(logits, chunk, terms, statistics, features, cotangents, out)
        self._products(out, chunk, terms, gradients)

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
        if columns is not None or terms.features is not None:
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
        if gradients.dweight is not None:
            gemm.dweight_(out, chunk.hidden, gradients.dweight, accumulate=not gradients.first)
        if gradients.dbias is not None:
            total = out.sum(0, dtype=gradients.dbias.dtype)
            gradients.dbias.copy_(total) if gradients.first else gradients.dbias.add_(total)

    def _feature_gradient_(
        self,
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
            self.operations.row_gradient_(
                logits[rows],
                replace(rows_of(chunk, rows), group=own),
                replace(terms, potential=potential.contiguous(), differentiated=terms.differentiated | {Row.POTENTIAL}),
                known,
                Cotangents(by[:DIFFERENTIABLE], lse_slope=slope),
                out[rows],
            )
