"""Multiplication of a finished gradient by a factor that only the device knows.

    x *= factor

In the usual case, loss.backward(), the factor is 1: every program then reads that one number and returns.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import SCALE_BLOCK, launch


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    """x [count] *= factor [1], in fp32, rounded once. One program a block."""
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        tl.store(x + at, (tl.load(x + at, mask=inside, other=0.0) * by).to(x.dtype.element_ty), mask=inside)


def scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor, of one number of fp32. x: contiguous, of any floating dtype but fp64."""
    launch(scale_kernel, (triton.cdiv(x.numel(), SCALE_BLOCK),), x, x, factor, x.numel(), BLOCK=SCALE_BLOCK)
