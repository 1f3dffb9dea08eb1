"""Intervals over documents, from random halves of them."""

from __future__ import annotations

from typing import Any

import numpy as np

FEW = 20  # documents, below which an interval means nothing
MASS = 0.95  # that an interval holds


def quantiles(drawn: Any, at: Any) -> Any:
    """Of draws, along the first dimension: by numpy's default the outer ones of 200 would hold 94 % and not 95."""
    return np.quantile(drawn, at, axis=0, method="weibull")


def interval(whole: Any, drawn: Any) -> tuple[Any, Any]:
    """Around the values `whole`, by how far those of halves [R, ...] lie off their mean: a half without replacement
    deviates from the whole as the whole does from what it is drawn from, which is the delete-d jackknife at d = n / 2
    (Shao and Wu, Annals of Statistics 17, 1989)."""
    low, high = whole + quantiles(drawn - drawn.mean(0), ((1 - MASS) / 2, (1 + MASS) / 2))
    return low, high
