"""Row quantities of a vocabulary out of those of its parts.

With L_i a part's log-sum-exp, L = log sum_i exp L_i and w_i = exp(L_i - L) the mass that the model has there, all
that a part computed by its own softmax is that of the whole after a correction that cancels nowhere:

    log q_y        = log q_y^i + (L_i - L)                      of the part that y is in
    mean log q     = sum_i V_i / V (mean_i + L_i - L)
    H              = sum_i w_i (H_i - log w_i)
    <q, G>         = sum_i w_i <q^i, G_i>                       features alike
    argmax         = that of the part with the largest maximum, the first of equal ones

Every process has the quantities of all parts and computes the same numbers from them, in double precision.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends.contract import Row
from .shards import Shards

_LOW = {Row.LSE: Row.LSE_LOW, Row.SOFT_LSE: Row.SOFT_LSE_LOW, Row.TARGET_LSE: Row.TARGET_LSE_LOW}
_WITH = {Row.CORRECT: (Row.TOP,), Row.AGREEMENT: (Row.TOP, Row.TARGET_TOP)}  # what merging reads beside a quantity


@functools.cache
def exchanged(wanted: frozenset[Row], sparse: bool) -> tuple[Row, ...]:
    """The quantities of a part that merging needs, in order: LSE for nearly all, and what is wanted. sparse: the target
    is, which every process has."""
    rows = set(wanted | {Row.LSE}).union(*(_WITH.get(row, ()) for row in wanted))
    if sparse:
        rows -= {Row.TARGET_LSE, Row.TARGET_TOP}
    rows |= {low for high, low in _LOW.items() if high in rows}
    return tuple(sorted(rows))


def added(high: Tensor, low: Tensor) -> Tensor:
    """log sum_i exp of log-sum-exps [n, R] and their rounding errors: of parts in double, and that of the whole [R]."""
    parts = high.double() + low.double()
    return parts.logsumexp(0)


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A number in double as one of dtype and its rounding error."""
    high = value.to(dtype)
    return high, torch.where(high.isfinite(), value - high.double(), 0.0).to(dtype)


def merge_(own: Tensor, parts: Tensor, rows: tuple[Row, ...], shards: Shards, label: Tensor | None) -> Tensor:
    """Write into `own` [len(Row), R], a part's quantities, those of the whole, and return log w_i [n, R]. parts: the
    quantities `rows` of every part, [n, len(rows), R]; label: ids of the whole vocabulary."""
    part = {row: parts[:, number] for number, row in enumerate(rows)}  # [n, R] each
    whole: dict[Row, Tensor] = {}
    for high, low in _LOW.items():
        if high in part:
            whole[high] = added(part[high], part[low])
            own[high], own[low] = split(whole[high], own.dtype)
    share = _shares(part[Row.LSE], part[Row.LSE_LOW], whole[Row.LSE])
    _merge_moments_(own, part, share, shards, label)
    if Row.TOP in part:
        _merge_maxima_(own, part, shards, label)
    return share


def _shares(high: Tensor, low: Tensor, whole: Tensor) -> Tensor:
    """log w_i = L_i - L [n, R]; -inf of a part without mass."""
    parts = high.double() + low.double()
    return torch.where(parts == -torch.inf, -torch.inf, parts - whole)


def weighted(share: Tensor, values: Tensor) -> Tensor:
    """sum_i w_i values_i over parts [n, ...], of which those without mass may hold anything."""
    mass = share.exp()
    return torch.where(mass == 0, 0.0, mass * values.double()).sum(0)


def _merge_moments_(own: Tensor, part: dict[Row, Tensor], share: Tensor, shards: Shards, label: Tensor | None) -> None:
    if Row.LOG_PROB in part and label is not None:
        here = shards.owner(label)[None]
        log_share = share.gather(0, here)[0]
        found = part[Row.LOG_PROB].gather(0, here)[0].double() + log_share
        found = torch.where(log_share == -torch.inf, -torch.inf, found)
        own[Row.LOG_PROB] = torch.where((label >= 0) & (label < shards.total), found, torch.nan)
    if Row.MEAN_LOG_PROB in part:
        each = torch.where(share == -torch.inf, -torch.inf, part[Row.MEAN_LOG_PROB].double() + share)
        filled = ((size / shards.total, mean) for size, mean in zip(shards.sizes, each, strict=True) if size)
        own[Row.MEAN_LOG_PROB] = torch.stack([by * mean for by, mean in filled]).sum(0)
    if Row.ENTROPY in part:
        own[Row.ENTROPY] = weighted(share, part[Row.ENTROPY].double() - share)
    if Row.POTENTIAL in part:
        own[Row.POTENTIAL] = weighted(share, part[Row.POTENTIAL])


def _merge_maxima_(own: Tensor, part: dict[Row, Tensor], shards: Shards, label: Tensor | None) -> None:
    best = part[Row.TOP].argmax(0)  # of equal ones the first
    if Row.CORRECT in part and label is not None:
        found = part[Row.CORRECT].gather(0, best[None])[0]
        own[Row.CORRECT] = torch.where(shards.owner(label) == best, found, 0.0)
    if Row.AGREEMENT in part:
        own[Row.AGREEMENT] = part[Row.AGREEMENT].gather(0, best[None])[0]
        if Row.TARGET_TOP in part:
            own[Row.AGREEMENT].masked_fill_(part[Row.TARGET_TOP].argmax(0) != best, 0.0)
