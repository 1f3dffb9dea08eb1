"""The row operations by compiled kernels: what the CUDA and the Triton backend share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..dtypes import accumulate_dtype
from ..teachers.contract import Head, SparseTarget
from .contract import Chunk, Cotangents, Row, Terms


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
        assert not isinstance(chunk.target, SparseTarget)
        target, head = chunk.target or (None, Head())
        potential = terms.potential
        return self.kernels().Rows(
            logits=_along_rows(logits),
            scale=terms.head.logit_scale,
            cap=terms.head.softcap,
            label=None if chunk.label is None else chunk.label.contiguous(),
            group=None if chunk.group is None else chunk.group.contiguous(),
            potential=None if potential is None else potential.to(accumulate_dtype(logits.dtype)).contiguous(),
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
