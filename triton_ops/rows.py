"""Launches of the row kernel: the description of rows, and the three ways to run it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import DIVERGENCES, FLAT, sums
from .launch import launch, row_block
from .row_kernel import (
    AT_ONE,
    HAS_AGREEMENT,
    HAS_CORRECT,
    HAS_DIVERGENCE,
    HAS_ENTROPY,
    HAS_LOG_PROB,
    HAS_LSE,
    HAS_POTENTIAL,
    HAS_SOFT_LSE,
    STATISTICS,
    row_kernel,
)


@dataclass(frozen=True)
class Rows:
    """Rows of raw logits of any floating dtype, how they are finished (z = cap tanh(scale raw / cap)), and the target
    that they are compared with. logits and target may have any row stride; their stride along V is 1."""

    logits: Tensor  # [R, V] raw
    scale: float = 1.0
    cap: float | None = None
    label: Tensor | None = None  # [R] int64; outside 0..V-1: LOG_PROB = NaN
    group: Tensor | None = None  # [R] int64
    potential: Tensor | None = None  # [G, V] fp32, contiguous
    target: Tensor | None = None  # [R, V] raw
    target_scale: float = 1.0
    target_cap: float | None = None
    divergence: str = "forward_kl"
    parameter: float = 0.0
    temperature: float = 1.0
    target_temperature: float = 1.0


def row_statistics(rows: Rows, wanted: int, live: int) -> Tensor:
    """The statistics [STATISTICS, R] in fp32: those whose bit is in `wanted`, LSE, and what the gradient of those in
    `live` needs; 0 for the others. SOFT_LSE's bit stands for the log-sum-exps of a divergence without its sums."""
    statistics = _empty_statistics(rows)
    _launch(rows, statistics, wanted | HAS_LSE.value, live, None, None, None)
    return statistics


def row_divergence(rows: Rows, statistics: Tensor, live: int) -> None:
    """The sums of a divergence over these columns into `statistics`, under the log-sum-exps that these hold."""
    _launch(rows, statistics, HAS_DIVERGENCE.value, live, None, None, None, given=True)


def row_gradient(
    rows: Rows, statistics: Tensor, live: int, cotangents: Tensor, lse_slope: Tensor | None, out: Tensor
) -> None:
    """out [R, V] = d / d(raw logits), of any floating dtype, from what `row_statistics` returned.

    cotangents [6, R] fp32 of LOG_PROB to POTENTIAL, LSE's being cotangents[LSE] + lse_slope * LSE where lse_slope [R]
    is given. A row of `out` may share the memory of its own row of logits: all of it in the same dtype, or its upper
    half.
    """
    _launch(rows, statistics, 0, live, cotangents, lse_slope, out)


def row_step(rows: Rows, wanted: int, live: int, cotangents: Tensor, lse_slope: Tensor | None, out: Tensor) -> Tensor:
    """row_statistics and row_gradient in one launch; returns the statistics."""
    statistics = _empty_statistics(rows)
    _launch(rows, statistics, wanted, live, cotangents, lse_slope, out)
    return statistics


def _empty_statistics(rows: Rows) -> Tensor:
    return torch.zeros(STATISTICS, rows.logits.shape[0], dtype=torch.float32, device=rows.logits.device)


def _reach(rows: Tensor) -> int:
    """How far a row may be read: to the next multiple of 16 where every row has that much memory, else V."""
    count, vocab = rows.shape
    reach = -(-vocab // 16) * 16
    last = rows.storage_offset() + (count - 1) * rows.stride(0) + reach
    fits = rows.stride(0) >= reach and last * rows.element_size() <= rows.untyped_storage().nbytes()
    return reach if fits else vocab


def _launch(
    rows: Rows,
    statistics: Tensor,
    wanted: int,
    live: int,
    cotangents: Tensor | None,
    lse_slope: Tensor | None,
    out: Tensor | None,
    given: bool = False,
) -> None:
    count, vocab = rows.logits.shape
    if wanted & AT_ONE.value:
        wanted |= HAS_LSE.value
    asked = wanted | live
    labelled = asked & (HAS_LOG_PROB.value | HAS_CORRECT.value)
    pulled = asked & HAS_POTENTIAL.value
    compared = asked & (HAS_DIVERGENCE.value | HAS_SOFT_LSE.value)
    taught = compared or wanted & HAS_AGREEMENT.value
    same = rows.temperature == 1.0
    sums_beside = wanted & (HAS_ENTROPY.value | HAS_POTENTIAL.value | HAS_CORRECT.value | HAS_AGREEMENT.value)
    sums_twice = compared and not same and wanted & AT_ONE.value
    capped = rows.cap is not None or rows.target_cap is not None
    in_place = out is not None and out.untyped_storage().data_ptr() == rows.logits.untyped_storage().data_ptr()
    target = rows.target if taught else None
    launch(
        row_kernel,
        (count,),
        rows.logits,
        rows.logits,
        rows.logits.stride(0),
        _reach(rows.logits),
        target,
        0 if target is None else target.stride(0),
        0 if target is None else _reach(target),
        out,
        0 if out is None else out.stride(0),
        statistics,
        statistics.stride(0),
        cotangents,
        0 if cotangents is None else cotangents.stride(0),
        lse_slope,
        rows.label if labelled else None,
        rows.group if pulled else None,
        rows.potential if pulled else None,
        vocab,
        rows.scale,
        rows.cap or 0.0,
        rows.target_scale,
        rows.target_cap or 0.0,
        1.0 / rows.temperature,
        1.0 / rows.target_temperature,
        rows.parameter,
        PAIR=DIVERGENCES[rows.divergence] if compared else None,
        SUMS=sums(rows.divergence) if compared else FLAT,
        SAME=same,
        CAP=rows.cap is not None,
        TARGET_CAP=rows.target_cap is not None,
        WANTED=wanted,
        GIVEN=given,
        LIVE=live,
        GRADIENT=out is not None,
        IN_PLACE=in_place,
        BLOCK=row_block(vocab, bool(compared), bool(sums_beside or sums_twice or capped)),
    )
