"""The Triton backend: the row operations of `triton_ops`, on any GPU that Triton reaches.

Without a GPU the same kernels run under Triton's interpreter (TRITON_INTERPRET=1): slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..teachers import Head
from .contract import Chunk, Cotangents, Row, Terms
from .rows import RowBackend

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as triton reads it
_OLDEST = (8, 0)


def _kernels() -> Any:
    import triton_ops  # imports triton, which `import dft_kernels` does not

    return triton_ops


class TritonOperations:
    """Thin: a chunk and its terms in the words of `triton_ops`."""

    def row_statistics(self, logits: Tensor, chunk: Chunk, terms: Terms) -> Tensor:
        """One launch; see `triton_ops.row_kernel`."""
        return _kernels().row_statistics(_rows(logits, chunk, terms), _bits(terms.wanted), _bits(terms.differentiated))

    def row_gradient_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, cotangents: Cotangents, out: Tensor
    ) -> None:
        """One launch."""
        rows, live = _rows(logits, chunk, terms), _bits(terms.differentiated)
        _kernels().row_gradient(rows, statistics, live, cotangents.rows, cotangents.lse_slope, out)

    def row_step_(self, logits: Tensor, chunk: Chunk, terms: Terms, cotangents: Cotangents, out: Tensor) -> Tensor:
        """One launch."""
        rows, wanted, live = _rows(logits, chunk, terms), _bits(terms.wanted), _bits(terms.differentiated)
        return _kernels().row_step(rows, wanted, live, cotangents.rows, cotangents.lse_slope, out)

    def accumulate_columns_(
        self, logits: Tensor, chunk: Chunk, terms: Terms, statistics: Tensor, columns: Tensor
    ) -> None:
        """One launch, and the order of the rows by group."""
        weight = None if chunk.weight is None else chunk.weight.contiguous()
        _kernels().accumulate_columns(_rows(logits, chunk, terms), statistics, weight, columns)

    def row_probabilities(self, logits: Tensor, terms: Terms, statistics: Tensor) -> Tensor:
        """One launch."""
        return _kernels().probabilities(_rows(logits, Chunk(logits), terms), statistics)


class TritonBackend(RowBackend):
    """Triton row kernels around torch's products."""

    name = "triton"
    emulated = ("cpu",)
    operations = TritonOperations()

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Without triton, off the GPU, on a GPU too old for it, for fp64."""
        if not _INSTALLED:
            return "triton is not installed (pip install triton)"
        if device.type == "cpu" and not _INTERPRETED:
            return (
                "its kernels run on a GPU; on the CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests"
            )
        if device.type not in ("cpu", "cuda"):
            return f"its kernels run on CUDA and ROCm devices, not on {device.type}"
        if dtype == torch.float64:
            return "its kernels compute in float32"
        if device.type == "cuda" and torch.version.cuda is not None and not torch.compiler.is_compiling():
            capability = torch.cuda.get_device_capability(device)
            if capability < _OLDEST:
                return f"Triton needs compute capability {_OLDEST[0]}.{_OLDEST[1]}, this GPU has {capability}"
        return None


def _bits(rows: frozenset[Row]) -> int:
    return sum(1 << row for row in rows)


def _along_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _rows(logits: Tensor, chunk: Chunk, terms: Terms) -> Any:
    target, head = chunk.target or (None, Head())
    return _kernels().Rows(
        logits=_along_rows(logits),
        scale=terms.head.logit_scale,
        cap=terms.head.softcap,
        label=None if chunk.label is None else chunk.label.contiguous(),
        group=None if chunk.group is None else chunk.group.contiguous(),
        potential=None if terms.potential is None else terms.potential.float().contiguous(),
        target=None if target is None else _along_rows(target),
        target_scale=head.logit_scale,
        target_cap=head.softcap,
        divergence=terms.divergence.name,
        parameter=terms.divergence.parameter,
        temperature=terms.temperature,
        target_temperature=terms.teacher_temperature,
    )
