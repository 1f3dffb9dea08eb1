"""Terms as constraints: the loss subject to J at most a bound, by a dual weight."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..errors import fail
from .base import DistributionTerm, Statistics

_DECLARED = ("columns", "text", "entropy", "log_prob", "divergence", "reads", "linear", "size", "vocab", "features")


class AtMost(DistributionTerm):
    """min loss subject to J <= bound: the term lambda (J / bound - 1), whose dual weight lambda rises while J is above
    the bound and falls below it, never under 0.

        lambda <- max(0, lambda + rate (J / bound - 1)),   J of the running means, once a step (`Delayed.update`)

    So lambda is in units of the loss, whatever J's are, and 0 at the end where the constraint does not bind: dual
    ascent on the Lagrangian (Boyd and Vandenberghe, Convex Optimization, 2004, section 5). The bound of choice is the
    noise floor (`noise_floor`): closer than human writing is to itself means nothing.

    term: a `DistributionTerm` that is no sum; bound: above 0, in the units of J; rate: per step, of a gap as large as
    the bound; start: lambda before the first step. Use it in `Delayed` or `OnPolicy`: `exact` leaves lambda as it is.
    """

    def __init__(self, term: DistributionTerm, bound: float, rate: float = 0.002, start: float = 0.0) -> None:
        parts = getattr(term, "parts", None)
        if not isinstance(term, DistributionTerm) or isinstance(term, AtMost) or parts is not None:
            got = "a sum" if parts is not None else type(term).__name__
            fail("AtMost", "term", "be one DistributionTerm, without a weight", got, "Bound each of them", TypeError)
        for name, value, least in (
            ("bound", bound, "above 0"),
            ("rate", rate, "above 0"),
            ("start", start, "0 or more"),
        ):
            known: Any = value
            number = isinstance(known, (int, float)) and not isinstance(known, bool) and math.isfinite(known)
            if not number or known < 0 or (known == 0 and name != "start"):
                fail("AtMost", name, f"be a number {least}", repr(value), "See noise_floor for a bound")
        self.term, self.bound, self.rate, self.dual = term, float(bound), float(rate), float(start)
        self.ratio: float | None = None  # J / bound, of the last step
        for name in _DECLARED:
            setattr(self, name, getattr(term, name))

    @property
    def name(self) -> str:
        """The bounded term's."""
        return self.term.name

    def on(self, device: Any) -> None:
        """Move both there."""
        super().on(device)
        self.term.on(device)

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The bounded term's."""
        return self.term.moments(statistics)

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """lambda (J / bound - 1)."""
        return self.dual * (self.term.value(mean, share) / self.bound - 1)

    def rise(self, mean: Tensor, share: Tensor) -> None:
        """A step of dual ascent from the J of these means; none where it is not finite. One host synchronisation."""
        ratio = float(self.term.value(mean, share)) / self.bound
        if math.isfinite(ratio):
            self.ratio, self.dual = ratio, max(0.0, self.dual + self.rate * (ratio - 1))
