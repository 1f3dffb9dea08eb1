"""The next-token distribution, refined towards a target's statistics given the text so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..store.fingerprint import tokenizer_fingerprint
from ..targets.target import Target
from . import potentials
from .continued import Continued
from .history import History, Seen
from .steps import Step
from .style import log_ratio

STATISTICS = ("sentences", "punctuation", "tokens", "ngrams")
TOWARDS = STATISTICS[:2]
_SEARCH = 8  # steps at most to the bound
_TIGHT = 1e-3  # of the bound that may be left
_SEEN = 5.0  # occurrences of a token, in either, from which on it is one to move
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

        of how the model writes: logit h*(a) - logit h(a), a the tokens since the last f, or none yet: hazards of
            sentence ends and of marks, of target and `native`
        of the text so far: log((n r + 4) / (c + 4)), r the share of the target's tokens that have f for the most part,
            n tokens of which c have

    Their sum may make one feature likelier and another one less, which a token shares (a full stop ends a sentence):
    what the steps settle. Step sizes of a half are those of generalized iterative scaling for tokens of two features
    (Darroch and Ratcliff, Annals of Mathematical Statistics 43(5), 1972). Of "tokens" and "ngrams" the steps start at
    q_0 exp(delta_v), delta_v that of each token without a feature: the log odds ratio of its shares, or of its
    probabilities behind the last one or two tokens where both targets track these; and that of the text so far.

    The row is then drawn from the point q = q_0 exp(eta u) / Z of the way to q_steps = q_0 exp(u) / Z with the largest
    eta <= 1 at which KL(q‖q_0) <= bound, found by bracketed Newton steps, to a thousandth of the bound below it: it
    rises with eta, by eta Var_q(u). Every token that the model leaves out stays out.

    Args:
        target: of the model's tokenizer, with sentences and punctuation.
        tokenizer: the model's: tells the special tokens, which begin a text anew, padding among them, and checks both.
        native: how the model writes as it is, from `dft-kernels gap --own` or `evaluation.gap.native`. None: the text
            so far alone is looked at, which needs some text to say anything.
        bound: nats a token, at least 0; 0, the default, leaves the model as it is.
        steps: of mirror descent.
        feedback: factor of what the text so far adds to delta.
        towards: which statistics, of STATISTICS; "ngrams" needs native.
        ends: ids that end a text besides the tokenizer's special ones: the model's own, `sampling.ends_of`.
    Padding is a special token, or an end; where a text has no end, a row's leading run of the id 0 too, with which
    `generate` is then told to pad.

    `report()`: the KL spent and the statistics before and after, of all draws since `reset()`.
    Errors: ValueError for another tokenizer's targets, or one without the statistics.
    Memory: S (F + 1) numbers: S tokens that may be moved, about 1,100 with a feature of F = 11 and some thousands of
    "tokens". Cost: one log-softmax of [B, V], some twenty passes over [B, S]; [B, T] ids are read anew at every token.
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
        towards: Sequence[str] = TOWARDS,
        ends: Iterable[int] = (),
    ) -> None:
        function = "IterativeRefiner"
        if not (math.isfinite(bound) and bound >= 0):
            fail(function, "bound", "be at least 0 nats", bound, "0 leaves the model as it is; 0.1 is a gentle one")
        if steps < 1:
            fail(function, "steps", "be at least 1", steps, "4 settle what overlaps")
        if not (math.isfinite(feedback) and feedback >= 0):
            fail(function, "feedback", "be at least 0", feedback, "0: the text so far only tells the state")
        check_towards(function, towards, native)
        known = tokenizer_fingerprint(tokenizer)
        for name, one in (("target", target), ("native", native)):
            if one is not None and one.about.tokenizer_sha256 != known:
                got = f"{one.about.name}, of {one.about.tokenizer or 'text alone'}"
                fail(function, name, "be of the model's tokenizer", got, "Build it: dft-kernels target build")
        self.target, self.native, self.bound = target, native, float(bound)
        self.steps, self.feedback = steps, float(feedback)
        members = potentials.features(target)
        moved, self._words = members.any(1), None
        if "tokens" in towards or "ngrams" in towards:
            moved |= _frequent(target) if native is None else _frequent(target) | _frequent(native)
        self._support = moved.nonzero()[:, 0]  # [S]
        self._features = members[self._support]  # [S, F]
        if len(self._support) and ("tokens" in towards or "ngrams" in towards):
            self._words = _Words(target, native, self._support, self._features, towards, self.feedback)
        special = [*tokenizer.all_special_ids, *ends]
        ended = {tokenizer.eos_token_id, *ends} - {None}  # with one of which roll_out pads, and else with 0
        self._history = History(members >= 0.5, special, None if ended else 0)
        self._rates = potentials.rates(target)
        self._counted = (members >= 0.5).float().t() @ target["unigram"]  # as the text so far is counted
        none = torch.zeros(potentials.F, 2)
        self._by_age = none if native is None else potentials.ratios(target, native)  # [F, ages + 1]: none yet
        use = ["sentences" in towards, *["punctuation" in towards] * (potentials.F - 1)]
        self._use = torch.tensor(use, dtype=torch.float32)
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
        seen = self._history(input_ids)
        out = scores.log_softmax(-1)
        mass = out[:, self._support].exp().float()  # [B, S]; the tables are fp32
        words = torch.zeros_like(mass) if self._words is None else self._words(input_ids, seen)
        tilt = self._tilt(mass, self._deltas(seen), words)
        eta, kl, log_z = _furthest(mass, tilt, self.bound)
        tilt = tilt * eta
        out.sub_(log_z)
        out[:, self._support] += tilt
        self._count(input_ids, mass, mass * (tilt - log_z).exp(), kl, eta)
        return out

    def _deltas(self, seen: Seen) -> Tensor:
        """[B, F]."""
        last = self._by_age.shape[1] - 1
        age = torch.where(seen.met, seen.age.clamp(max=last - 1), last)
        age[:, 0] = seen.age[:, 0].clamp(max=last - 1)  # a text begins with a sentence
        here = self._by_age.gather(1, age.t()).t()
        return self._use * (here + self.feedback * _missing(self._counted * seen.tokens, seen.counts))

    def _tilt(self, mass: Tensor, delta: Tensor, words: Tensor) -> Tensor:
        """u [B, S], by mirror descent from words [B, S]."""

        def odds(mass: Tensor, total: Tensor | float) -> Tensor:
            return (mass @ self._features / total).clamp(_LEAST, 1 - 1e-6).logit()

        goal = odds(mass, 1.0) + delta
        potential, tilt = torch.zeros_like(delta), words
        for _ in range(self.steps):
            moved = mass * tilt.exp()
            total = 1 + (moved - mass).sum(1, keepdim=True)
            potential = potential + self._use * (goal - odds(moved, total)) / 2
            tilt = (words + potential @ self._features.t()).clamp(-_LARGEST, _LARGEST)
        return tilt

    def _to(self, scores: Tensor) -> None:
        """Check the vocabulary, and move the tables to where scores are."""
        size = len(self.target["sentence_end"])
        if scores.shape[1] < size:
            of = f"be of the model's {scores.shape[1]} tokens"
            fail("IterativeRefiner", "target", of, size, "Build it for the model: dft-kernels target build")
        if self._support.device != scores.device:
            for name in ("_support", "_features", "_rates", "_counted", "_by_age", "_use"):
                setattr(self, name, getattr(self, name).to(scores.device))
            self._history.to(scores.device)
            if self._words is not None:
                self._words.to(scores.device)

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


def check_towards(function: str, towards: Sequence[str], native: object) -> None:
    """ValueError for what a refiner is asked to move and cannot."""
    other = [name for name in towards if name not in STATISTICS]
    if other or not towards:
        got = other[0] if other else "none"
        fail(function, "towards", f"hold statistics of {', '.join(STATISTICS)}", got, "Name some of these")
    if "ngrams" in towards and native is None:
        fail(function, "native", "be there for ngrams", "none", "Measure it: dft-kernels gap --own")


class _Words:
    """delta_v of tokens without a feature [B, S]. support [S]: the tokens; features [S, F]: theirs."""

    def __init__(
        self, target: Target, native: Target | None, support: Tensor, features: Tensor, towards: Sequence[str],
        feedback: float,
    ) -> None:  # fmt: skip
        size, vocab = len(support), len(target["unigram"])
        self.feedback = feedback if "tokens" in towards else 0.0
        self.plain = (~features.any(1)).float()
        self.share = target["unigram"][support]
        self.place = torch.full((vocab + 1,), size)  # of all other ids
        self.place[support] = torch.arange(size)
        self.ratio = torch.zeros(size)
        self.continued: Continued | None = None
        if native is not None and "tokens" in towards:
            self.ratio = log_ratio(target, native)[support].clamp(-potentials.LIMIT, potentials.LIMIT)
        if native is not None and "ngrams" in towards:
            self.continued = Continued(target, native, support)

    def to(self, device: torch.device) -> None:
        for name in ("plain", "share", "place", "ratio"):
            setattr(self, name, getattr(self, name).to(device))
        if self.continued is not None:
            self.continued.to(device)

    def __call__(self, input_ids: Tensor, seen: Seen) -> Tensor:
        size = len(self.share)
        delta = self.ratio.expand(len(input_ids), size)
        if self.continued is not None:
            known = self.continued(input_ids, seen.text)
            delta = torch.where(known != 0, known, delta)
        if self.feedback:
            places = torch.where(seen.text, self.place[input_ids.clamp(max=len(self.place) - 1)], size)
            counts = torch.zeros(len(input_ids), size + 1, device=places.device)
            counts = counts.scatter_add_(1, places, torch.ones_like(places, dtype=counts.dtype))[:, :size]
            delta = delta + self.feedback * _missing(self.share * seen.tokens, counts)
        return delta * self.plain


def _missing(expected: Tensor, counted: Tensor) -> Tensor:
    """How much likelier what the text so far has too rarely is to become."""
    return ((expected + _MEMORY) / (counted + _MEMORY)).log()


def _frequent(one: Target) -> Tensor:
    """Tokens [V] that were seen often enough."""
    return one["unigram"] * (one.about.tokens or 0) >= _SEEN


def _furthest(mass: Tensor, tilt: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """eta [B, 1] in 0..1, the largest at which KL(q‖q_0) <= bound, that KL, and log Z. mass: of q_0 on the tokens that
    are tilted [B, S]."""
    aim = bound * (1 - _TIGHT / 2)
    low, high = torch.zeros_like(mass[:, :1]), torch.ones_like(mass[:, :1])
    kl, _, _ = _divergence(mass, tilt, high)
    best = torch.where(kl <= bound, 1.0, low)
    eta, high = (aim / kl.clamp_min(aim)).sqrt(), torch.where(kl <= bound, low + 1, high)
    for _ in range(_SEARCH):
        kl, _, slope = _divergence(mass, tilt, eta)
        inside = kl <= bound
        best = torch.where(inside, torch.maximum(best, eta), best)
        found = (best == 1) | (inside & (kl >= bound * (1 - _TIGHT)))
        if mass.device.type == "cpu" and bool(found.all()):
            break  # to ask a GPU would be to wait for it
        low, high = torch.where(inside, torch.maximum(low, eta), low), torch.where(inside, high, eta)
        there = eta - (kl - aim) / slope.clamp_min(1e-30)
        eta = torch.where((there > low) & (there < high), there, (low + high) / 2)
    kl, log_z, _ = _divergence(mass, tilt, best)
    return best, kl, log_z


def _divergence(mass: Tensor, tilt: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q‖q_0), log Z and dKL / deta [B, 1], of q = q_0 exp(eta u) / Z."""
    u = eta * tilt
    grown = u.expm1().mul_(mass)
    log_z = grown.sum(-1, keepdim=True).log1p()
    drawn = grown.add_(mass).mul_((-log_z).exp())
    mean = torch.linalg.vecdot(drawn, tilt)[:, None]
    square = torch.linalg.vecdot(drawn.mul_(tilt), tilt)[:, None]
    slope = eta * (square - mean.square()).clamp_min(0)
    return (eta * mean - log_z).clamp_min(0), log_z, slope
