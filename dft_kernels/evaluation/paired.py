"""Whether one way of writing lies closer to people than another, metric by metric, over the same prompts.

    D = mean over the seeds of `other` of its distances - mean over those of `first`

distance  a metric's value where it is a distance, not below 0, and the size of its difference from people where it is a
          difference
error     sqrt(S^2 + V / n_first + V / n_other): S, the standard deviation of D over random halves of the prompts, the
          same for all texts (the delete-d jackknife at d = n / 2, see `measure`); V, the variance of a distance between
          the seeds of one arm, pooled over the arms that have several, which training and draws make
p         two-sided, of Student's t at D / error, its degrees of freedom by Satterthwaite (Biometrics Bulletin 2(6),
          1946): those of S are the prompts less 1, those of V the seeds less the arms
adjusted  by Holm's step-down (Scandinavian Journal of Statistics 6(2), 1979), over a whole family of comparisons
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ..errors import fail
from .measure import Found
from .results import DISTANCE

ALPHA = 0.05  # of a family
Arm = Sequence[Sequence[Found]]  # a list a seed, of the same metrics in the same order


class Seeds(NamedTuple):
    """The variance of a metric's distance between seeds, and its degrees of freedom; 0 and 0 where nothing is known."""

    variance: float
    freedom: int


@dataclass(frozen=True)
class Paired:
    """A metric of two sides: distances, their difference and its error, in the metric's unit, and p, 1 where a side has
    no number. floor: of people. adjusted: of a family that `holm` was told of."""

    metric: str
    first: float | None
    other: float | None
    difference: float | None
    error: float | None
    p: float
    adjusted: float
    floor: float | None

    @property
    def closer(self) -> bool:
        """`other` lies closer to people than `first`."""
        return self.difference is not None and self.difference < 0 and self.adjusted < ALPHA

    @property
    def halved(self) -> bool:
        """`first` lies beyond what people differ by from people, and `other`, which is closer, at most half as far."""
        if self.first is None or self.other is None or not self.floor:
            return False
        return self.closer and self.first > self.floor and self.other <= self.first / 2


def between_seeds(arms: Sequence[Arm]) -> dict[str, Seeds]:
    """By metric, pooled over the arms that have several seeds."""
    out: dict[str, Seeds] = {}
    for name in dict.fromkeys(one.metric.name for arm in arms for found in arm for one in found):
        squares, freedom = 0.0, 0
        for arm in arms:
            its = [one for found in arm for one in found if one.metric.name == name]
            known = [float(_distances(one)[0]) for one in its if one.value.value is not None]
            squares += float(np.square(np.array(known) - np.mean(known)).sum()) if known else 0.0
            freedom += max(0, len(known) - 1)
        out[name] = Seeds(squares / freedom if freedom else 0.0, freedom)
    return out


def paired(first: Arm, other: Arm, seeds: dict[str, Seeds]) -> list[Paired]:
    """Every metric of two sides, as `measure.measured` found them in one call. seeds: of `between_seeds`; where it
    knows nothing the answer is of these models alone, and says nothing of others of their arms."""
    names = {tuple(one.metric.name for one in found) for found in (*first, *other)}
    if not first or not other or len(names) != 1:
        got = f"{len(first)} and {len(other)} of {len(names)} lists of metrics"
        fail("paired", "first and other", "be of one seed or more each, and of the same metrics", got, "Measure both")
    each = zip(zip(*first, strict=True), zip(*other, strict=True), strict=True)
    return [_paired(a, b, seeds.get(a[0].metric.name, Seeds(0.0, 0))) for a, b in each]


def _paired(first: Sequence[Found], other: Sequence[Found], seeds: Seeds) -> Paired:
    name, floor = first[0].metric.name, first[0].value.floor
    if any(one.value.value is None for one in (*first, *other)):
        return Paired(name, None, None, None, None, 1.0, 1.0, floor)
    means = [np.stack([_distances(one) for one in side]).mean(0) for side in (first, other)]  # [1 + halves]
    difference = means[1] - means[0]
    halves = float(difference[1:].var(ddof=1))
    drawn = seeds.variance * (1 / len(first) + 1 / len(other))
    squares = halves**2 / max(1, first[0].value.documents - 1) + (drawn**2 / seeds.freedom if seeds.freedom else 0.0)
    error, d = math.sqrt(halves + drawn), float(difference[0])
    freedom = (halves + drawn) ** 2 / squares if squares > 0 else math.inf
    p = float(2 * stats.t.sf(abs(d) / error, freedom)) if error > 0 else float(d == 0)
    return Paired(name, float(means[0][0]), float(means[1][0]), d, error, p, p, floor)


def _distances(one: Found) -> Any:
    """Of all prompts, and of each half."""
    values = np.array([one.value.value, *one.spread])
    return values.clip(min=0) if one.metric.kind == DISTANCE else np.abs(values)


def holm(found: Sequence[Paired]) -> list[Paired]:
    """A whole family, `adjusted` over all of it: p times how many are left, the least one first, and never below the
    one before."""
    adjusted, least = [0.0] * len(found), 0.0
    for rank, at in enumerate(sorted(range(len(found)), key=lambda at: found[at].p)):
        least = max(least, min(1.0, (len(found) - rank) * found[at].p))
        adjusted[at] = least
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]
