"""Buffers for the gradients of a call: of the first fields of a `Problem`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.extension import scratch
from ..teachers.contract import Rows
from .planning import dweight_dtype
from .problem import GRADIENTS, Problem
from .selection import Selection


class RowGradient:
    """The gradient of a tensor of rows [N, .], written chunk by chunk: into the tensor itself, or, where ignored rows
    make a chunk's rows non-contiguous, into a buffer that is scattered afterwards."""

    def __init__(self, whole: Tensor | None, selection: Selection, size: int) -> None:
        self.whole = whole
        self.buffer: Tensor | None = None
        if whole is not None and selection.index is not None:
            self.buffer = whole.new_empty(size, whole.shape[1])

    def of(self, rows: Rows) -> Tensor | None:
        """Where a chunk writes."""
        if self.buffer is not None:
            return self.buffer[: rows.stop - rows.start]
        return None if self.whole is None else self.whole[rows.start : rows.stop]

    def settle(self, rows: Rows) -> None:
        """Scatter a chunk that was written into the buffer."""
        if self.buffer is not None and self.whole is not None:
            rows.put(self.whole, self.buffer[: rows.stop - rows.start])


def allocate(problem: Problem, selection: Selection, chunks: int, dhidden: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors for the gradients of the sum; rows that no chunk visits are zero."""
    dweight = dbias = ddown = dup = None
    if problem.need_hidden and dhidden is None:
        dhidden = torch.empty_like(problem.hidden, memory_format=torch.contiguous_format)
    if dhidden is not None and selection.index is not None:
        assert problem.target is not None
        if dhidden is problem.hidden:
            dhidden.masked_fill_((problem.target == problem.ignore_index)[:, None], 0.0)
        else:
            dhidden.zero_()
    if problem.down is not None and problem.need_down:
        make = torch.empty_like if selection.index is None else torch.zeros_like
        ddown = make(problem.down, memory_format=torch.contiguous_format)
    if problem.up is not None and problem.need_up:
        dup = scratch(problem.up.shape, dweight_dtype(problem), problem.up.device)
    if problem.need_weight:
        assert problem.weight is not None
        dweight = scratch(problem.weight.shape, dweight_dtype(problem), problem.weight.device)
    if problem.need_bias:
        assert problem.bias is not None
        dbias = problem.bias.new_empty(problem.bias.shape, dtype=problem.dtype)
    if chunks == 0:
        for gradient in (dweight, dbias, dup):
            if gradient is not None:
                gradient.zero_()
    return dhidden, dweight, dbias, ddown, dup


def shapes(problem: Problem, weight_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of the shapes and dtypes that a traced operator returns; weight_dtype: of what is summed over chunks."""
    new, narrow = problem.hidden.new_empty, problem.hidden.dtype
    dtypes = (narrow, weight_dtype, problem.dtype, narrow, weight_dtype)
    return tuple(
        new(of.shape, dtype=dtype) if need and isinstance(of, Tensor) else new(0)
        for of, need, dtype in zip(problem[:GRADIENTS], problem.needs, dtypes, strict=True)
    )


def scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient * factor (0-d; None: 1), multiplied in the accumulation dtype and rounded once to `dtype`; blockwise, so
    that no second full-size tensor in the accumulation dtype appears."""
    if factor is None and gradient.dtype == dtype:
        return gradient
    out = scratch(gradient.shape, dtype, gradient.device)
    if factor is None:
        return out.copy_(gradient)
    factor = factor.reshape(1)
    step = max(1, (1 << 18) // max(1, gradient[:1].numel())) if gradient.device.type == "cpu" else max(1, len(gradient))
    for start in range(0, gradient.shape[0], step):
        torch.mul(gradient[start : start + step], factor, out=out[start : start + step])
    return out
