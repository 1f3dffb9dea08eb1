"""Buffers for the gradients of a call: of the first fields of a `Problem`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Backend
from ..backends.extension import scratch
from ..teachers.contract import Rows
from .problem import GRADIENTS, Problem
from .selection import Selection


class RowGradient:
    """The gradient of a tensor of rows [N, .], written chunk by chunk: into the tensor itself, or, where ignored rows
    make a chunk's rows non-contiguous, into a buffer that is scattered afterwards: after each chunk, or, where chunks
    are complete with the last alone (overlaps), once."""

    def __init__(self, whole: Tensor | None, selection: Selection, size: int, overlaps: bool) -> None:
        self.whole, self.index, self.overlaps = whole, selection.index, overlaps
        self.buffer: Tensor | None = None
        if whole is not None and selection.index is not None:
            self.buffer = whole.new_empty(selection.count if overlaps else size, whole.shape[1])

    def of(self, rows: Rows) -> Tensor | None:
        """Where a chunk writes."""
        if self.buffer is not None:
            start = rows.start if self.overlaps else 0
            return self.buffer[start : start + rows.stop - rows.start]
        return None if self.whole is None else rows.take(self.whole)

    def settle(self, rows: Rows) -> None:
        """Scatter a chunk that was written into the buffer."""
        if self.buffer is not None and self.whole is not None and not self.overlaps:
            rows.put(self.whole, self.buffer[: rows.stop - rows.start])

    def finish(self) -> None:
        """Scatter what waited for the last chunk."""
        if self.buffer is not None and self.whole is not None and self.index is not None and self.overlaps:
            self.whole.index_copy_(0, self.index, self.buffer)


def allocate(
    problem: Problem, selection: Selection, products: int, dhidden: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Tensors for the gradients; rows that no chunk visits are zero. products: how many dweight is the sum of; only
    several need the accumulation dtype."""
    dweight = dbias = ddown = dup = None
    summed = problem.hidden.dtype if products <= 1 and problem.folds else problem.dtype
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
        dup = scratch(problem.up.shape, summed, problem.up.device)
    if problem.need_weight:
        assert problem.weight is not None
        dweight = scratch(problem.weight.shape, summed, problem.weight.device)
    if problem.need_bias:
        assert problem.bias is not None
        dbias = problem.bias.new_empty(problem.bias.shape, dtype=problem.dtype)
    if products == 0:
        for gradient in (dweight, dbias, dup):
            if gradient is not None:
                gradient.zero_()
    return dhidden, dweight, dbias, ddown, dup


def rounded(problem: Problem, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a call as they are saved: in the input dtype, but in fp16, where they are still sums."""
    if not problem.folds:
        return tuple(gradients)
    return tuple(None if g is None else scaled(g, None, problem.hidden.dtype) for g in gradients)


def shapes(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Of the shapes and dtypes that a traced operator returns: `dtype`, None: those of `rounded`."""
    new, narrow = problem.hidden.new_empty, problem.hidden.dtype
    sums = narrow if problem.folds else problem.dtype
    dtypes = (narrow, sums, sums, narrow, sums)
    return tuple(
        new(of.shape, dtype=dtype or saved) if need and isinstance(of, Tensor) else new(0)
        for of, need, saved in zip(problem[:GRADIENTS], problem.needs, dtypes, strict=True)
    )


def scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient * factor (0-d; None: 1), multiplied in the accumulation dtype and rounded once to `dtype`."""
    if factor is None and gradient.dtype == dtype:
        return gradient
    out = scratch(gradient.shape, dtype, gradient.device)
    return out.copy_(gradient) if factor is None else _multiplied(gradient, factor, out)


def scaled_(backend: Backend[Any], gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled`, of a gradient that nobody reads again: in place, and nothing at all where the factor is 1, which a
    device finds out by itself."""
    if gradient.dtype != dtype:
        return scaled(gradient, factor, dtype)
    if gradient.device.type == "cpu":
        return gradient if factor.item() == 1.0 else _multiplied(gradient, factor, gradient)
    backend.scale_(gradient, factor.reshape(1))
    return gradient


def _multiplied(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """On a CPU blockwise, so that no second full-size tensor in the accumulation dtype appears. The factor is 1-d, or
    torch would round it to the dtype of the gradient."""
    factor, step = factor.reshape(1), max(1, len(gradient))
    if gradient.device.type == "cpu":
        step = max(1, (1 << 18) // max(1, gradient[:1].numel()))
    for start in range(0, len(gradient), step):
        torch.mul(gradient[start : start + step], factor, out=out[start : start + step])
    return out
