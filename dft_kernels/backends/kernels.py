"""The row operations by compiled kernels, for the CUDA and the Triton backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..teachers.contract import Head, SparseTarget
from .active import ActiveColumns
from .active_device import DeviceColumns
from .contract import Cotangents, bits
from .rows import Operand, RowBackend, RowOperations

TRITON = importlib.util.find_spec("triton") is not None
OLDEST = (8, 0)  # compute capability that Triton compiles for


def too_old(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU that Triton does not compile for."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) < OLDEST


class KernelOperations(RowOperations):
    """The row operations by compiled kernels. `kernels` returns the module that has them: Rows, row_statistics,
    row_divergence, row_gradient, row_step, accumulate_columns and probabilities as in `triton_ops`. Each operation is
    one launch; this class translates an operand into the kernels' own description of rows."""

    def __init__(self, kernels: Callable[[], Any], **more: Any) -> None:
        self.kernels, self.more = kernels, more  # more: fields of Rows that these kernels have beyond the common ones

    def row_statistics(self, x: Operand) -> Tensor:
        return self.kernels().row_statistics(self._rows(x), bits(x.terms.wanted), bits(x.terms.differentiated))

    def row_divergence_(self, x: Operand, statistics: Tensor) -> None:
        self.kernels().row_divergence(self._rows(x), statistics, bits(x.terms.differentiated))

    def row_gradient_(self, x: Operand, statistics: Tensor, cotangents: Cotangents, out: Tensor) -> None:
        rows, live = self._rows(x), bits(x.terms.differentiated)
        self.kernels().row_gradient(rows, statistics, live, cotangents.rows, cotangents.lse_slope, out)

    def row_step_(self, x: Operand, cotangents: Cotangents, out: Tensor) -> Tensor:
        rows, wanted, live = self._rows(x), bits(x.terms.wanted), bits(x.terms.differentiated)
        return self.kernels().row_step(rows, wanted, live, cotangents.rows, cotangents.lse_slope, out)

    def accumulate_columns_(self, x: Operand, statistics: Tensor, columns: Tensor) -> None:
        weight = None if x.chunk.weight is None else x.chunk.weight.contiguous()
        self.kernels().accumulate_columns(self._rows(x), statistics, weight, columns)

    def row_probabilities(self, x: Operand, statistics: Tensor) -> Tensor:
        return self.kernels().probabilities(self._rows(x), statistics)

    def _rows(self, x: Operand) -> Any:
        logits, chunk, terms = x.logits, x.chunk, x.terms
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


class KernelBackend(RowBackend):
    """A row backend whose operations are compiled kernels."""

    operations: KernelOperations

    def active(self, error: float, weight: Tensor, rows: int) -> ActiveColumns | DeviceColumns:
        """Without a synchronisation where Triton's products run, which CUDA's backend has none of its own of."""
        if not TRITON or weight.dtype == torch.float64 or too_old(weight.device):
            return super().active(error, weight, rows)
        import triton_ops.active

        return DeviceColumns(error, weight, rows, triton_ops.active)

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Without a synchronisation; the kernel returns at once where the factor is 1."""
        self.operations.kernels().scale(gradient, factor)


def _along_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
