"""Blends of targets, and style vectors: between a model's own statistics and a target, and beyond.

"linear" is the target of a text that takes the share w_i of its tokens from target i: token statistics mix by w_i,
what is per sentence, mark or word by w_i times how many of those a token of i brings, a context's completions by
w_i P_i(context). So the hazard is that of the mixed sentences, blended by survival, not the mean of hazards: at age a
most of what is still at risk comes from the style of long sentences.

"log_linear" is prod p_i^w_i, normalised: what they agree on; nothing where one of them has nothing. The hazard is
that of the blended lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import fail
from .ngram_blend import linear_ngrams, log_linear_ngrams, powers
from .target import STATISTICS, About, Target

KINDS = ("linear", "log_linear")
_ROWS = ("punctuation_gap", "punctuation_transition")  # a distribution for each class
_SIZES = ("characters", "words", "sentences")


def blend(targets: Sequence[Target], weights: Sequence[float], kind: str = "linear", name: str | None = None) -> Target:
    """Several targets as one: the statistics that all of them have, but for entropy and noise floors, which a blend's
    parts do not tell.

    weights: "linear": at least 0, of sum 1. "log_linear": any of sum 1. Raises ValueError for others, for targets of
    different tokenizers, and for "log_linear" ones with nothing in common.
    """
    targets, weights = list(targets), [float(weight) for weight in weights]
    if kind not in KINDS:
        fail("blend", "kind", f"be one of {', '.join(KINDS)}", repr(kind), "Name one")
    if not targets or len(weights) != len(targets):
        fail("blend", "weights", f"be one for each of {len(targets)} targets", len(weights), "Give as many")
    if not all(math.isfinite(weight) for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        fail("blend", "weights", "sum to 1", f"{weights}, of sum {sum(weights):g}", "Divide them by their sum")
    if kind == "linear" and min(weights) < 0:
        fail("blend", "weights", "be at least 0", weights, "style_vector extrapolates")
    _check_tokenizers("blend", targets)
    tensors = _linear(targets, weights, None) if kind == "linear" else _log_linear(targets, weights)
    parts = " + ".join(f"{weight:g} {one.about.name}" for weight, one in zip(weights, targets, strict=True))
    return Target(_about(targets, weights, name or parts, f"{kind} blend: {parts}"), tensors)


def style_vector(
    native: Target, target: Target, gamma: float, max_clipped: float = 0.1, name: str | None = None
) -> Target:
    """(1 - gamma) native + gamma target, linear as in `blend`: gamma 0 a model's own statistics, 1 the target's; below
    0 and above 1 it extrapolates, what falls below 0 is set to 0 and the rest scaled to what it sums to.

    max_clipped: refused (ValueError) where in any statistic more than this share of the negative and positive mass was
    negative. A token that the target has far more rarely than the model is soon below 0.
    """
    if not math.isfinite(gamma):
        fail("style_vector", "gamma", "be finite", gamma, "Give a number; 0 is the model's own, 1 the target's")
    _check_tokenizers("style_vector", [native, target])
    weights = [1 - gamma, gamma]
    parts = f"{1 - gamma:g} {native.about.name} + {gamma:g} {target.about.name}"
    about = _about([native, target], weights, name or parts, f"style vector: {parts}")
    return Target(about, _linear([native, target], weights, max_clipped))


def _linear(targets: list[Target], weights: list[float], max_clipped: float | None) -> dict[str, Tensor]:
    shared = [name for name in STATISTICS if all(name in one for one in targets)]

    def mixed(name: str, scale: Callable[[Target], Tensor | float] = lambda one: 1.0) -> tuple[Tensor, Tensor]:
        """sum w_i scale_i x_i, clipped, and sum w_i scale_i."""
        scales = [weight * torch.as_tensor(scale(one)).double() for weight, one in zip(weights, targets, strict=True)]
        total = sum((s * one[name].double() for s, one in zip(scales, targets, strict=True)), torch.zeros(()))
        return clipped(name, total, max_clipped), sum(scales, torch.zeros(()))

    out: dict[str, Tensor] = {}
    for name in shared:
        if name == "unigram":
            out[name] = shares(mixed(name)[0])
        elif name == "punctuation_rate":
            out[name] = mixed(name)[0].clamp(max=1)
        elif name in _ROWS and "punctuation_rate" in shared:
            rows = mixed(name, lambda one: one["punctuation_rate"].double()[:, None])[0]
            out[name] = shares(rows)
        elif name == "sentence_end" and "unigram" in shared:
            ends, occurrences = mixed(name, lambda one: one["unigram"])
            out[name] = torch.where(occurrences > 0, ends / occurrences.clamp(min=1e-300), 0).clamp(0, 1)
        elif name == "mark_risk":
            out[name] = shares(mixed(name)[0])
        elif name == "mark_hazard" and "mark_risk" in shared:
            events, risk = mixed(name, lambda one: one["mark_risk"])
            out[name] = torch.where(risk > 0, events / risk.clamp(min=1e-300), 0).clamp(0, 1)
        elif name == "soft_hazard" and "hazard" in shared:
            soft, risk = mixed(name, lambda one: at_risk(one) / at_risk(one).sum())
            out[name] = torch.where(risk > 0, soft / risk.clamp(min=1e-300), 0).clamp(0, 1)
        elif name == "sentence_tokens" and "hazard" in shared:
            ended = mixed(name, lambda one: 1 / at_risk(one).sum())[0]
            oldest = sum(
                float(weight * at_risk(one)[-1] / at_risk(one).sum())
                for weight, one in zip(weights, targets, strict=True)
            )
            out[name], out["hazard"] = shares(ended), hazard_of(ended, max(oldest, float(ended[-1])))
        elif name == "sentence_words":
            out[name] = shares(mixed(name, lambda one: one.about.sentences / _unit(one, targets))[0])
        elif name == "word_length":
            out[name] = shares(mixed(name, lambda one: one.about.words / _unit(one, targets))[0])
        elif name in ("punctuation_per_1000_words", "type_token_ratio"):
            total, words = mixed(name, lambda one: one.about.words / _unit(one, targets))
            out[name] = total / words
        elif name == "punctuation_features":
            out[name] = targets[0][name]
    if "ngram_starts" in shared:
        out |= linear_ngrams(targets, weights, lambda name, value: clipped(name, value, max_clipped))
    return {name: out[name].to(STATISTICS[name].dtype) for name in STATISTICS if name in out}


def _log_linear(targets: list[Target], weights: list[float]) -> dict[str, Tensor]:
    shared = [name for name in STATISTICS if all(name in one for one in targets)]
    out: dict[str, Tensor] = {}
    for name in shared:
        kind = STATISTICS[name]
        values = [one[name] for one in targets]
        if name == "punctuation_features":
            out[name] = values[0]
        elif name.startswith(("ngram_", "entropy", "mark_")) or name == "hazard":
            continue
        elif name == "sentence_end":  # what ends a sentence is no style
            total = sum(abs(weight) for weight in weights)
            out[name] = sum(
                (abs(w) / total * v.double() for w, v in zip(weights, values, strict=True)), torch.zeros(())
            )
        else:
            product = powers([value.double() for value in values], weights)
            out[name] = shares(product) if kind.simplex else product.clamp(max=1 if kind.tokens else torch.inf)
            if name in ("unigram", "sentence_tokens") and not bool(out[name].any()):
                fail("blend", name, "be of targets with something in common", "nothing", "Blend them linearly")
    if "sentence_tokens" in out and "hazard" in shared:
        oldest = float(powers([one["hazard"][-1:].double() for one in targets], weights))
        last = float(out["sentence_tokens"][-1])
        out["hazard"] = hazard_of(out["sentence_tokens"], last / min(oldest, 1) if oldest > 0 else last)
    if "ngram_starts" in shared:
        out |= log_linear_ngrams(targets, weights)
    return {name: out[name].to(STATISTICS[name].dtype) for name in STATISTICS if name in out}


def at_risk(target: Target) -> Tensor:
    """Tokens at each age [A] for every sentence: sentences longer than a; in the last bin ends / hazard."""
    ended, hazard = target["sentence_tokens"].double(), target["hazard"].double()
    out = ended.flip(0).cumsum(0).flip(0)
    out[-1] = ended[-1] / hazard[-1] if hazard[-1] > 0 else 0
    return out


def hazard_of(ended: Tensor, oldest: float) -> Tensor:
    """ended / at risk [A] of a length histogram of any scale; oldest: tokens of that scale in the last bin."""
    risk = ended.flip(0).cumsum(0).flip(0)
    risk[-1] = oldest
    return torch.where(risk > 0, ended / risk.clamp(min=1e-300), 0).clamp(0, 1)


def clipped(name: str, value: Tensor, max_clipped: float | None) -> Tensor:
    """At least 0; refused where too much was below."""
    negative = float(-value.clamp(max=0).sum())
    share = negative / max(negative + float(value.clamp(min=0).sum()), 1e-300)
    if max_clipped is not None and share > max_clipped:
        fail(
            "style_vector",
            "gamma",
            f"leave at most {max_clipped:.0%} of {name} to be clipped at 0",
            f"{share:.1%}",
            "Move gamma towards [0, 1], or raise max_clipped (--max-clipped)",
        )
    return value.clamp(min=0)


def shares(value: Tensor) -> Tensor:
    """Divided by the sum over the last dimension; 0 where that is 0."""
    total = value.sum(-1, keepdim=True)
    return torch.where(total > 0, value / total.clamp(min=1e-300), 0)


def _unit(one: Target, targets: list[Target]) -> int:
    """What weights are shares of: tokens, or words where some have no tokens."""
    tokens = [target.about.tokens for target in targets]
    return one.about.words if None in tokens else int(one.about.tokens or 1)


def _about(targets: list[Target], weights: list[float], name: str, source: str) -> About:
    """Sizes: all the tokens (or words) there are, with as much else as the blend has for each of them."""
    first = targets[0].about
    total = sum(_unit(one, targets) for one in targets)
    rates = {
        size: sum(w * getattr(one.about, size) / _unit(one, targets) for w, one in zip(weights, targets, strict=True))
        for size in _SIZES
    }
    licences = dict.fromkeys(one.about.licence for one in targets)
    known = all(one.about.tokens is not None for one in targets)
    return replace(
        first,
        name=name,
        source=source + " of " + "; ".join(dict.fromkeys(one.about.source for one in targets)),
        licence="; ".join(licences),
        documents=sum(one.about.documents for one in targets),
        tokens=total if known else None,
        tokenizer=first.tokenizer if known else None,
        tokenizer_sha256=first.tokenizer_sha256 if known else None,
        **{size: max(1, round(total * rate)) for size, rate in rates.items()},
    )


def _check_tokenizers(function: str, targets: list[Target]) -> None:
    found = {one.about.tokenizer_sha256: one.about for one in targets if one.about.tokenizer_sha256}
    if len(found) > 1:
        names = ", ".join(f"{about.name}: {about.tokenizer}" for about in found.values())
        fail(function, "targets", "be of one tokenizer", names, "Build them for one: dft-kernels target build")
