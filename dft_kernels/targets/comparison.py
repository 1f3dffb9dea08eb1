"""The distances that are taken between two targets, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import distances
from .target import STATISTICS, Target, burstiness, ngrams


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Distances of every statistic that both have, as `statistic, distance`.

    TV, L2, W1, Cramér are those of distances.py. bigram, trigram: L2 of the joint probabilities of all n-grams that
    either tracks, 0 where it does not (below what it tracks: rare). punctuation gap and transition: means over
    the classes that both have, weighted by how often they stand. Rates, ratios, burstiness: absolute differences,
    summed over classes.
    """
    found: dict[str, float] = {}

    def both(*names: str) -> bool:
        return all(name in a and name in b for name in names)

    if both("unigram"):
        found["unigram, L2"] = distances.l2(a["unigram"], b["unigram"])
        found["unigram, TV"] = distances.total_variation(a["unigram"], b["unigram"])
    if both("ngram_starts"):
        (rows, p), (others, q) = ngrams(a), ngrams(b)
        digits = torch.cat([rows, others]) + 1
        base = int(digits.max()) + 1 if len(digits) else 1
        keys, at = ((digits[:, 0] * base + digits[:, 1]) * base + digits[:, 2]).unique(return_inverse=True)
        difference = torch.zeros(len(keys), dtype=torch.float64).index_add(0, at, torch.cat([p, -q]))
        for gram, those in (("bigram", keys < base * base), ("trigram", keys >= base * base)):
            if bool(those.any()):
                found[f"{gram}, L2"] = distances.l2(difference[those], torch.zeros(int(those.sum())))
    if both("hazard"):
        found["hazard, weighted L1"] = distances.hazard(a["hazard"], b["hazard"])
    for name in ("sentence_tokens", "sentence_words", "word_length"):
        if both(name):
            found[f"{name}, W1"] = distances.wasserstein_1(a[name], b[name])
            found[f"{name}, Cramér"] = distances.cramer(a[name], b[name])
    if both("punctuation_rate"):
        found["punctuation_rate, L1"] = 2 * distances.total_variation(a["punctuation_rate"], b["punctuation_rate"])
    for name, label, distance in (
        ("punctuation_gap", "W1", distances.wasserstein_1),
        ("punctuation_transition", "TV", distances.total_variation),
    ):
        if both(name, "punctuation_rate"):
            there = a[name].any(1) & b[name].any(1)
            weight = torch.where(there, a["punctuation_rate"].double() + b["punctuation_rate"].double(), 0)
            if bool(there.any()):
                pairs = zip(weight.tolist(), a[name], b[name], strict=True)
                found[f"{name}, {label}"] = sum(w * distance(p, q) for w, p, q in pairs if w) / float(weight.sum())
    for name in ("punctuation_per_1000_words", "type_token_ratio"):
        if both(name):
            found[f"{name}, L1"] = 2 * distances.total_variation(a[name], b[name])
    if both("sentence_words"):
        found["burstiness, L1"] = abs(burstiness(a["sentence_words"]) - burstiness(b["sentence_words"]))
    return found


def between(a: Target, b: Target) -> dict[str, float]:
    """`compare` of two targets; token statistics only where both are of one tokenizer."""
    same = a.about.tokenizer_sha256 == b.about.tokenizer_sha256
    return compare(a.tensors if same else text_alone(a), b.tensors if same else text_alone(b))


def text_alone(target: Target) -> dict[str, Tensor]:
    """The statistics that need no tokenizer."""
    return {name: tensor for name, tensor in target.tensors.items() if not STATISTICS[name].tokens}
