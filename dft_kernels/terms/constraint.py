"""Terms as constraints: the loss subject to J at most a bound, by a dual weight."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..errors import fail
from .base import DistributionTerm, Statistics

_DECLARED = ("columns", "text", "entropy", "log_prob", "divergence", "reads", "linear", "size", "vocab", "features")


class AtMost(DistributionTerm):
    """min loss subject to J <= bound: the term lambda (J - bound) / gain, whose dual weight lambda rises while J is
    above the bound and falls below it, never under 0 and never over `most`.

        lambda <- lambda + rate min(1, J / bound - 1),   J of the running means, once a step (`Delayed.update`)

    Dual ascent on the Lagrangian (Boyd and Vandenberghe, Convex Optimization, 2004, section 5), with steps and a weight
    that are bounded. lambda is a weight in 1 / gain: at 1 the term pulls as hard as cross-entropy holds, whatever J's
    units are, and 0 at the end says that the constraint does not bind. Running means are late: a weight far above 1
    makes a model swing about the target, which is a J above the bound again, and a weight that follows it would wind
    up without end. So a bound out of reach is met as nearly as a weight of `most` takes the model to it. lambda stands
    still while the running means are of fewer steps than they look back on, whose noise alone is many times a bound.
    The bound of choice is the noise floor (`noise_floor`): closer than human writing is to itself means nothing.

    term: a `DistributionTerm` that is no sum; bound: above 0, in the units of J; gain: the term's (`gains`), above 0;
    rate: what lambda rises by in a step where J is twice the bound or more; most: above 0, of lambda; start: lambda
    before the first step. Use it in `Delayed` or `OnPolicy`: `exact` leaves lambda as it is.
    """

    def __init__(
        self,
        term: DistributionTerm,
        bound: float,
        gain: float,
        rate: float = 0.01,
        most: float = 0.5,
        start: float = 0.0,
    ) -> None:
        parts = getattr(term, "parts", None)
        if not isinstance(term, DistributionTerm) or isinstance(term, AtMost) or parts is not None:
            got = "a sum" if parts is not None else type(term).__name__
            fail("AtMost", "term", "be one DistributionTerm, without a weight", got, "Bound each of them", TypeError)
        given = {"bound": bound, "gain": gain, "rate": rate, "most": most, "start": start}
        remedies = {"bound": "See noise_floor", "gain": "See gains", "start": "Leave it out, or raise most"}
        for name, value in given.items():
            known: Any = value
            number = isinstance(known, (int, float)) and not isinstance(known, bool) and math.isfinite(known)
            if not number or known < 0 or (known == 0 and name != "start") or (name == "start" and known > most):
                relation = f"lie in 0..{most:g}" if name == "start" else "be a finite number above 0"
                fail("AtMost", name, relation, repr(value), remedies.get(name, "Leave it out"))
        self.term, self.bound, self.gain = term, float(bound), float(gain)
        self.rate, self.most, self.dual = float(rate), float(most), float(start)
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
        """lambda (J - bound) / gain."""
        return self.dual / self.gain * (self.term.value(mean, share) - self.bound)

    def rise(self, mean: Tensor, share: Tensor, settled: bool = True) -> None:
        """A step of dual ascent from the J of these means; none where it is not finite, or these are not settled. One
        host synchronisation."""
        ratio = float(self.term.value(mean, share)) / self.bound
        if math.isfinite(ratio):
            self.ratio = ratio
            if settled:
                self.dual = min(self.most, max(0.0, self.dual + self.rate * min(1.0, ratio - 1)))
