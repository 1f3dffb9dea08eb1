"""Temperatures of a row's own, from the entropy of its distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import fail
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
    temperature of 0.05. Cost: four passes over [B, V].
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
        z = _below_largest(scores)
        entropy, _ = _at(z, torch.zeros_like(z[:, :1]))
        cold = self.theta / entropy.clamp_min(1e-6) * math.log(self.base)
        return _drawn(scores, z, (cold + math.log(self.temperature)).clamp(min=math.log(LEAST)))

    def __repr__(self) -> str:
        return f"EntropyTemperature(T = {self.temperature:g} * {self.base:g}^({self.theta:g} / H))"


class Diversity(Step):
    """Each row at the temperature T at which its entropy is (1 + d) times what it is at 1, as far as it can be:

        H(softmax(scores / T)) = min(H(softmax(scores)) (1 + d), log n), LEAST <= T <= most

    of the n tokens that are left: truncate first, or a high T finds what is wrong in the tail. By Newton's method in
    log T on H, dH / dlog T = Var_T(scores) / T^2 (a distribution of an exponential family: dH/dT = Var / T^3),
    bracketed, to 1e-4 nats in 8 steps at most.

    d: above -1; 0, the default, leaves the model as it is. most: T at most, above 1.
    Cost: one pass over [B, V] for the entropy, one for each step.
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
        z = _below_largest(scores)
        entropy, slope = _at(z, torch.zeros_like(z[:, :1]))
        left = (z > _FLOOR).sum(1, keepdim=True, dtype=z.dtype)
        goal = torch.minimum(entropy * (1 + self.d), left.log())
        limits = (math.log(LEAST), 0.0) if self.d < 0 else (0.0, math.log(self.most))
        return _drawn(scores, z, solved(z, goal, entropy, slope, limits))

    def __repr__(self) -> str:
        return f"Diversity(H = {1 + self.d:g} * H, T <= {self.most:g})"


def solved(z: Tensor, goal: Tensor, entropy: Tensor, slope: Tensor, limits: tuple[float, float]) -> Tensor:
    """log T [B, 1] within limits at which rows z [B, V] (at most 0, 0 their largest) have an entropy of goal [B, 1].
    entropy, slope: at T = 1, as `_at` has them."""
    low, high = (torch.full_like(goal, limit) for limit in limits)
    x = torch.zeros_like(goal)
    for number in range(ITERATIONS):
        if number:
            entropy, slope = _at(z, x)
        over = entropy > goal
        low, high = torch.where(over, low, x), torch.where(over, x, high)
        found = ((entropy - goal).abs() <= CLOSE) | (low >= high)
        if not z.is_cuda and bool(found.all()):
            break  # to ask a GPU would be to wait for it
        # in log H: of a row with one likely token, H falls by powers as T does
        there = x + (goal.clamp_min(1e-30) / entropy.clamp_min(1e-30)).log() * entropy / slope.clamp_min(1e-30)
        if number:  # the first step may try a limit
            there = torch.where((there >= low) & (there <= high), there, (low + high) / 2)
        x = torch.where(found, x, torch.minimum(torch.maximum(there, low), high))
    return x


def _below_largest(scores: Tensor) -> Tensor:
    return (scores - scores.amax(-1, keepdim=True)).clamp_(min=_FLOOR)


def _at(z: Tensor, log_temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of softmax(z / T) in nats and its derivative in log T, [B, 1] each."""
    cold = (-log_temperature).exp()
    mass = (z * cold).exp_()
    total = mass.sum(-1, keepdim=True)
    first = mass.mul_(z).sum(-1, keepdim=True) / total
    second = mass.mul_(z).sum(-1, keepdim=True) / total
    return total.log() - cold * first, cold.square() * (second - first.square()).clamp_min(0)


def _drawn(scores: Tensor, z: Tensor, log_temperature: Tensor) -> Tensor:
    """log softmax(scores / T); what was left out stays so."""
    scaled = z * (-log_temperature).exp()
    out = scaled - scaled.logsumexp(-1, keepdim=True)
    return out.masked_fill_(scores == -math.inf, -math.inf)


def _finite(function: str, argument: str, value: float, above: float, most: float) -> None:
    if not (math.isfinite(value) and above <= value <= most):
        limits = f"be at least {above:g}" if math.isinf(most) else f"lie in {above:g}..{most:g}"
        fail(function, argument, limits, value, "Leave it out for the model as it is")
