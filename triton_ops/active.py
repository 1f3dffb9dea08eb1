"""The products of some columns of dlogits, where the device alone knows which and how many.

Columns are numbered by `order`, int64 of a multiple of 16, in which a number of V or more stands for no column. A span
is int64 [2] on the device, (begin, end), multiples of 16: the places of `order` that are meant. A program that has none
of them returns at once, so that an empty span costs a launch and no more. No atomics: the same bits every time.

    spread          sum_r D_rv^2 and sum_r |D_rv| norm_r of every column
    gather          columns[r, i] = D[r, order[i]]
    add_dhidden     out[r] += sum over the span of columns[r, i] weight[order[i]]
    add_dweight     out[order[i]] += sum over r of columns[r, i] hidden[r]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMN_BLOCK, COLUMN_ROWS, SPREAD_SEGMENTS, launch, product_tile


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """total + left right, in the dtype of `left`, or in fp32."""
    if WIDE:
        left = left.to(tl.float32)
    return tl.dot(left, right.to(left.dtype), total, input_precision=PRECISION)


@triton.jit
def spread_kernel(
    dlogits, dlogits_stride, norms, out, R, V, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out [2, SEGMENTS, V]: both sums over a segment of the rows. One program a block of columns and segment."""
    segment = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    squares, reached = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(segment * ROWS, R, SEGMENTS * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < R)[:, None] & (at < V)[None, :]
        x = tl.load(dlogits + row[:, None] * dlogits_stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += x * x
        reached += tl.abs(x) * tl.load(norms + row, mask=row < R, other=0.0)[:, None]
    out += segment.to(tl.int64) * V + at
    tl.store(out, tl.sum(squares, 0), mask=at < V)
    tl.store(out + SEGMENTS * V, tl.sum(reached, 0), mask=at < V)


@triton.jit
def gather_kernel(
    dlogits, dlogits_stride, order, span, columns, columns_stride, R, V, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """columns[r, i] = D[r, order[i]], 0 where that is no column. One program a block of the span and ROWS rows."""
    begin, end = tl.multiple_of(tl.load(span), 16), tl.multiple_of(tl.load(span + 1), 16)
    first = begin + tl.program_id(0) * BLOCK
    if first < end:
        at = first + tl.arange(0, BLOCK)
        column = tl.load(order + at, mask=at < end, other=V)
        row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        wanted = (row < R)[:, None] & (column < V)[None, :]
        x = tl.load(dlogits + row[:, None] * dlogits_stride + column[None, :], mask=wanted, other=0.0)
        tl.store(
            columns + row[:, None] * columns_stride + at[None, :], x, mask=(row < R)[:, None] & (at < end)[None, :]
        )


@triton.jit
def dhidden_kernel(
    columns,
    columns_stride,
    order,
    span,
    weight,  # [V, H]
    weight_stride,
    out,  # [R, H] fp32
    out_stride,
    R,
    H,
    V,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out[r] += sum over the span of columns[r, i] weight[order[i]]. One program a tile [M, N] of `out`."""
    begin, end = tl.multiple_of(tl.load(span), 16), tl.multiple_of(tl.load(span + 1), 16)
    if begin < end:
        row = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
        at = tl.program_id(0) * N + tl.arange(0, N)
        into = out + row[:, None] * out_stride + at[None, :]
        written = (row < R)[:, None] & (at < H)[None, :]
        total = tl.load(into, mask=written, other=0.0)
        for first in range(begin, end, K):
            place = first + tl.arange(0, K)
            column = tl.load(order + place, mask=place < end, other=V)
            inside = (row < R)[:, None] & (place < end)[None, :]
            left = tl.load(columns + row[:, None] * columns_stride + place[None, :], mask=inside, other=0.0)
            inside = (column < V)[:, None] & (at < H)[None, :]
            right = tl.load(weight + column[:, None] * weight_stride + at[None, :], mask=inside, other=0.0)
            total = _dot(left, right, total, PRECISION, WIDE)
        tl.store(into, total, mask=written)


@triton.jit
def dweight_kernel(
    columns,
    columns_stride,
    order,
    span,
    hidden,  # [R, H]
    hidden_stride,
    out,  # [V, H]
    out_stride,
    change,  # [tiles of the whole order, tiles of H] fp32
    R,
    H,
    V,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out[order[i]] += sum over r of columns[r, i] hidden[r], over the span; change: of the sum of squares of `out`.
    One program a tile [M, N]."""
    begin, end = tl.multiple_of(tl.load(span), 16), tl.multiple_of(tl.load(span + 1), 16)
    first = begin + tl.program_id(1) * M
    if first < end:
        place = first + tl.arange(0, M)
        at = tl.program_id(0) * N + tl.arange(0, N)
        column = tl.load(order + place, mask=place < end, other=V)
        into = out + column[:, None] * out_stride + at[None, :]
        written = (column < V)[:, None] & (at < H)[None, :]
        total = tl.load(into, mask=written, other=0.0).to(tl.float32)
        before = tl.sum(total * total)
        for start in range(0, R, K):
            row = start + tl.arange(0, K).to(tl.int64)
            inside = (row < R)[:, None] & (place < end)[None, :]
            left = tl.load(columns + row[:, None] * columns_stride + place[None, :], mask=inside, other=0.0)
            inside = (row < R)[:, None] & (at < H)[None, :]
            right = tl.load(hidden + row[:, None] * hidden_stride + at[None, :], mask=inside, other=0.0)
            total = _dot(tl.trans(left), right, total, PRECISION, WIDE)
        tl.store(into, total.to(out.dtype.element_ty), mask=written)
        grown = tl.sum(tl.where(written, total * total, 0.0)) - before
        tl.store(change + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), grown)


def spread(dlogits: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """sum_r D_rv^2 and sum_r |D_rv| norm_r [V] in fp32, of dlogits [R, V] and norms [R] in fp32."""
    count, vocab = dlogits.shape
    out = norms.new_empty(2, SPREAD_SEGMENTS, vocab)
    grid = (triton.cdiv(vocab, COLUMN_BLOCK), SPREAD_SEGMENTS)
    launch(
        spread_kernel,
        grid,
        dlogits,
        dlogits,
        dlogits.stride(0),
        norms,
        out,
        count,
        vocab,
        SEGMENTS=SPREAD_SEGMENTS,
        ROWS=COLUMN_ROWS,
        BLOCK=COLUMN_BLOCK,
    )
    squares, reached = out.sum(1)
    return squares, reached


def gather(dlogits: Tensor, order: Tensor, span: Tensor, columns: Tensor) -> None:
    """columns [R, len(order)] at the span, from dlogits [R, V]."""
    count, vocab = dlogits.shape
    launch(
        gather_kernel,
        (triton.cdiv(len(order), COLUMN_BLOCK), triton.cdiv(count, COLUMN_ROWS)),
        dlogits,
        dlogits,
        dlogits.stride(0),
        order,
        span,
        columns,
        columns.stride(0),
        count,
        vocab,
        ROWS=COLUMN_ROWS,
        BLOCK=COLUMN_BLOCK,
    )


def add_dhidden(columns: Tensor, order: Tensor, span: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [R, H] fp32 += columns at the span, times the rows of weight [V, H] that they are of."""
    (count, width), vocab = out.shape, len(weight)
    tile = product_tile(columns, gathers=True)
    launch(
        dhidden_kernel,
        (triton.cdiv(width, tile["N"]), triton.cdiv(count, tile["M"])),
        out,
        columns,
        columns.stride(0),
        order,
        span,
        weight,
        weight.stride(0),
        out,
        out.stride(0),
        count,
        width,
        vocab,
        **tile,
    )


def add_dweight(columns: Tensor, order: Tensor, span: Tensor, hidden: Tensor, out: Tensor) -> Tensor:
    """out [V, H] += columns.T at the span, times hidden [R, H], in the rows that they are of; by how much that changes
    the sum of squares of `out`, 0-d in fp64."""
    (count, width), vocab = hidden.shape, len(out)
    tile = product_tile(columns, gathers=False)
    grid = (triton.cdiv(width, tile["N"]), triton.cdiv(len(order), tile["M"]))
    change = torch.zeros(grid, dtype=torch.float32, device=out.device)
    launch(
        dweight_kernel,
        grid,
        out,
        columns,
        columns.stride(0),
        order,
        span,
        hidden,
        hidden.stride(0),
        out,
        out.stride(0),
        change,
        count,
        width,
        vocab,
        **tile,
    )
    return change.sum(dtype=torch.float64)
