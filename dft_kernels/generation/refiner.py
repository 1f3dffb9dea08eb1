"""The next-token distribution, refined towards a target's statistics given the text so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..store.fingerprint import tokenizer_fingerprint
from ..targets.target import Target
from . import potentials
from .history import History
from .steps import Step

_SECTIONS, _ROUNDS = 16, 4  # of the search for the step: 2^-16 of it
_LARGEST = 4.0  # of a tilt: a factor of 55
_LEAST = 1e-9  # mass that a feature is given where the model has none
_MEMORY = 4.0  # occurrences of a feature in the text so far that weigh as much as the target


@dataclass(frozen=True)
class Refined:
    """What a refiner did to the draws of texts that had not ended. tokens: how many; kl: nats a token, KL(drawn from‖
    handed in); bounded: the share of them where the bound cut the step. By statistic, potentials.NAMES: mass handed in,
    mass drawn from, and the target's share of tokens."""

    tokens: int
    kl: float
    bounded: float
    before: dict[str, float]
    after: dict[str, float]
    target: dict[str, float]


class IterativeRefiner(Step):
    r"""Mirror descent on a row's distribution q, from q_0 = softmax(scores), towards a target's statistics:

        J(q) = sum_f KL(Bernoulli(g_f) ‖ Bernoulli(<q, f>)),   logit g_f = logit <q_0, f> + delta_f(text so far)
        q_(i+1) = q_i exp(sum_f f (logit g_f - logit <q_i, f>) / 2) / Z

    over features f of tokens: the share of their occurrences that end a sentence, and the punctuation classes that they
    hold. delta_f is how much likelier the target makes f here than the model does, as a log odds ratio:

        of how the model writes: logit h*(a) - logit h(a), a the tokens since the last f: hazards of sentence ends and
            of gaps between marks, of target and `native`; where no f stands yet, of their rates
        of the text so far: log((n r + 4) / (c + 4)), r the target's rate, n tokens that hold c times f

    Their sum may make one feature likelier and another one less, which a token shares (a full stop ends a sentence):
    what the steps settle. Step sizes of a half are those of generalized iterative scaling for tokens of two features
    (Darroch and Ratcliff, Annals of Mathematical Statistics 43(5), 1972).

    The row is then drawn from the point q = q_0 exp(eta u) / Z of the way to q_steps = q_0 exp(u) / Z with the largest
    eta <= 1 at which KL(q‖q_0) <= bound; it rises with eta, by eta Var_q(u), so that a search by sections finds eta to
    2^-16 from below. Every token that the model leaves out stays out.

    Args:
        target: of the model's tokenizer, with sentences and punctuation.
        tokenizer: the model's: tells the special tokens, which begin a text anew, padding among them, and checks both.
        native: how the model writes as it is, from `dft-kernels gap --own` or `evaluation.gap.native`. None: the text
            so far alone is looked at, which needs some text to say anything.
        bound: nats a token, at least 0; 0, the default, leaves the model as it is.
        steps: of mirror descent.
        feedback: factor of what the text so far adds to delta.

    `report()`: the KL spent and the statistics before and after, of all draws since `reset()`.
    Errors: ValueError for another tokenizer's targets, or one without the statistics.
    Memory: S G numbers: S tokens with a feature, about 1,100, of G kinds, about 120: those with the same features.
    Cost: one log-softmax of [B, V], a product [B, S] x [S, G], the rest is of [B, 16, G] at most; [B, T] ids
    are read anew at every token.
    """

    place = "refinement"

    def __init__(
        self,
        target: Target,
        tokenizer: Any,
        native: Target | None = None,
        bound: float = 0.0,
        steps: int = 4,
        feedback: float = 1.0,
    ) -> None:
        function = "IterativeRefiner"
        if not (math.isfinite(bound) and bound >= 0):
            fail(function, "bound", "be at least 0 nats", bound, "0 leaves the model as it is; 0.1 is a gentle one")
        if steps < 1:
            fail(function, "steps", "be at least 1", steps, "4 settle what overlaps")
        if not (math.isfinite(feedback) and feedback >= 0):
            fail(function, "feedback", "be at least 0", feedback, "0: the text so far only tells the state")
        known = tokenizer_fingerprint(tokenizer)
        for name, one in (("target", target), ("native", native)):
            if one is not None and one.about.tokenizer_sha256 != known:
                got = f"{one.about.name}, of {one.about.tokenizer or 'text alone'}"
                fail(function, name, "be of the model's tokenizer", got, "Build it: dft-kernels target build")
        self.target, self.native, self.bound = target, native, float(bound)
        self.steps, self.feedback = steps, float(feedback)
        members = potentials.features(target)
        self._support = members.any(1).nonzero()[:, 0]  # [S]
        self._features, self._kind = members[self._support].unique(dim=0, return_inverse=True)  # [G, F], [S]
        self._kinds = torch.nn.functional.one_hot(self._kind, len(self._features)).float()
        self._history = History(members >= 0.5, tokenizer.all_special_ids)
        self._rates = potentials.rates(target)
        none = torch.zeros(potentials.F, 2)
        self._by_age = none if native is None else potentials.ratios(target, native)  # [F, ages + 1]: none yet
        self.reset()

    @property
    def idle(self) -> bool:
        """Where nothing may be spent."""
        return self.bound == 0

    def reset(self) -> None:
        """Begin a new report."""
        self._sums: Tensor | None = None

    def step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See Step."""
        self._to(scores)
        out = scores.log_softmax(-1)
        mass = out[:, self._support].exp() @ self._kinds  # [B, G]
        tilt = self._tilt(mass, self._deltas(input_ids))
        eta, kl, log_z = _furthest(mass, tilt, self.bound)
        tilt = tilt * eta
        out.sub_(log_z)
        out[:, self._support] += tilt[:, self._kind]
        self._count(input_ids, mass, mass * (tilt - log_z).exp(), kl, eta)
        return out

    def _deltas(self, input_ids: Tensor) -> Tensor:
        """[B, F]."""
        seen = self._history(input_ids)
        last = self._by_age.shape[1] - 1
        age = torch.where(seen.met, seen.age.clamp(max=last - 1), last)
        age[:, 0] = seen.age[:, 0].clamp(max=last - 1)  # a text begins with a sentence
        here = self._by_age.gather(1, age.t()).t()
        expected = self._rates * seen.tokens
        return here + self.feedback * ((expected + _MEMORY) / (seen.counts + _MEMORY)).log()

    def _tilt(self, mass: Tensor, delta: Tensor) -> Tensor:
        """u [B, G], by mirror descent from 0."""

        def odds(mass: Tensor, total: Tensor | float) -> Tensor:
            return (mass @ self._features / total).clamp(_LEAST, 1 - 1e-6).logit()

        goal = odds(mass, 1.0) + delta
        potential, tilt = torch.zeros_like(delta), torch.zeros_like(mass)
        for _ in range(self.steps):
            moved = mass * tilt.exp()
            total = 1 + (moved - mass).sum(1, keepdim=True)
            potential = potential + (goal - odds(moved, total)) / 2
            tilt = (potential @ self._features.t()).clamp(-_LARGEST, _LARGEST)
        return tilt

    def _to(self, scores: Tensor) -> None:
        """Check the vocabulary, and move the tables to where scores are."""
        size = len(self.target["sentence_end"])
        if scores.shape[1] < size:
            of = f"be of the model's {scores.shape[1]} tokens"
            fail("IterativeRefiner", "target", of, size, "Build it for the model: dft-kernels target build")
        if self._support.device != scores.device:
            for name in ("_support", "_features", "_kind", "_kinds", "_rates", "_by_age"):
                setattr(self, name, getattr(self, name).to(scores.device))
            self._history.to(scores.device)

    def _count(self, input_ids: Tensor, before: Tensor, after: Tensor, kl: Tensor, eta: Tensor) -> None:
        live = (~self._history.begins(input_ids[:, -1])).to(before.dtype)
        masses = (before @ self._features, after @ self._features)
        rows = torch.cat([torch.ones_like(kl), kl, (eta < 1).to(kl.dtype), *masses], 1)
        sums = (live @ rows).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def report(self) -> Refined:
        """See the class; waits for the device."""
        names, size = potentials.NAMES, potentials.F
        sums = [0.0] * (3 + 2 * size) if self._sums is None else self._sums.tolist()
        tokens, kl, bounded, *rest = [sums[0], *(value / max(sums[0], 1) for value in sums[1:])]
        return Refined(
            int(tokens), kl, bounded, dict(zip(names, rest[:size], strict=True)),
            dict(zip(names, rest[size:], strict=True)), dict(zip(names, self._rates.tolist(), strict=True)),
        )  # fmt: skip

    def __repr__(self) -> str:
        of = "its own text" if self.native is None else self.native.about.name
        return f"IterativeRefiner({of} -> {self.target.about.name}, KL <= {self.bound:g} nats a token)"


def _furthest(mass: Tensor, tilt: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """eta [B, 1] in 0..1, the largest at which KL(q‖q_0) <= bound, that KL, and log Z. mass: of q_0 on tokens that are
    tilted [B, G], by kind."""
    low, width = torch.zeros_like(mass[:, :1]), 1.0
    grid = torch.arange(1, _SECTIONS + 1, device=mass.device, dtype=mass.dtype) / _SECTIONS
    for _ in range(_ROUNDS):
        kl, _ = _divergence(mass, tilt, low + width * grid)
        inside = (kl <= bound).to(mass.dtype).cumprod(1).sum(1, keepdim=True)  # sections
        width /= _SECTIONS
        low = (low + width * inside).clamp(max=1.0)
    return low, *_divergence(mass, tilt, low)


def _divergence(mass: Tensor, tilt: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q‖q_0) and log Z [B, E], of q = q_0 exp(eta u) / Z for each of eta [B, E]."""
    u = eta[..., None] * tilt[:, None]  # [B, E, G]
    grown = u.expm1() * mass[:, None]
    log_z = grown.sum(-1).log1p()
    mean = ((grown + mass[:, None]) * u).sum(-1) / log_z.exp()
    return (mean - log_z).clamp_min(0), log_z
