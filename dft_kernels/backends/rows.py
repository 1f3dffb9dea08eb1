"""What the row backends share: products from `gemm`, and row operations that are all they differ in.

A row operation reads logits [R, V] in the accumulation dtype as the product left them (the head's scale and
softcap are its business) and a chunk's target, and never touches hidden states or weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .. import gemm
from ..teachers import DenseTarget
from .contract import Chunk, Cotangents, Gradients, Terms


class RowOperations(Protocol):
    """The three row operations, the same Python signatures in every row backend."""

    def row_statistics(self, logits: Tensor, chunk: Chunk, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """Row quantities [len(Row), R] and features [R, K] of raw logits [R, V]."""

    def row_gradient_(
        self,
        logits: Tensor,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        features: Tensor | None,
        cotangents: Cotangents,
        out: Tensor,
    ) -> None:
        """out [R, V] = d / d(raw logits), in the input dtype; `out` may be the memory of `logits`."""

    def accumulate_columns_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, columns: Tensor
    ) -> None:
        """columns[group_n] += weight_n q_n over the chunk's rows, deterministically; columns [G, V]."""


@dataclass
class RowWorkspace:
    """logits [rows, V] in the accumulation dtype and dlogits [rows, V] in the input dtype: one memory where the
    two dtypes agree, and none at all for logits that the caller holds (dlogits go where `dhidden` points).
    target: the same for a teacher head's logits, made by the first chunk that needs them."""

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
            wide = gemm.accumulate_dtype(hidden.dtype)
            self.target = torch.empty(self.rows, head.weight.shape[0], dtype=wide, device=hidden.device)
        logits = self.target[: hidden.shape[0]]
        if multiply:
            gemm.logits_(hidden, head.weight, head.bias, logits)
        return replace(chunk, target=DenseTarget(logits, head._replace(weight=None, bias=None)))


class RowBackend:
    """The backend contract on top of three row operations."""

    name: str
    best_rows = 4096
    operations: RowOperations

    def chunk_bytes(self, dtype: torch.dtype, projected: bool, taught: bool) -> int:
        """Own logits and the teacher's in the accumulation dtype, dlogits where that is another dtype."""
        wide = gemm.accumulate_dtype(dtype).itemsize
        own = wide + (dtype.itemsize if dtype.itemsize != wide else 0) if projected else 0
        return max(1, own + (wide if taught else 0))

    def workspace(self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool) -> RowWorkspace:
        """Buffers for `rows` rows; dlogits only where there is a gradient."""
        if terms.head.weight is None:
            return RowWorkspace(rows, None, None)
        wide = gemm.accumulate_dtype(like.dtype)
        logits = torch.empty(rows, vocab, dtype=wide, device=like.device)
        if not gradient:
            return RowWorkspace(rows, logits, None)
        return RowWorkspace(rows, logits, logits if wide == like.dtype else torch.empty_like(logits, dtype=like.dtype))

    def _logits(self, workspace: RowWorkspace, chunk: Chunk) -> Tensor:
        return chunk.hidden if workspace.logits is None else workspace.logits[: chunk.hidden.shape[0]]

    def chunk_statistics(
        self, workspace: RowWorkspace, chunk: Chunk, terms: Terms, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One product and one row operation; see the contract."""
        logits = self._logits(workspace, chunk)  # [R, V]
        if terms.head.weight is not None:
            gemm.logits_(chunk.hidden, terms.head.weight, terms.head.bias, logits)
        chunk = workspace.resolved(chunk, multiply=True)
        statistics, features = self.operations.row_statistics(logits, chunk, terms)
        if columns is not None:
            self.operations.accumulate_columns_(logits, chunk, terms, statistics, columns)
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
        logits = self._logits(workspace, chunk)  # [R, V]
        if terms.head.weight is None:  # the caller's logits: their gradient is the result
            assert gradients.dhidden is not None
            out = gradients.dhidden
        else:
            assert workspace.dlogits is not None
            out = workspace.dlogits[: logits.shape[0]]
        chunk = workspace.resolved(chunk, multiply=False)
        self.operations.row_gradient_(logits, chunk, terms, statistics, features, cotangents, out)
        if terms.head.weight is not None and gradients.dhidden is not None:
            gemm.dhidden_(out, terms.head.weight, gradients.dhidden)
        if gradients.dweight is not None:
            gemm.dweight_(out, chunk.hidden, gradients.dweight, accumulate=not gradients.first)
        if gradients.dbias is not None:
            total = out.sum(0, dtype=gradients.dbias.dtype)
            gradients.dbias.copy_(total) if gradients.first else gradients.dbias.add_(total)
