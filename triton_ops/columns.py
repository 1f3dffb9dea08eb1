"""Probabilities of rows of raw logits, and their sums over rows, from log-sum-exps that are known.

    q[n, v] = exp((z[n, v] - lse_n) - low_n)
    columns[g, v] += sum over the rows n of group g of weight_n q[n, v]

A column sum reads each logit once and uses no atomics: the order of its additions depends on shapes and groups alone,
so that the result has the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMN_BLOCK, COLUMN_ROWS, launch
from .row_kernel import LSE, LSE_LOW, finish
from .rows import Rows


@triton.jit(do_not_specialize=["statistics_stride"])
def column_kernel(
    logits,  # [R, V] raw
    logits_stride,
    statistics,  # [STATISTICS, R]
    statistics_stride,
    weight,  # [R] or None: all 1
    order,  # [R]: the rows by segment, or None: 0, 1, 2 ...
    starts,  # [segments + 1]: where each segment begins in `order`
    columns,  # [segments, V]
    V,
    scale,
    cap,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """columns[segment, v] += sum over the rows of a segment of weight q[row, v]. One program a block of columns and
    segment, ROWS rows a step."""
    segment = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        position = first + tl.arange(0, ROWS)
        here = position < end
        row = position.to(tl.int64)
        if order is not None:
            row = tl.load(order + position, mask=here, other=0)
        share = tl.where(here, 1.0, 0.0)
        if weight is not None:
            share = tl.load(weight + row, mask=here, other=0.0)
        counts = share != 0
        lse = tl.load(statistics + LSE * statistics_stride + row, mask=here, other=0.0)
        low = tl.load(statistics + LSE_LOW * statistics_stride + row, mask=here, other=0.0)
        inside = counts[:, None] & (at < V)[None, :]
        z = finish(
            tl.load(logits + row[:, None] * logits_stride + at[None, :], mask=inside, other=0.0), scale, cap, CAP
        )
        q = tl.exp((z - lse[:, None]) - low[:, None])
        total += tl.where(inside, share[:, None] * q, 0.0)
    columns += segment.to(tl.int64) * V + at
    tl.store(columns, tl.load(columns, mask=at < V) + tl.sum(total, 0), mask=at < V)


@triton.jit(do_not_specialize=["statistics_stride"])
def probability_kernel(
    logits, logits_stride, statistics, statistics_stride, out, V, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """out [R, V] = q, contiguous. One program a row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lse, low = (
        tl.load(statistics + LSE * statistics_stride + row),
        tl.load(statistics + LSE_LOW * statistics_stride + row),
    )
    z = finish(tl.load(logits + row * logits_stride + at, mask=at < V, other=0.0), scale, cap, CAP)
    tl.store(out + row * V + at, tl.exp((z - lse) - low), mask=at < V)


_SEGMENTS = 8  # that the rows of a single group are split into, so that few columns still fill the device


def accumulate_columns(rows: Rows, statistics: Tensor, weight: Tensor | None, columns: Tensor) -> None:
    """columns [G, V] fp32 += weight_n q_n of each group's rows; a row of weight 0 is not read."""
    count, vocab = rows.logits.shape
    if rows.group is None:
        order, sums = None, columns.new_zeros(min(_SEGMENTS, max(1, count)), vocab)
        starts = torch.arange(sums.shape[0] + 1, device=columns.device) * count // sums.shape[0]
    else:
        order, sums = torch.argsort(rows.group, stable=True), columns
        starts = torch.searchsorted(rows.group[order], torch.arange(len(columns) + 1, device=columns.device))
    launch(
        column_kernel,
        (triton.cdiv(vocab, COLUMN_BLOCK), sums.shape[0]),
        rows.logits,
        rows.logits,
        rows.logits.stride(0),
        statistics,
        statistics.stride(0),
        weight,
        order,
        starts,
        sums,
        vocab,
        rows.scale,
        rows.cap or 0.0,
        CAP=rows.cap is not None,
        ROWS=COLUMN_ROWS,
        BLOCK=COLUMN_BLOCK,
    )
    if sums is not columns:
        columns[0] += sums.sum(0)


def probabilities(rows: Rows, statistics: Tensor) -> Tensor:
    """q [R, V] fp32."""
    count, vocab = rows.logits.shape
    out = statistics.new_empty(count, vocab)
    launch(
        probability_kernel,
        (count, triton.cdiv(vocab, COLUMN_BLOCK)),
        rows.logits,
        rows.logits,
        rows.logits.stride(0),
        statistics,
        statistics.stride(0),
        out,
        vocab,
        rows.scale,
        rows.cap or 0.0,
        CAP=rows.cap is not None,
        BLOCK=COLUMN_BLOCK,
    )
    return out
