"""Temperatures of a row's own, from the entropy of its distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import fail
from .native import computed
from .steps import Step

ITERATIONS = 8  # of Newton's method at most
CLOSE = 2e-5  # nats to the entropy that is asked for
LEAST = 0.05  # temperature: below it a row is its likeliest token all the same
_FLOOR = -1e4  # of a score below the row's largest: at any temperature that is allowed, a probability of 0
_MOST = 100.0  # temperature that may be allowed


class EntropyTemperature(Step):
    """T = temperature base^(theta / H), H the entropy of softmax(scores) in nats: the surer a row, the colder (EDT,
    Zhang et al., arXiv:2403.14541).

    theta: at least 0; 0, the default, is a fixed temperature. base: in 0..1, the paper's 0.8. No row goes below a
    temperature of 0.05. Cost: by the C++ kernel two exponentials a score; else a softmax, a log-softmax and six passes
    over [B, V].
    """

    place = "entropy"

    def __init__(self, theta: float = 0.0, temperature: float = 1.0, base: float = 0.8) -> None:
        _finite("EntropyTemperature", "theta", theta, 0.0, math.inf)
        _finite("EntropyTemperature", "temperature", temperature, LEAST, _MOST)
        if not 0 < base < 1:
            fail("EntropyTemperature", "base", "lie between 0 and 1", base, "The paper's is 0.8")
        self.theta, self.temperature, self.base = float(theta), float(temperature), float(base)

    @property
    def idle(self) -> bool:
        """Where T is 1 in every row."""
        return self.theta == 0 and self.temperature == 1

    def step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See Step."""
        log_t, pull = math.log(self.temperature), self.theta * math.log(self.base)
        made = computed("scores_by_entropy", scores, log_t, pull, math.log(LEAST))
        if made is not None:
            return made
        below, z = _below_largest(scores)
        entropy, _ = _at(z, torch.zeros_like(z[:, :1]))
        return _drawn(below, (pull / entropy.clamp_min(1e-6) + log_t).clamp(min=math.log(LEAST)))

    def __repr__(self) -> str:
        return f"EntropyTemperature(T = {self.temperature:g} * {self.base:g}^({self.theta:g} / H))"


class Diversity(Step):
    """Each row at the temperature T at which its entropy is (1 + d) times what it is at 1, as far as it can be:

        H(softmax(scores / T)) = H(softmax(scores)) (1 + d),   0.05 <= T <= most

    of the tokens that are left: truncate first, or a high T finds what is wrong in the tail. By Newton's method in
    log T on log H, dH / dlog T = Var_T(scores) / T^2 (an exponential family: dH/dT = Var / T^3), bracketed, in 8 steps
    at most: to 1e-4 nats of rows that models make; of one likely token over a long flat tail, whose entropy jumps, as
    near as bisection comes. A row whose entropy cannot be had, log n of n tokens at most, is at the limit of T.

    d: above -1; 0, the default, leaves the model as it is. most: T at most, above 1.
    Cost: by the C++ kernel an exponential a score for the entropy, and for each step; else a softmax and five passes
    over [B, V] for these, and a log-softmax.
    """

    place = "entropy"

    def __init__(self, d: float = 0.0, most: float = 2.0) -> None:
        _finite("Diversity", "d", d, -1.0, math.inf)
        _finite("Diversity", "most", most, 1.0, _MOST)
        self.d, self.most = float(d), float(most)

    @property
    def idle(self) -> bool:
        """Where T is 1 in every row."""
        return self.d == 0

    def step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See Step."""
        limits = (math.log(LEAST), 0.0) if self.d < 0 else (0.0, math.log(self.most))
        made = computed("scores_at_entropy", scores, 1 + self.d, *limits, ITERATIONS, CLOSE)
        if made is not None:
            return made
        below, z = _below_largest(scores)
        entropy, slope = _at(z, torch.zeros_like(z[:, :1]))
        return _drawn(below, solved(z, entropy * (1 + self.d), entropy, slope, limits))

    def __repr__(self) -> str:
        return f"Diversity(H = {1 + self.d:g} * H, T <= {self.most:g})"


def solved(z: Tensor, goal: Tensor, entropy: Tensor, slope: Tensor, limits: tuple[float, float]) -> Tensor:
    """log T [B, 1] within limits at which rows z [B, V] (at most 0, 0 their largest) have an entropy of goal [B, 1].
    entropy, slope: at T = 1, as `_at` has them."""
    low, high = (torch.full_like(goal, limit) for limit in limits)
    x, edge = torch.zeros_like(goal), torch.where(goal > entropy, high, low)  # what T may not go beyond
    untried = torch.ones_like(goal, dtype=torch.bool)
    for number in range(ITERATIONS):
        if number:
            entropy, slope = _at(z, x)
        over = entropy > goal
        low, high = torch.where(over, low, x), torch.where(over, x, high)
        found = ((entropy - goal).abs() <= CLOSE) | (low >= high)
        if z.device.type == "cpu" and bool(found.all()):
            break  # to ask a GPU would be to wait for it
        untried &= x != edge
        # in log H: of a row with one likely token, H falls by powers as T does
        there = x + (goal.clamp_min(1e-30) / entropy.clamp_min(1e-30)).log() * entropy / slope.clamp_min(1e-30)
        beyond = torch.where(edge > 0, there >= edge, there <= edge) & untried
        there = torch.where((there > low) & (there < high), there, (low + high) / 2)
        x = torch.where(found, x, torch.where(beyond, edge, there))
    return x


def _below_largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less the row's largest, and the same without -inf."""
    below = scores - scores.amax(-1, keepdim=True)
    return below, below.clamp(min=_FLOOR)


def _at(z: Tensor, log_temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of softmax(z / T) in nats and its derivative in log T, [B, 1] each."""
    cold = (-log_temperature).exp()
    mass = (z * cold).softmax(-1)
    log_sum = -mass.amax(-1, keepdim=True).log()  # of z / T, of which the largest is 0
    first = torch.linalg.vecdot(mass, z)[:, None]
    second = torch.linalg.vecdot(mass.mul_(z), z)[:, None]
    return log_sum - cold * first, cold.square() * (second - first.square()).clamp_min(0)


def _drawn(below: Tensor, log_temperature: Tensor) -> Tensor:
    """log softmax(scores / T); what was left out stays so."""
    return (below * (-log_temperature).exp()).log_softmax(-1)


def _finite(function: str, argument: str, value: float, above: float, most: float) -> None:
    if not (math.isfinite(value) and above <= value <= most):
        limits = f"be at least {above:g}" if math.isinf(most) else f"lie in {above:g}..{most:g}"
        fail(function, argument, limits, value, "Leave it out for the model as it is")
