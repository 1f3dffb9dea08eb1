"""Whether one way of writing lies closer to people than another, metric by metric, over the same prompts.

    D = mean over the seeds of `other` of its distances - mean over those of `first`

distance  a metric's value where it is a distance, and the size of its difference from people where it is a difference
error     sqrt(S^2 + V_first / n_first + V_other / n_other): S, the standard deviation of D over random halves of the
          prompts, the same for all texts (the delete-d jackknife at d = n / 2, see `measure`); V, the variance of the
          distance between the n seeds of a side, which holds what training and draws change. Draws are in both: the
          error is rather too large
p         2 Phi(-abs(D) / error), and adjusted over the metrics by Holm's step-down (Scandinavian Journal of Statistics
          6(2), 1979)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import fail
from .measure import Found
from .results import DISTANCE

ALPHA = 0.05  # of the family of all metrics


@dataclass(frozen=True)
class Paired:
    """A metric of two sides: distances, their difference and its error, in the metric's unit. floor: of people."""

    metric: str
    first: float
    other: float
    difference: float
    error: float
    p: float
    adjusted: float
    floor: float

    @property
    def closer(self) -> bool:
        """`other` lies closer to people than `first`."""
        return self.difference < 0 and self.adjusted < ALPHA

    @property
    def halved(self) -> bool:
        """`other` lies at most half as far from people as `first`."""
        return self.other <= self.first / 2


def paired(first: Sequence[Sequence[Found]], other: Sequence[Sequence[Found]]) -> list[Paired]:
    """Every metric of two sides, as `measure.measured` found them in one call: a list a seed, of the same metrics in
    the same order. A metric that one of them lacks is left out. A side of one seed is given the other's variance; where
    both have one, V is 0, and the answer is of these two models alone."""
    names = {tuple(one.metric.name for one in found) for found in (*first, *other)}
    if not first or not other or len(names) != 1:
        got = f"{len(first)} and {len(other)} of {len(names)} lists of metrics"
        fail("paired", "first and other", "be of one seed or more each, and of the same metrics", got, "Measure both")
    out = [_paired(list(a), list(b)) for a, b in zip(zip(*first, strict=True), zip(*other, strict=True), strict=True)]
    return _holm([one for one in out if one is not None])


def _paired(first: list[Found], other: list[Found]) -> Paired | None:
    if any(one.value.value is None for one in (*first, *other)):
        return None
    sides = [np.stack([_distances(one) for one in side]) for side in (first, other)]  # [seeds, 1 + halves]
    means = [side.mean(0) for side in sides]
    difference = means[1] - means[0]
    known = [float(side[:, 0].var(ddof=1)) for side in sides if len(side) > 1]
    variances = [float(side[:, 0].var(ddof=1)) if len(side) > 1 else max(known, default=0.0) for side in sides]
    error = math.sqrt(
        float(difference[1:].var(ddof=1)) + sum(v / len(side) for v, side in zip(variances, sides, strict=True))
    )
    p = 2 * statistics.NormalDist().cdf(-abs(difference[0]) / error) if error > 0 else float(difference[0] == 0)
    return Paired(
        metric=first[0].metric.name,
        first=float(means[0][0]),
        other=float(means[1][0]),
        difference=float(difference[0]),
        error=error,
        p=p,
        adjusted=p,
        floor=float(first[0].value.floor or 0.0),
    )


def _distances(one: Found) -> Any:
    """Of all prompts, and of each half."""
    values = np.array([one.value.value, *one.spread])
    return values if one.metric.kind == DISTANCE else np.abs(values)


def _holm(found: list[Paired]) -> list[Paired]:
    """p times how many are left, the least one first, and never below the one before."""
    order = sorted(range(len(found)), key=lambda at: found[at].p)
    adjusted, least = [0.0] * len(found), 0.0
    for rank, at in enumerate(order):
        least = max(least, min(1.0, (len(found) - rank) * found[at].p))
        adjusted[at] = least
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]
