"""Terms of ordered statistics: how many tokens lie between two sentence ends, or between two marks of a class.

The age of row t is the number of tokens since the last end in the text up to input_ids[t] (0: that token is one), and
its hazard the mass that the model puts on an end next, so that age a and an end make a gap of length a + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from .base import DistributionTerm, Statistics, membership, tensor

DISTANCES = ("wasserstein", "cramer", "bernoulli_kl", "squared")


class _Gaps(DistributionTerm):
    """Of C classes of tokens that end a gap, each against its own target."""

    text = True

    def __init__(
        self,
        ends: Tensor,
        hazard: Tensor | None,
        lengths: Tensor | None,
        kind: str,
        distance: str,
        starts: bool,
        names: tuple[str, str],
    ) -> None:
        function = names[0]
        self.features = membership(function, names[1], ends)
        self.vocab, classes = self.features.shape
        self.member = self.features.to_dense() >= 0.5  # [V, C]
        if kind not in ("hazard", "renewal"):
            fail(function, "kind", "be hazard or renewal", repr(kind), "Pick one of these")
        allowed = DISTANCES if kind == "hazard" else DISTANCES[:2]
        if distance not in allowed:
            fail(function, "distance", f"be one of {', '.join(allowed)} with kind={kind!r}", repr(distance), "Pick one")
        if (hazard is None) == (lengths is None):
            got = "both" if hazard is not None else "neither"
            fail(
                function, "hazard or lengths", "be given, one of them", got, "lengths[a]: share of gaps of a + 1 tokens"
            )
        given, what = (lengths, "lengths") if hazard is None else (hazard, "hazard")
        target = tensor(function, what, given, "[A] or [C, A]", (1, 2)).double()
        target = target[None] if target.ndim == 1 else target
        if len(target) != classes:
            fail(function, what, f"have a row for each of {classes} classes", list(target.shape), "Pass [C, A]")
        most = float((target if hazard is not None else target.sum(1)).max())
        if float(target.min()) < 0 or most > 1 + 1e-6:
            got = f"a least entry of {float(target.min()):.3g} and a largest of {most:.6g}"
            relation = "lie in 0..1" if hazard is not None else "be at least 0 and sum to at most 1"
            fail(function, what, relation, got, "Divide counts by their sum")
        if hazard is not None:
            self.hazard = target.clamp(max=1.0)
            alive = torch.nn.functional.pad((1 - self.hazard).cumprod(1)[:, :-1], (1, 0), value=1.0)
            self.cumulative = 1 - (1 - self.hazard).cumprod(1)
        else:
            self.cumulative = target.cumsum(1).clamp(max=1.0)
            alive = torch.nn.functional.pad(1 - self.cumulative[:, :-1], (1, 0), value=1.0)
            self.hazard = torch.where(alive > 1e-9, target / alive.clamp(min=1e-9), 0.0).clamp(max=1.0)
        self.survival = alive / alive.sum(1, keepdim=True)  # [C, A]
        self.classes, self.bins = target.shape
        self.kind, self.distance, self.starts = kind, distance, starts
        self.linear = kind == "hazard"
        self.size = classes * (self.bins + (kind == "renewal"))

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Of hazards: the mass on an end, by class and age, and its rows' weight, [C A]. Of the renewal process: the
        expected number of gaps of each length and of longer ones, [C (A + 1)]."""
        s, w = statistics.features, statistics.weight
        assert s is not None
        ended = self.member[statistics.input_ids]  # [B, T, C]
        if self.kind == "renewal":
            return self._renewed(s, w, ended), w.sum()
        place = torch.arange(w.shape[1], device=w.device)[None, :, None]
        last = torch.where(ended, place, -1).cummax(1).values
        age = place - last
        live = (age < self.bins) if self.starts else (age < self.bins) & (last >= 0)
        by = torch.where(live, w[..., None], 0.0).reshape(-1)
        at = torch.arange(self.classes, device=w.device) * self.bins + age.clamp(max=self.bins - 1)
        none = w.new_zeros(self.size)
        at = at.reshape(-1)
        return none.index_add(0, at, by * s.reshape(-1)), none.index_add(0, at, by)

    def _renewed(self, s: Tensor, w: Tensor, ended: Tensor) -> Tensor:
        """The chance of age a at row t is e[t-1-a] prod_{t-a <= u < t} (1 - e[u]), e[u] the chance that token u + 1 is
        an end; where a row is in no term, whether it is. Lengths beyond A are what is left of the known ages."""
        ended = ended.to(s.dtype)
        realised = torch.nn.functional.pad(ended[:, 1:], (0, 0, 0, 1))
        e = torch.where(w[..., None] != 0, s, realised).transpose(1, 2)  # [B, C, T]
        before = torch.stack([torch.full_like(e[..., 0], float(self.starts)), ended[:, 0]], -1)
        known, steps = torch.cat([before, e], -1), e.shape[-1]
        padded = torch.nn.functional.pad(known, (self.bins, 0))
        run, old, out, by = torch.ones_like(e), torch.zeros_like(e), [], w[:, None] * e
        for age in range(self.bins):
            first = self.bins + 1 - age
            end = padded[..., first : first + steps]
            now = end * run
            out.append((by * now).sum((0, 2)))
            old, run = old + now, run * (1 - end)
        unknown = (1 - known).cumprod(-1)[..., 1 : steps + 1]
        out.append((by * (1 - unknown - old)).sum((0, 2)))
        return torch.stack(out, 1).reshape(-1)

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of hazards [C A], or of counts of lengths [C (A + 1)]; the mean over classes."""
        if self.kind == "renewal":
            counts = mean.reshape(self.classes, -1)
            total = counts.sum(1, keepdim=True)
            found = counts.cumsum(1)[:, :-1] / torch.where(total == 0, 1.0, total)
            found = torch.where(total == 0, self.cumulative, found)
        else:
            seen = share.reshape(self.classes, -1) > 0
            h = torch.where(seen, mean.reshape(self.classes, -1), self.hazard)  # an age that did not come adds nothing
            if self.distance == "squared":
                return (self.survival * (h - self.hazard).square()).sum(1).mean()
            if self.distance == "bernoulli_kl":
                p = self.hazard
                kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, h)
                kl = kl + torch.special.xlogy(1 - p, 1 - p) - torch.special.xlogy(1 - p, 1 - h)
                return (self.survival * kl).sum(1).mean()
            found = 1 - (1 - h).cumprod(1)
        gap = found - self.cumulative
        return (gap.abs() if self.distance == "wasserstein" else gap.square()).sum(1).mean()


class SentenceLength(_Gaps):
    """Sentence lengths, in tokens, against a corpus': of hazards h(a), the mean mass on a sentence end over rows whose
    sentence has a tokens so far, or of the soft renewal process that those masses drive.

        bernoulli_kl  J = sum_a S*(a) KL(h*(a)‖h(a)) / sum_a S*(a), S* the corpus' survival
        squared       J = sum_a S*(a) (h(a) - h*(a))² / sum_a S*(a)
        wasserstein   J = sum_a abs(F(a) - F*(a)), in tokens; F(a) = 1 - prod_{b <= a} (1 - h(b))
        cramer        J = sum_a (F(a) - F*(a))² (Cramér's distance; its gradient from samples is unbiased where F is
                      linear in q: Bellemare et al., arXiv:1705.10743)

    and G of the rows of age a is dJ/dh(a) / share(a) on the terminators, 0 elsewhere. kind="renewal": s'(0) = sum_a e
    s(a), s'(a + 1) = (1 - e) s(a), F of the expected counts sum_t e_t s_t(a); wasserstein and cramer, in exact mode.

    Args:
        sentence_end: [V] bool, the terminators, or the share of a token's occurrences that end a sentence: the mass
            is then of these, and a token ends one in the text where its share is half or more. Where a quote may follow
            a terminator, the gap after it is short; count the corpus' with the same tokens.
        hazard: [A], h*(0) .. h*(A - 1); or lengths: [A], shares of sentences of 1 .. A tokens; longer ones are not
            looked at. starts: whether sequences begin where a sentence does (else rows before their first end are out).

    Cost: one feature a row, [A] numbers; the renewal process A passes over [B, T]. Warning: its ages are those of the
    *text that was read*; on human text the hazard is nearly right before any training.
    """

    def __init__(
        self,
        sentence_end: Tensor,
        hazard: Tensor | None = None,
        lengths: Tensor | None = None,
        kind: str = "hazard",
        distance: str = "wasserstein",
        starts: bool = False,
    ) -> None:
        known: Any = sentence_end
        if isinstance(known, Tensor) and known.ndim != 1:
            fail(
                "SentenceLength", "sentence_end", "have shape [V]", list(known.shape), "See PunctuationGap for classes"
            )
        names = ("SentenceLength", "sentence_end")
        super().__init__(sentence_end, hazard, lengths, kind, distance, starts, names)


class PunctuationGap(_Gaps):
    """Gaps between two marks of a class, for each of C classes (commas, semicolons, dashes, quotes, newlines): as
    `SentenceLength`, the mean over classes.

    marks: [V] or [V, C] membership; hazard or lengths: [A] or [C, A]. Cost: C features a row, [C A] numbers. Rare marks
    have few rows at each age: their hazards are noise without a running mean.
    """

    def __init__(
        self,
        marks: Tensor,
        hazard: Tensor | None = None,
        lengths: Tensor | None = None,
        kind: str = "hazard",
        distance: str = "bernoulli_kl",
        starts: bool = False,
    ) -> None:
        super().__init__(marks, hazard, lengths, kind, distance, starts, ("PunctuationGap", "marks"))
